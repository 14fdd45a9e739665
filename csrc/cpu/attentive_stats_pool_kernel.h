// What a unit of attentive_stats_pool offers to the engine, and what it is given.
#pragma once

#include <cstdint>

#include "element.h"

namespace spkfast::cpu {

// A (B, C, T) tensor; strides in elements, of which that of the frames or that of the channels
// is 1.
struct PoolTensor {
  void* data;
  int64_t batch_stride, channel_stride, frame_stride;
};

// Channels of a task.
constexpr int64_t kPoolChannels = 64;
// Row weights end in zeros up to a multiple of this, at least as many as any vector has lanes.
constexpr int64_t kPoolPadding = 16;

struct AttentiveStatsPoolBatch {
  Element element;
  // Whether the channels of a frame lie side by side, rather than the frames of a channel; so for
  // all tensors.
  bool channels_last;
  int64_t batch, channels, frames;
  const int64_t* lengths;  // (batch,), or null where all frames are real
  PoolTensor x;
  // Whether the channels share their weights, and have no logits of their own.
  bool shared;
  PoolTensor logits;     // each channel's own
  const float* weights;  // shared: (batch, padded frames), normalised in the backward pass alone

  // (batch, channels); highest and total only where each channel has logits of its own.
  float *mean, *var, *highest, *total;

  // What only the gradient has: those given, (batch, channels), and those to be written.
  const float *grad_mean, *grad_var;
  PoolTensor grad_x;
  PoolTensor grad_logits;  // each channel's own
  // Write the gradients past the caches: they are larger than these, and a line that is written
  // whole then need not be read first.
  bool stream;
  // (batch, groups of channels, padded frames): sums over a group of the gradient of a shared
  // logit, to be multiplied with its weight; or null.
  float* sums;

  int64_t length(int64_t row) const {
    if (!lengths) return frames;
    return lengths[row] < 0 ? 0 : lengths[row] > frames ? frames : lengths[row];
  }
  int64_t padded_frames() const {
    return (frames + kPoolPadding - 1) / kPoolPadding * kPoolPadding;
  }
  int64_t groups() const { return (channels + kPoolChannels - 1) / kPoolChannels; }
};

// Shared logits of a row, side by side; of null where all frames weigh the same.
struct RowLogits {
  Element element;
  const void* data;
  int64_t length, padded_frames;
};

struct AttentiveStatsPoolKernel {
  // exp(logit - highest) of a row's frames, then zeros; their sum and the highest logit.
  void (*row_weights)(const RowLogits& row, float* weights, float* highest, float* total);
  // exp(logit - highest) / total, then zeros.
  void (*row_shares)(const RowLogits& row, float highest, float total, float* weights);
  // All outputs of a group of kPoolChannels channels of a row.
  void (*forward)(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t group);
  void (*backward)(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t group);
  // The gradient of a row's shared logits, side by side: the groups' sums times the weights.
  void (*finish_shared)(const AttentiveStatsPoolBatch& batch, int64_t row, void* grad_logits);
};

const AttentiveStatsPoolKernel& attentive_stats_pool_scalar();
const AttentiveStatsPoolKernel& attentive_stats_pool_avx2();
const AttentiveStatsPoolKernel& attentive_stats_pool_avx512();

}  // namespace spkfast::cpu
