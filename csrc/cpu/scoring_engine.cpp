#include "scoring_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace spkfast::cpu {
namespace {

// Memory is what pairs wait for, so the compiler's baseline is as fast as wider vectors.
constexpr int64_t kLanes = 16;
using Lanes [[gnu::vector_size(kLanes * sizeof(float))]] = float;

inline Lanes load(const float* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline float sum(Lanes v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

inline float dot(const float* a, const float* b, int64_t size) {
  Lanes sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) sums += load(a + k) * load(b + k);
  float total = sum(sums);
  for (; k < size; ++k) total += a[k] * b[k];
  return total;
}

inline void prefetch(const float* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t k = 0; k < size; k += kLine) __builtin_prefetch(row + k);
}

// Where the share p of a normal distribution lies above, in standard deviations.
double normal_quantile(double p) {
  double low = -40, high = 40;
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) / 2 > p ? low : high) = middle;
  }
  return low;
}

// Copies the values above a threshold that are likely to be n or somewhat more to the front of
// `kept`, and returns how many these are: n at least; or -1 where a value is not finite.
int64_t keep_candidates(const float* x, int64_t count, int64_t n, double guess, float* kept) {
  Lanes sums = {}, squares = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Lanes v = load(x + k);
    sums += v;
    squares += v * v;
  }
  double total = sum(sums), square = sum(squares);
  for (; k < count; ++k) {
    total += x[k];
    square += static_cast<double>(x[k]) * x[k];
  }
  const double mean = total / static_cast<double>(count);
  const double std = std::sqrt(square / static_cast<double>(count) - mean * mean);
  // Moments that are not finite may be those of large values.
  if (!std::isfinite(total) || !std::isfinite(square)) {
    if (!std::all_of(x, x + count, [](float v) { return std::isfinite(v); })) return -1;
  } else if (std::isfinite(std)) {
    double step = 0.0625;
    for (double deviations = guess - step; step <= 2; step *= 2, deviations -= step) {
      const auto least = static_cast<float>(mean + deviations * std);
      int64_t found = 0;
      for (int64_t i = 0; i < count; ++i) {
        kept[found] = x[i];
        found += x[i] > least;
      }
      if (found >= n) return found;
    }
  }
  std::copy_n(x, count, kept);
  return count;
}

// Puts the n greatest of `found` values to their front: those of the upper of equal steps between
// the least and the greatest are all among them, so that few have to be compared with one another.
void select_top(float* values, int64_t found, int64_t n, float* scratch) {
  constexpr int kSteps = 64;
  float low = values[0], high = values[0];
  for (int64_t k = 1; k < found; ++k) {
    low = values[k] < low ? values[k] : low;
    high = values[k] > high ? values[k] : high;
  }
  // In halves, whose difference stays in range.
  const float scale = kSteps / (high / 2 - low / 2);
  if (!std::isfinite(scale)) {  // hardly apart
    std::nth_element(values, values + n, values + found, std::greater<>());
    return;
  }
  const auto step_of = [&](float v) {
    const int step = static_cast<int>((v / 2 - low / 2) * scale);
    return step < kSteps - 1 ? step : kSteps - 1;
  };
  int counts[kSteps] = {};
  for (int64_t k = 0; k < found; ++k) ++counts[step_of(values[k])];
  int step = kSteps - 1;
  int64_t above = 0;  // values of the steps above this one
  while (above + counts[step] < n) above += counts[step--];
  int64_t top = 0, between = 0;
  for (int64_t k = 0; k < found; ++k) {
    const float v = values[k];
    const int of = step_of(v);
    scratch[between] = v;
    between += of == step;
    values[top] = v;
    top += of > step;
  }
  std::nth_element(scratch, scratch + (n - above), scratch + between, std::greater<>());
  std::copy_n(scratch, n - above, values + above);
}

using Doubles [[gnu::vector_size(8 * sizeof(double))]] = double;

// Sum over values of body(value in double).
template <typename Body>
double sum_of(const float* x, int64_t count, Body body) {
  using Floats [[gnu::vector_size(8 * sizeof(float))]] = float;
  Doubles sums = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    Floats v;
    std::memcpy(&v, x + k, sizeof(v));
    sums += body(__builtin_convertvector(v, Doubles));
  }
  double total = 0;
  for (int j = 0; j < 8; ++j) total += sums[j];
  for (; k < count; ++k) {
    const Doubles one = {static_cast<double>(x[k])};
    total += body(one)[0];
  }
  return total;
}

}  // namespace

void run_paired_dot(const PairedDot& call, const ParallelFor& parallel_for) {
  constexpr int64_t kAhead = 4, kGrain = 4096;
  parallel_for(0, call.pairs, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t + kAhead < end) {
        prefetch(call.a + call.first[t + kAhead] * call.size, call.size);
        prefetch(call.b + call.second[t + kAhead] * call.size, call.size);
      }
      call.out[t] =
          dot(call.a + call.first[t] * call.size, call.b + call.second[t] * call.size, call.size);
    }
  });
}

void run_top_moments(const TopMoments& call, const ParallelFor& parallel_for) {
  const int64_t n = call.n, count = call.count;
  const double guess = normal_quantile(static_cast<double>(n) / static_cast<double>(count));
  parallel_for(0, call.rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(count + 1), scratch(count + 1);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t found = keep_candidates(call.x + row * count, count, n, guess, kept.data());
      if (found < 0) {
        call.mean[row] = call.std[row] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      if (found > n) select_top(kept.data(), found, n, scratch.data());
      const double mean =
          sum_of(kept.data(), n, [](Doubles v) { return v; }) / static_cast<double>(n);
      const double square =
          sum_of(kept.data(), n, [&](Doubles v) { return (v - mean) * (v - mean); });
      call.mean[row] = static_cast<float>(mean);
      call.std[row] = static_cast<float>(std::sqrt(square / static_cast<double>(n)));
    }
  });
}

}  // namespace spkfast::cpu
