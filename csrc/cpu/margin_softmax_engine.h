// The sums over classes of margin_softmax_loss on the CPU, over raw pointers: free of torch.
#pragma once

#include <cstdint>

#include "cpu_level.h"
#include "margin_softmax_kernel.h"
#include "parallel_for.h"
#include "product_kernel.h"

namespace spkfast::cpu {

// Arrays as in the definition, all of them contiguous.
struct MarginSoftmax {
  Operand operand;  // not bytes
  bool normalise;
  MarginSum sum;
  int64_t batch, features, classes, subcenters, topk;
  const float *x, *weight;
  const float* bias;  // by class, or null
};

struct MarginSoftmaxSums {
  float *sums, *total, *chosen, *best, *own;
  int64_t* rows;
};
// Sums do not depend on the number of threads. A target that is no class is none.
void run_margin_softmax(const MarginSoftmax& call, const int64_t* target,
                        const MarginSoftmaxSums& out, Level level, const ParallelFor& parallel_for);

struct MarginSoftmaxGradients {
  const float *of_sums, *of_total, *of_chosen;
  const float* sums;
  const int64_t* rows;  // each of them a row of the weight, or negative
  float *of_x, *of_weight;
  float* of_bias;  // of classes, or one of binary logits; or null
};
void run_margin_softmax_backward(const MarginSoftmax& call, const MarginSoftmaxGradients& gradients,
                                 Level level, const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
