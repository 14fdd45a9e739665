#include "attentive_stats_pool_engine.h"

#include <algorithm>
#include <vector>

namespace spkfast::cpu {
namespace {

// Calls task(row, group) for every group of channels of every row.
template <typename Task>
void for_groups(const AttentiveStatsPoolBatch& batch, const ParallelFor& parallel_for,
                const Task& task) {
  const int64_t groups = batch.groups();
  parallel_for(0, batch.batch * groups, pool_grain(kPoolChannels * batch.frames),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) task(i / groups, i % groups);
               });
}

// Calls task(row, its weights) for every row.
template <typename Task>
void for_rows(const AttentiveStatsPoolBatch& batch, std::vector<float>& weights,
              const ParallelFor& parallel_for, const Task& task) {
  const int64_t padded = batch.padded_frames();
  weights.resize(batch.batch * padded);
  parallel_for(0, batch.batch, pool_grain(padded), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) task(row, weights.data() + row * padded);
  });
}

RowLogits row_logits(const AttentiveStatsPoolBatch& batch, const SharedLogits& shared,
                     int64_t row) {
  const int64_t size = batch.element == Element::float32 ? 4 : 2;
  return {batch.element, static_cast<const char*>(shared.logits) + row * batch.frames * size,
          batch.length(row), batch.padded_frames()};
}

}  // namespace

const AttentiveStatsPoolKernel& attentive_stats_pool_kernel(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512) return attentive_stats_pool_avx512();
  if (level == Level::avx2) return attentive_stats_pool_avx2();
#endif
  return attentive_stats_pool_scalar();
}

void run_attentive_stats_pool(const AttentiveStatsPoolBatch& batch, const SharedLogits* shared,
                              Level level, const ParallelFor& parallel_for) {
  const AttentiveStatsPoolKernel& kernel = attentive_stats_pool_kernel(level);
  AttentiveStatsPoolBatch whole = batch;
  std::vector<float> weights;
  if (shared) {
    for_rows(batch, weights, parallel_for, [&](int64_t row, float* of_row) {
      if (shared->logits) {
        kernel.row_weights(row_logits(batch, *shared, row), of_row, shared->highest + row,
                           shared->total + row);
        return;
      }
      const int64_t length = batch.length(row);
      std::fill_n(of_row, length, 1.0F);
      shared->highest[row] = 0;
      shared->total[row] = static_cast<float>(length);
    });
    whole.weights = weights.data();
  }
  for_groups(batch, parallel_for,
             [&](int64_t row, int64_t group) { kernel.forward(whole, row, group); });
}

void run_attentive_stats_pool_backward(const AttentiveStatsPoolBatch& batch,
                                       const SharedLogits* shared, void* grad_logits, Level level,
                                       const ParallelFor& parallel_for) {
  const AttentiveStatsPoolKernel& kernel = attentive_stats_pool_kernel(level);
  AttentiveStatsPoolBatch whole = batch;
  std::vector<float> weights, sums;
  if (shared) {
    for_rows(batch, weights, parallel_for, [&](int64_t row, float* of_row) {
      if (shared->logits) {
        kernel.row_shares(row_logits(batch, *shared, row), shared->highest[row], shared->total[row],
                          of_row);
      } else {
        std::fill_n(of_row, batch.length(row), 1 / shared->total[row]);
      }
    });
    whole.weights = weights.data();
    if (shared->logits) {
      sums.resize(batch.batch * batch.groups() * batch.padded_frames());
      whole.sums = sums.data();
    }
  }
  for_groups(batch, parallel_for,
             [&](int64_t row, int64_t group) { kernel.backward(whole, row, group); });
  if (!shared || !shared->logits) return;
  parallel_for(0, batch.batch, pool_grain(batch.groups() * batch.frames),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row)
                   kernel.finish_shared(whole, row, grad_logits);
               });
}

}  // namespace spkfast::cpu
