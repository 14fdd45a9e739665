// What a unit of attentive_stats_pool_from_hidden offers to the engine, and what it is given.
#pragma once

#include <cstdint>

#include "attentive_stats_pool_kernel.h"
#include "product_kernel.h"

namespace spkfast::cpu {

// The packed hidden layer of a row has room for a multiple of this many frames.
constexpr int64_t kHiddenPadding = 48;

struct AttentiveStatsPoolFromHiddenBatch {
  AttentiveStatsPoolBatch pool;  // without logits and weights
  // All of the pool's element type. The weight has the units of a channel side by side; the hidden
  // layer the units of a frame, or the frames of a unit, as x has its channels or its frames.
  const void* hidden;  // (batch, units, frames)
  int64_t hidden_batch_stride, hidden_unit_stride, hidden_frame_stride;
  const void* weight;  // (channels, units)
  int64_t weight_stride;
  const void* bias;  // (channels,)
  int64_t units;

  // What is multiplied: bfloat16 numbers as they are, where their frames' channels lie side by
  // side.
  Operand operand() const {
    return pool.channels_last && pool.element == Element::bfloat16 ? Operand::bfloat16
                                                                   : Operand::float32;
  }
  // Whether the hidden layer is read where it lies.
  bool reads_hidden() const {
    const bool same = operand() == Operand::bfloat16 || pool.element == Element::float32;
    return pool.channels_last && same && units % step_channels(operand()) == 0;
  }
  // Floats of the packed weight of a group of channels, and of the packed hidden layer of a row.
  int64_t weight_floats() const { return kPoolChannels * (units + 1); }
  int64_t hidden_floats() const {
    if (reads_hidden()) return 0;
    return (pool.frames + kHiddenPadding - 1) / kHiddenPadding * kHiddenPadding * (units + 1);
  }
};

// The products read packed copies in float32: strips of channels, broadcast value by value, and
// panels of frames, in vectors; the bias is the weight of one more unit, which is always 1. Where
// the channels of a frame lie side by side, a frame's units are broadcast and a group of channels
// is a panel of product_kernel.h, with the bias after it.
struct AttentiveStatsPoolFromHiddenKernel {
  // Packs the weight of a group of kPoolChannels channels.
  void (*pack_weight)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t group, float* packed);
  // Packs the real frames of a row, where they are not read where they lie.
  void (*pack_hidden)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, float* packed);
  // All outputs of a group of channels of a row, from what was packed of both.
  void (*forward)(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, int64_t group,
                  const float* weight, const float* hidden);
};

const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_scalar();
const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx2();
const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx512();
const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx512bf16();

}  // namespace spkfast::cpu
