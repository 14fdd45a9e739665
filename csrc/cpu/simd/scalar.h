// Vectors of 4 floats for the compiler's baseline: SSE2 on x86-64, NEON on Arm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t W = 4;
using V [[gnu::vector_size(W * 4)]] = float;
using I [[gnu::vector_size(W * 4)]] = int32_t;

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline V load(const int16_t* p) {
  return V{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
// x in every lane. Not V{} + x, which adds a zero that the compiler must keep.
inline V all(float x) { return V{x, x, x, x}; }
// a * b + c and c - a * b; this baseline has no fused form.
inline V madd(V a, V b, V c) { return a * b + c; }
inline V nmadd(V a, V b, V c) { return c - a * b; }
inline V root(V v) { return V{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])}; }
// The larger one of each lane; b where either is NaN.
inline V larger(V a, V b) { return a > b ? a : b; }
// Of magnitudes below 2^22.
inline V nearest_whole(V v) { return (v + 0x1.8p23F) - 0x1.8p23F; }
inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float largest(V v) {
  const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
  return even > odd ? even : odd;
}
// The first n values of p, fewer than W, and the lanes of `rest` after them. Reads no further.
inline V load_first(const float* p, int64_t n, V rest) {
  std::memcpy(&rest, p, n * sizeof(float));
  return rest;
}
// The first n lanes, fewer than W.
inline void store_first(float* p, int64_t n, V v) { std::memcpy(p, &v, n * sizeof(float)); }

// Rows become columns.
inline void transpose(V (&v)[W]) {
  const V a = __builtin_shuffle(v[0], v[1], I{0, 4, 1, 5});
  const V b = __builtin_shuffle(v[0], v[1], I{2, 6, 3, 7});
  const V c = __builtin_shuffle(v[2], v[3], I{0, 4, 1, 5});
  const V d = __builtin_shuffle(v[2], v[3], I{2, 6, 3, 7});
  v[0] = __builtin_shuffle(a, c, I{0, 1, 4, 5});
  v[1] = __builtin_shuffle(a, c, I{2, 3, 6, 7});
  v[2] = __builtin_shuffle(b, d, I{0, 1, 4, 5});
  v[3] = __builtin_shuffle(b, d, I{2, 3, 6, 7});
}

// Moves an aligned line of 64 bytes; nothing is left to be made visible.
[[gnu::always_inline]] inline void stream_line(void* to, const void* from) {
  __builtin_memcpy(to, from, 64);
}
// v past the caches to where a vector of the memory begins, where there is an instruction for it.
constexpr bool kStreams = false;
[[gnu::always_inline]] inline void stream(float* p, V v) { store(p, v); }
[[gnu::always_inline]] inline void end_stream() {}

}  // namespace

#include "small_floats.h"
