// Vectors of 16 floats for AVX-512.
#pragma once

// Here rather than among the flags of the build, of which there are several. For everything that
// follows.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")

#include <immintrin.h>

#include <cstdint>

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

}  // namespace
