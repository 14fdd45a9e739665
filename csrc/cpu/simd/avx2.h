// Vectors of 8 floats for AVX2 and FMA.
#pragma once

// Here rather than among the flags of the build, of which there are several. For everything that
// follows.
#pragma GCC target("avx2,fma")

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int64_t W = 8;
using V = __m256;
using I [[gnu::vector_size(W * 4)]] = int32_t;

[[gnu::always_inline]] inline V load(const float* p) { return _mm256_loadu_ps(p); }
[[gnu::always_inline]] inline V load(const int16_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
[[gnu::always_inline]] inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
// x in every lane. Not V{} + x, which adds a zero that the compiler must keep.
[[gnu::always_inline]] inline V all(float x) { return _mm256_set1_ps(x); }
// a * b + c and c - a * b, rounded once.
[[gnu::always_inline]] inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline V nmadd(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
[[gnu::always_inline]] inline V root(V v) { return _mm256_sqrt_ps(v); }
// The larger one of each lane; b where either is NaN.
[[gnu::always_inline]] inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
[[gnu::always_inline]] inline V nearest_whole(V v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
[[gnu::always_inline]] inline float sum(V v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
[[gnu::always_inline]] inline float largest(V v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

[[gnu::always_inline]] inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first n values of p, fewer than W, and the lanes of `rest` after them. Reads no further.
[[gnu::always_inline]] inline V load_first(const float* p, int64_t n, V rest) {
  const __m256i lanes = first_lanes(n);
  return _mm256_blendv_ps(rest, _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
}
// The first n lanes, fewer than W.
[[gnu::always_inline]] inline void store_first(float* p, int64_t n, V v) {
  _mm256_maskstore_ps(p, first_lanes(n), v);
}

// Rows become columns.
[[gnu::always_inline]] inline void transpose(V (&v)[W]) {
  V a[W];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const V low = a[4 * i + j], high = a[4 * i + 2 + j];
      v[4 * i + 2 * j] = _mm256_shuffle_ps(low, high, 0x44);
      v[4 * i + 2 * j + 1] = _mm256_shuffle_ps(low, high, 0xee);
    }
  }
  // v[4 i + c] holds columns c and c + 4 of rows 4 i to 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    a[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
    a[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
  }
  for (int c = 0; c < W; ++c) v[c] = a[c];
}

// Moves an aligned line of 64 bytes past the caches, and makes such lines visible to other threads.
[[gnu::always_inline]] inline void stream_line(void* to, const void* from) {
  const auto* lines = static_cast<const __m256i*>(from);
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_load_si256(lines));
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, _mm256_load_si256(lines + 1));
}
// v past the caches to where a vector of the memory begins, where there is an instruction for it.
constexpr bool kStreams = true;
[[gnu::always_inline]] inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
[[gnu::always_inline]] inline void end_stream() { _mm_sfence(); }

}  // namespace

#include "small_floats.h"
