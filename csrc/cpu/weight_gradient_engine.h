// The gradient of the weight of a convolution on the CPU, over raw pointers: free of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_level.h"
#include "parallel_for.h"
#include "product_engine.h"
#include "weight_gradient_kernel.h"

namespace spkfast::cpu {

struct WeightGradient {
  Operand operand;  // not bytes
  int64_t batch, frames;
  Element element;             // of the inputs
  std::vector<Batch> inputs;   // one after the other
  std::vector<int64_t> parts;  // channels of each
  Element grad_element;
  Batch grad;  // of the output
  int64_t channels;
  int64_t taps, dilation;
  bool reflect;
  float* out;  // (channels, inputs, taps)
};

// Sums do not depend on the number of threads. Where a value is infinite or NaN, other taps of its
// channel may become NaN than those that read it.
void run_weight_gradient(const WeightGradient& call, Level level, int64_t threads,
                         const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
