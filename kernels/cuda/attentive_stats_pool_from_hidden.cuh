// Launcher of attentive_stats_pool_from_hidden on CUDA: raw pointers in, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/platform.cuh"

namespace spkfast {

// Sizes: B rows, C channels, H units of the hidden layer, T frames. All pointers are device memory.
// The frames of a channel of x lie side by side or, with `channels_last`, the channels of a frame;
// the other stride is `x_stride`, in values.
struct AttentiveStatsPoolFromHiddenParams {
  const void* x;       // (B, C, T) of `type`
  const void* hidden;  // (B, H, T) of `type`, any strides
  const void* weight;  // (C, H) of `type`, without gaps
  const void* bias;    // (C,) of `type`
  const int64_t*
      lengths;  // (B,) frames, read as the nearest of 0 to T; or null where all T are real
  float* mean;  // (B, C), as those below
  float* var;
  float* highest;
  float* total;
  int64_t batch;     // B
  int64_t channels;  // C
  int64_t units;     // H
  int64_t frames;    // T
  int64_t x_row_stride;
  int64_t x_stride;
  int64_t hidden_row_stride;
  int64_t unit_stride;
  int64_t frame_stride;  // of hidden
  FloatType type;
  bool channels_last;
};

// One launch. Returns cudaErrorInvalidValue, launching nothing, for sizes that do not fit a grid.
cudaError_t launch_attentive_stats_pool_from_hidden(
    const AttentiveStatsPoolFromHiddenParams& params, cudaStream_t stream);

}  // namespace spkfast
