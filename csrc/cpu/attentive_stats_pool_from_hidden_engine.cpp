#include "attentive_stats_pool_from_hidden_engine.h"

#include <vector>

namespace spkfast::cpu {

const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_kernel(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512bf16) return attentive_stats_pool_from_hidden_avx512bf16();
  if (level == Level::avx512) return attentive_stats_pool_from_hidden_avx512();
  if (level == Level::avx2) return attentive_stats_pool_from_hidden_avx2();
#endif
  return attentive_stats_pool_from_hidden_scalar();
}

void run_attentive_stats_pool_from_hidden(const AttentiveStatsPoolFromHiddenBatch& batch,
                                          Level level, const ParallelFor& parallel_for) {
  const AttentiveStatsPoolFromHiddenKernel& kernel = attentive_stats_pool_from_hidden_kernel(level);
  const int64_t groups = batch.pool.groups(), size = batch.weight_floats();
  std::vector<float> weight(groups * size);
  parallel_for(0, groups, pool_grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      kernel.pack_weight(batch, group, weight.data() + group * size);
  });
  const int64_t work = kPoolChannels * batch.pool.frames * (batch.units + 1);
  parallel_for(0, batch.pool.batch * groups, pool_grain(work), [&](int64_t begin, int64_t end) {
    std::vector<float> hidden(batch.hidden_floats());  // a thread's own: a row at a time
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups, group = i % groups;
      if (row != packed && !batch.reads_hidden()) kernel.pack_hidden(batch, row, hidden.data());
      packed = row;
      kernel.forward(batch, row, group, weight.data() + group * size, hidden.data());
    }
  });
}

}  // namespace spkfast::cpu
