// Pooling of a batch on the CPU, over raw pointers: free of torch, so that sanitizer builds can use
// it alone.
#pragma once

#include <cstdint>

#include "attentive_stats_pool_kernel.h"
#include "cpu_level.h"
#include "parallel_for.h"

namespace spkfast::cpu {

// Logits that all channels share, (batch, frames), or null where all frames weigh the same; and
// what the forward pass says or said of each row.
struct SharedLogits {
  const void* logits;
  float *highest, *total;
};

const AttentiveStatsPoolKernel& attentive_stats_pool_kernel(Level level);

// Whole passes over a batch. Of `batch` all is given but the weights, and in the backward pass the
// sums. `shared` is null where each channel has logits of its own.
void run_attentive_stats_pool(const AttentiveStatsPoolBatch& batch, const SharedLogits* shared,
                              Level level, const ParallelFor& parallel_for);
// Writes grad_logits, (batch, frames), too where there are shared logits.
void run_attentive_stats_pool_backward(const AttentiveStatsPoolBatch& batch,
                                       const SharedLogits* shared, void* grad_logits, Level level,
                                       const ParallelFor& parallel_for);

// Tasks that a thread takes at least, each over `elements` values: fewer are not worth a second
// thread.
inline int64_t pool_grain(int64_t elements) { return 1 + 32768 / (elements + 1); }

}  // namespace spkfast::cpu
