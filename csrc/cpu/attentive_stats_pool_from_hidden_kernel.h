// What a unit of attentive_stats_pool_from_hidden offers to the engine, and what it is given.
#pragma once

#include <cstdint>

#include "attentive_stats_pool_kernel.h"

namespace spkfast::cpu {

// The packed hidden layer of a row has room for a multiple of this many frames.
constexpr int64_t kHiddenPadding = 48;

struct AttentiveStatsPoolFromHiddenBatch {
  AttentiveStatsPoolBatch pool;  // without logits and weights
  // All of the pool's element type, and their last dimension side by side.
  const void* hidden;  // (batch, units, frames)
  int64_t hidden_batch_stride, hidden_unit_stride;
  const void* weight;  // (channels, units)
  int64_t weight_stride;
  const void* bias;  // (channels,)
  int64_t units;

  // Floats of the packed weight of a group of channels, and of the packed hidden layer of a row.
  int64_t weight_floats() const { return kPoolChannels * (units + 1); }
  int64_t hidden_floats() const {
    return (pool.frames + kHiddenPadding - 1) / kHiddenPadding * kHiddenPadding * (units + 1);
  }
};

// The products read packed copies in float32: strips of one operand, broadcast value by value, and
// panels of the other, in vectors. Strips are of channels and panels of frames where the frames of
// a channel lie side by side, else the other way round. The bias is the weight of one more unit,
// which is always 1.
struct AttentiveStatsPoolFromHiddenKernel {
  // Packs the weight of a group of kPoolChannels channels.
  void (*pack_weight)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t group, float* packed);
  // Packs the real frames of a row.
  void (*pack_hidden)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, float* packed);
  // All outputs of a group of channels of a row, from what was packed of both.
  void (*forward)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, int64_t group,
                  const float* weight, const float* hidden);
};

const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_scalar();
const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx2();
const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx512();

}  // namespace spkfast::cpu
