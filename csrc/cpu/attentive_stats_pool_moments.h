// Weighted mean and variance of the lanes of vectors, over the vectors of one instruction set,
// whose header the including unit names before. Each lane is a sample of its own, with a maximum of
// its own for the softmax; where the lanes are frames of one channel they are merged last.
#pragma once

#include "attentive_stats_pool_kernel.h"
#include "simd/each.h"

namespace {

constexpr float kInfinity = __builtin_inff();

// What to subtract from logits with this maximum: of none but minus infinity nothing, so that their
// weights are 0 and not NaN.
[[gnu::always_inline]] inline V base_of(V highest) { return highest == -kInfinity ? V{} : highest; }

// Of the frames seen: the largest logit, the sum of exp(logit - highest), the mean under these
// weights, and the weighted sum of squared distances to it.
struct Moments {
  V highest, total, mean, squares;
};

// Sequences of vectors: number i of sequence s starts at first + s * apart + i * step.
template <typename T>
struct Sequences {
  const T* first;
  int64_t apart, step;
  template <typename Width>
  [[gnu::always_inline]] V read(int64_t s, int64_t i, Width width, V other) const {
    return width.read(first + s * apart + i * step, other);
  }
  [[gnu::always_inline]] void prefetch(int64_t s, int64_t i) const {
    __builtin_prefetch(first + s * apart + i * step);
  }
};

// Sequences at a time: their chains of sums hide each other's latency, and fit the registers.
constexpr int kSequences = W == 16 ? 4 : 2;

// Moments of N sequences x: sums, then squares about the mean. weight(s, i, width) gives a weight
// first, kept(s, i) again; meanwhile ahead(s, i) fetches what comes later.
template <int N, typename X, typename Weight, typename Kept, typename Ahead>
[[gnu::always_inline]] inline void moments(const V* highest, Sequences<X> x, Extent extent,
                                           Weight weight, Kept kept, Ahead ahead, Moments* out) {
  V total[N] = {}, sum[N] = {};
  extent.each([&](int64_t i, auto width) __attribute__((always_inline)) {
    each<N>([&](auto s) __attribute__((always_inline)) {
      ahead(s, i);
      const V w = weight(s, i, width);
      total[s] += w;
      sum[s] = madd(w, x.read(s, i, width, V{}), sum[s]);
    });
  });
  V scale[N], mean[N], squares[N] = {}, left[N] = {};
  each<N>([&](auto s) __attribute__((always_inline)) {
    // Of a lane with next to no weight, which only shared weights make, the mean does not count and
    // its inverse might overflow.
    scale[s] = total[s] < 1e-30F ? V{} : all(1.0F) / total[s];
    mean[s] = sum[s] * scale[s];
  });
  extent.each([&](int64_t i, auto width) __attribute__((always_inline)) {
    each<N>([&](auto s) __attribute__((always_inline)) {
      const V distance = x.read(s, i, width, V{}) - mean[s], weighted = kept(s, i) * distance;
      left[s] += weighted;
      squares[s] = madd(weighted, distance, squares[s]);
    });
  });
  each<N>([&](auto s) __attribute__((always_inline)) {
    // What rounding left of the mean is taken out of both: the gradient is relative to this mean.
    const V error = left[s] * scale[s];
    out[s] = {highest[s], total[s], mean[s] + error,
              larger(V{}, nmadd(left[s], error, squares[s]))};
  });
}

// Moments of N sequences x under the weights of `logits`; `weights` holds these meanwhile, each
// sequence `apart` from the last, and may be the logits' own memory.
template <int N, typename E, typename X, typename Ahead>
[[gnu::always_inline]] inline void softmax_moments(Sequences<E> logits, Sequences<X> x,
                                                   Extent extent, float* weights, int64_t apart,
                                                   Ahead ahead, Moments* out) {
  const V none = all(-kInfinity);
  V highest[N], base[N];
  each<N>([&](auto s) __attribute__((always_inline)) { highest[s] = none; });
  extent.each([&](int64_t i, auto width) __attribute__((always_inline)) {
    each<N>([&](auto s) __attribute__((always_inline)) {
      highest[s] = larger(logits.read(s, i, width, none), highest[s]);
    });
  });
  each<N>([&](auto s) __attribute__((always_inline)) { base[s] = base_of(highest[s]); });
  moments<N>(
      highest, x, extent,
      [&](auto s, int64_t i, auto width) __attribute__((always_inline)) {
        const V w = exponential(logits.read(s, i, width, none) - base[s]);
        store(weights + s * apart + i * logits.step, w);
        return w;
      },
      [&](auto s, int64_t i)
          __attribute__((always_inline)) { return load(weights + s * apart + i * logits.step); },
      ahead, out);
}

// The moments of both samples (Chan, Golub and LeVeque 1983).
[[gnu::always_inline]] inline Moments merged(const Moments& a, const Moments& b) {
  const V highest = larger(a.highest, b.highest), base = base_of(highest);
  const V of_a = exponential(a.highest - base), of_b = exponential(b.highest - base);
  const V weight_a = a.total * of_a, weight_b = b.total * of_b, total = weight_a + weight_b;
  const V part = weight_b / (total == 0.0F ? all(1.0F) : total), distance = b.mean - a.mean;
  const V between = distance * distance * (weight_a * part);
  return {highest, total, madd(distance, part, a.mean),
          madd(a.squares, of_a, madd(b.squares, of_b, between))};
}

// From W channels, the lanes of each being parts of it, to a vector whose lanes are the channels.
inline Moments gathered(const Moments* channels) {
  V highest[W], total[W], mean[W], squares[W];
  for (int64_t c = 0; c < W; ++c) {
    highest[c] = channels[c].highest;
    total[c] = channels[c].total;
    mean[c] = channels[c].mean;
    squares[c] = channels[c].squares;
  }
  transpose(highest);
  transpose(total);
  transpose(mean);
  transpose(squares);
  V top = highest[0];
  for (int64_t i = 1; i < W; ++i) top = larger(highest[i], top);
  const V base = base_of(top);
  V all_total = {}, sum = {}, all_squares = {}, left = {};
  for (int64_t i = 0; i < W; ++i) {
    const V of = exponential(highest[i] - base);
    total[i] *= of;
    all_total += total[i];
    sum = madd(total[i], mean[i], sum);
    all_squares = madd(squares[i], of, all_squares);
  }
  const V near = sum / all_total;
  for (int64_t i = 0; i < W; ++i) {
    const V distance = mean[i] - near, weighted = total[i] * distance;
    left += weighted;
    all_squares = madd(weighted, distance, all_squares);
  }
  const V error = left / all_total;
  return {top, all_total, near + error, larger(V{}, nmadd(left, error, all_squares))};
}

}  // namespace
