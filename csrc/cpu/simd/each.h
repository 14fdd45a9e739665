// Loops over vectors, whole and in part, and the exponential function, over the vectors of one
// instruction set, whose header the including unit names before.
#pragma once

#include <cstdint>
#include <utility>

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A number that is a type. Not the standard library's, whose functions other units share.
template <int I>
struct Constant {
  [[gnu::always_inline]] constexpr operator int() const { return I; }
};

// Calls f with the constants 0 to N - 1. In a plain loop over arrays of vectors GCC 12 keeps these
// in memory.
template <int N, typename F>
[[gnu::always_inline]] inline void each(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(Constant<I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// exp(x) of x <= 0, within 1.7e-7 of its value and a fraction of what rounding x costs; 0 for minus
// infinity, and NaN stays NaN.
[[gnu::always_inline]] inline V exponential(V x) {
  const V log2_e = all(1.44269504F);
  x = larger(all(-104.0F), x);
  const V n = nearest_whole(x * log2_e), r = madd(x, log2_e, -n);
  // 2^r: least largest relative error on -0.5 to 0.5, exact at 0.
  V y = madd(all(0.00132647133F), r, all(0.00967152324F));
  y = madd(y, r, all(0.0555073395F));
  y = madd(y, r, all(0.240222424F));
  y = madd(y, r, all(0.693147004F));
  y = madd(y, r, all(1.0F));
  return scaled(y, n);
}

// Vectors that are all there, or only their first lanes: how to read and write one.
struct Whole {
  [[gnu::always_inline]] int64_t count() const { return W; }
  template <typename T>
  [[gnu::always_inline]] V read(const T* p, V) const {
    return load(p);
  }
  template <typename T>
  [[gnu::always_inline]] void write(T* p, V v) const {
    store(p, v);
  }
};
struct Part {
  int64_t lanes;
  [[gnu::always_inline]] int64_t count() const { return lanes; }
  template <typename T>
  [[gnu::always_inline]] V read(const T* p, V other) const {
    return load_first(p, lanes, other);
  }
  template <typename T>
  [[gnu::always_inline]] void write(T* p, V v) const {
    store_first(p, lanes, v);
  }
};

// A number of whole vectors, and one of fewer lanes after them where `rest` is not 0.
struct Extent {
  int64_t whole, rest;
  // Calls body(i, Whole or Part) for vector number i.
  template <typename Body>
  [[gnu::always_inline]] void each(Body body) const {
    for (int64_t i = 0; i < whole; ++i) body(i, Whole{});
    if (rest) body(whole, Part{rest});
  }
};
[[gnu::always_inline]] inline Extent extent_of(int64_t values) { return {values / W, values % W}; }

}  // namespace
