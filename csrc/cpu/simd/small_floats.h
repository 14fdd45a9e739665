// What instruction sets below AVX-512 have no instruction for: 16-bit floats, and powers of two.
// F. Giesen's conversions, in integers and one floating-point operation each. Their headers include
// it after the vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

namespace {

using Bits [[gnu::vector_size(W * 4)]] = uint32_t;
using SmallBits [[gnu::vector_size(W * 2)]] = uint16_t;

// v * 2^n for whole n from -150 to 0 and v near 1; 0 for n below -125, where that may be no normal
// number, and NaN where v is.
[[gnu::always_inline]] inline V scaled(V v, V n) {
  // The sum holds n in its lowest bits.
  const Bits exponent = reinterpret_cast<Bits>(n + 0x1.8p23F) << 23;
  const Bits product = reinterpret_cast<Bits>(v) + exponent;
  const V out = n < -125.0F ? V{} : reinterpret_cast<V>(product);
  return v == v ? out : v;  // the bits of a NaN would lead anywhere
}

[[gnu::always_inline]] inline V from_small(Bits bits, const BFloat16*) {
  const Bits wide = bits << 16;
  return reinterpret_cast<V>(wide);
}
[[gnu::always_inline]] inline V from_small(Bits bits, const Float16*) {
  const Bits magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const V value = reinterpret_cast<V>(magnitude) * 0x1p112F;
  const Bits special = reinterpret_cast<Bits>(magnitude >= 0x0f800000) & 0x7f800000;
  const Bits all_bits = reinterpret_cast<Bits>(value) | special | sign;
  return reinterpret_cast<V>(all_bits);
}
[[gnu::always_inline]] inline Bits to_small(V v, const BFloat16*) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v == v ? rounded : Bits{} + 0x7fc0;
}
[[gnu::always_inline]] inline Bits to_small(V v, const Float16*) {
  const Bits bits = reinterpret_cast<Bits>(v), sign = bits & 0x80000000;
  const Bits magnitude = bits ^ sign;
  // Adding a half leaves a small number's bits, rounded, at the bottom.
  const V moved = reinterpret_cast<V>(magnitude) + 0.5F;
  const Bits small = reinterpret_cast<Bits>(moved) - 0x3f000000;
  const Bits normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const Bits large = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
  const Bits finite = magnitude < 0x38800000 ? small : normal;
  return (magnitude >= 0x47800000 ? large : finite) | (sign >> 16);
}

template <typename T>
[[gnu::always_inline]] inline V load_small(const T* p, int64_t n) {
  SmallBits bits = {};
  std::memcpy(&bits, p, n * sizeof(T));
  return from_small(__builtin_convertvector(bits, Bits), p);
}
template <typename T>
[[gnu::always_inline]] inline void store_small(T* p, int64_t n, V v) {
  const SmallBits bits = __builtin_convertvector(to_small(v, p), SmallBits);
  std::memcpy(p, &bits, n * sizeof(T));
}

[[gnu::always_inline]] inline V load(const BFloat16* p) { return load_small(p, W); }
[[gnu::always_inline]] inline V load(const Float16* p) { return load_small(p, W); }
[[gnu::always_inline]] inline void store(BFloat16* p, V v) { store_small(p, W, v); }
[[gnu::always_inline]] inline void store(Float16* p, V v) { store_small(p, W, v); }
template <typename T>
[[gnu::always_inline]] inline V load_first(const T* p, int64_t n, V rest) {
  const V values = load_small(p, n);
  I lane;
  for (int64_t w = 0; w < W; ++w) lane[w] = static_cast<int32_t>(w);
  return lane < static_cast<int32_t>(n) ? values : rest;
}
template <typename T>
[[gnu::always_inline]] inline void store_first(T* p, int64_t n, V v) {
  store_small(p, n, v);
}

}  // namespace
