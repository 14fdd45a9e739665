// Pooling of a batch from its hidden layer on the CPU, over raw pointers: free of torch.
#pragma once

#include "attentive_stats_pool_engine.h"
#include "attentive_stats_pool_from_hidden_kernel.h"

namespace spkfast::cpu {

const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_kernel(Level level);

// Fills all outputs of the batch.
void run_attentive_stats_pool_from_hidden(const AttentiveStatsPoolFromHiddenBatch& batch,
                                          Level level, const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
