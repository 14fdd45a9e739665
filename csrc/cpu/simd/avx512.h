// Vectors of 16 floats for AVX-512.
#pragma once

// Here rather than among the flags of the build, of which there are several. For everything that
// follows.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

namespace {

constexpr int64_t W = 16;
using V = __m512;
using I [[gnu::vector_size(W * 4)]] = int32_t;

[[gnu::always_inline]] inline V load(const float* p) { return _mm512_loadu_ps(p); }
[[gnu::always_inline]] inline V load(const int16_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
[[gnu::always_inline]] inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
// x in every lane. Not V{} + x, which adds a zero that the compiler must keep.
[[gnu::always_inline]] inline V all(float x) { return _mm512_set1_ps(x); }
// a * b + c and c - a * b, rounded once.
[[gnu::always_inline]] inline V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
[[gnu::always_inline]] inline V nmadd(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
[[gnu::always_inline]] inline V root(V v) { return _mm512_sqrt_ps(v); }

// The larger one of each lane; b where either is NaN.
[[gnu::always_inline]] inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
[[gnu::always_inline]] inline V nearest_whole(V v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v * 2^n for whole n.
[[gnu::always_inline]] inline V scaled(V v, V n) { return _mm512_scalef_ps(v, n); }
[[gnu::always_inline]] inline float sum(V v) { return _mm512_reduce_add_ps(v); }
[[gnu::always_inline]] inline float largest(V v) { return _mm512_reduce_max_ps(v); }

[[gnu::always_inline]] inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>((1U << n) - 1);
}
[[gnu::always_inline]] inline V from_bfloats(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline V load(const BFloat16* p) {
  return from_bfloats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
[[gnu::always_inline]] inline V load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The first n values of p, fewer than W, and the lanes of `rest` after them. Reads no further.
[[gnu::always_inline]] inline V load_first(const float* p, int64_t n, V rest) {
  return _mm512_mask_loadu_ps(rest, first_lanes(n), p);
}
[[gnu::always_inline]] inline V load_first(const BFloat16* p, int64_t n, V rest) {
  const __mmask16 lanes = first_lanes(n);
  return _mm512_mask_mov_ps(rest, lanes, from_bfloats(_mm256_maskz_loadu_epi16(lanes, p)));
}
[[gnu::always_inline]] inline V load_first(const Float16* p, int64_t n, V rest) {
  const __mmask16 lanes = first_lanes(n);
  return _mm512_mask_cvtph_ps(rest, lanes, _mm256_maskz_loadu_epi16(lanes, p));
}
[[gnu::always_inline]] inline __m256i to_bfloats(V v) {
#ifdef SPKFAST_AVX512_DOTS
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
[[gnu::always_inline]] inline __m256i to_halves(V v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
[[gnu::always_inline]] inline void store(BFloat16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloats(v));
}
[[gnu::always_inline]] inline void store(Float16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_halves(v));
}
// The first n lanes, fewer than W.
[[gnu::always_inline]] inline void store_first(float* p, int64_t n, V v) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
[[gnu::always_inline]] inline void store_first(BFloat16* p, int64_t n, V v) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bfloats(v));
}
[[gnu::always_inline]] inline void store_first(Float16* p, int64_t n, V v) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_halves(v));
}

[[gnu::always_inline]] inline V as_doubles(__m512d v) { return _mm512_castpd_ps(v); }
[[gnu::always_inline]] inline __m512d doubles(V v) { return _mm512_castps_pd(v); }

// Rows become columns.
[[gnu::always_inline]] inline void transpose(V (&v)[W]) {
  V a[W];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const V low = a[4 * i + j], high = a[4 * i + 2 + j];
      v[4 * i + 2 * j] = as_doubles(_mm512_unpacklo_pd(doubles(low), doubles(high)));
      v[4 * i + 2 * j + 1] = as_doubles(_mm512_unpackhi_pd(doubles(low), doubles(high)));
    }
  }
  // v[4 i + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 i to 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    a[c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
    a[4 + c] = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
    a[8 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
    a[12 + c] = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_f32x4(a[c], a[8 + c], 0x88);
    v[4 + c] = _mm512_shuffle_f32x4(a[4 + c], a[12 + c], 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(a[c], a[8 + c], 0xdd);
    v[12 + c] = _mm512_shuffle_f32x4(a[4 + c], a[12 + c], 0xdd);
  }
}

// Moves an aligned line of 64 bytes past the caches, and makes such lines visible to other threads.
[[gnu::always_inline]] inline void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
}
// v past the caches to where a vector of the memory begins, where there is an instruction for it.
constexpr bool kStreams = true;
[[gnu::always_inline]] inline void stream(float* p, V v) { _mm512_stream_ps(p, v); }
[[gnu::always_inline]] inline void end_stream() { _mm_sfence(); }

}  // namespace
