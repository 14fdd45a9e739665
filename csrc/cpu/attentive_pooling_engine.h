// Attentive statistics pooling from frames to statistics on the CPU, over raw pointers: free of
// torch.
#pragma once

#include "attentive_stats_pool_from_hidden_engine.h"
#include "product_engine.h"

namespace spkfast::cpu {

// Standard deviation of a variance: sqrt(clamp(var + add, low, high)) + offset.
struct DeviationForm {
  bool unbiased;
  float add, low, high, offset;
};

struct AttentivePooling {
  Element element;  // of the frames, of the hidden layer and of the weight that follows it
  Layer hidden;
  const Layer*
      context;  // from mean and deviation of all frames to the bias of the hidden layer; or null
  DeviationForm deviation;
  const void* weight;  // (channels, units)
  const void* bias;    // (channels,)
  int64_t channels;
  // Frames of channels; or, turned, channels of frames, `channel_stride` bytes from one to the
  // next.
  Batch x;
  bool turned;
  int64_t channel_stride;
  float *mean, *var;  // (batch, channels)
};
void run_attentive_pooling(const AttentivePooling& call, const RealFrames& real, Level level,
                           int64_t threads, const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
