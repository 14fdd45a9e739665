// Scores of speaker verification over raw pointers: free of torch.
#pragma once

#include <cstdint>

#include "parallel_for.h"

namespace spkfast::cpu {

// out[t] = dot(a[first[t]], b[second[t]]), rows of `size` values; every index lies inside.
struct PairedDot {
  const float *a, *b;
  const int64_t *first, *second;
  float* out;
  int64_t pairs, size;
};
void run_paired_dot(const PairedDot& call, const ParallelFor& parallel_for);

// Mean and standard deviation (of n, not n - 1) of the n greatest values of each row; NaN for a row
// that holds a value which is not finite. 1 <= n <= count.
struct TopMoments {
  const float* x;
  float *mean, *std;
  int64_t rows, count, n;
};
void run_top_moments(const TopMoments& call, const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
