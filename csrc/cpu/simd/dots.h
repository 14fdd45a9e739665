// Products of operands that share lanes of 32 bits: one float, two bfloat16 numbers, or four bytes.
// Over the vectors of one instruction set, whose header the including unit names before.
#pragma once

#include <cstdint>

namespace {

using Words [[gnu::vector_size(W * 4)]] = uint32_t;

template <typename To, typename From>
[[gnu::always_inline]] inline To bits_of(From from) {
  return reinterpret_cast<To>(from);
}

// sum + left * right.
struct Floats {
  [[gnu::always_inline]] static V add(V sum, V left, V right) { return madd(left, right, sum); }
  [[gnu::always_inline]] static V number(V sum) { return sum; }
};

// sum + left[0] * right[0] + left[1] * right[1].
struct Bfloats {
  [[gnu::always_inline]] static V add(V sum, V left, V right) {
#ifdef SPKFAST_AVX512_DOTS
    return _mm512_dpbf16_ps(sum, bits_of<__m512bh>(left), bits_of<__m512bh>(right));
#else
    const Words a = bits_of<Words>(left), b = bits_of<Words>(right);
    sum = madd(bits_of<V>(a << 16), bits_of<V>(b << 16), sum);
    return madd(bits_of<V>(a & 0xffff0000), bits_of<V>(b & 0xffff0000), sum);
#endif
  }
  [[gnu::always_inline]] static V number(V sum) { return sum; }
};

// The same of four bytes, left without a sign and right with one, exactly in whole numbers.
struct Bytes {
  [[gnu::always_inline]] static V add(V sum, V left, V right) {
#ifdef SPKFAST_AVX512_DOTS
    return bits_of<V>(_mm512_dpbusd_epi32(bits_of<__m512i>(sum), bits_of<__m512i>(left),
                                          bits_of<__m512i>(right)));
#else
    const I a = bits_of<I>(left), b = bits_of<I>(right);
    I total = bits_of<I>(sum);
    for (int bit = 0; bit < 32; bit += 8)
      total += (a >> bit & 255) * (bits_of<I>(bits_of<Words>(b) << (24 - bit)) >> 24);
    return bits_of<V>(total);
#endif
  }
  [[gnu::always_inline]] static V number(V sum) {
    return __builtin_convertvector(bits_of<I>(sum), V);
  }
};

}  // namespace
