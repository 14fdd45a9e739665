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
// `kept`, and returns how many these are: n at least. All values must be finite.
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
  double step = 0.125;
  for (double deviations = guess - step; step <= 2; step *= 2, deviations -= step) {
    const double threshold = mean + deviations * std;
    if (!std::isfinite(threshold)) break;
    const auto least = static_cast<float>(threshold);
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      kept[found] = x[i];
      found += x[i] > least;
    }
    if (found >= n) return found;
  }
  std::copy_n(x, count, kept);
  return count;
}

bool all_finite(const float* x, int64_t count) {
  Lanes sums = {};  // of zeros
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Lanes v = load(x + k);
    sums += v - v;
  }
  float rest = sum(sums);
  for (; k < count; ++k) rest += x[k] - x[k];
  return rest == 0;
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
    std::vector<float> kept(count);
    for (int64_t row = begin; row < end; ++row) {
      const float* x = call.x + row * count;
      if (!all_finite(x, count)) {
        call.mean[row] = call.std[row] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      const float* top = x;
      if (n < count) {
        const int64_t found = keep_candidates(x, count, n, guess, kept.data());
        if (found > n) {
          std::nth_element(kept.begin(), kept.begin() + n, kept.begin() + found, std::greater<>());
        }
        top = kept.data();
      }
      double total = 0, square = 0;
      for (int64_t k = 0; k < n; ++k) total += top[k];
      const double mean = total / static_cast<double>(n);
      for (int64_t k = 0; k < n; ++k) square += (top[k] - mean) * (top[k] - mean);
      call.mean[row] = static_cast<float>(mean);
      call.std[row] = static_cast<float>(std::sqrt(square / static_cast<double>(n)));
    }
  });
}

}  // namespace spkfast::cpu
