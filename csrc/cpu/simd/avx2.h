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

}  // namespace
