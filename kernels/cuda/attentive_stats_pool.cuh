// Launchers of attentive_stats_pool and its gradient on CUDA: raw pointers in, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/platform.cuh"

namespace spkfast {

// Sizes: B rows, C channels, T frames. All pointers are device memory. Of x, and of logits that are
// not shared, either the frames of a channel lie side by side or, with `channels_last`, the
// channels of a frame; the other stride is `x_stride`, in values.
struct AttentiveStatsPoolInputs {
  const void* x;       // (B, C, T) of `type`
  const void* logits;  // (B, C, T) of `type`; (B, 1, T), frames side by side, where `shared`; or
                       // null for equal weights
  const int64_t*
      lengths;       // (B,) frames, read as the nearest of 0 to T; or null where all T are real
  int64_t batch;     // B
  int64_t channels;  // C
  int64_t frames;    // T
  int64_t x_row_stride;
  int64_t x_stride;
  int64_t logit_row_stride;
  int64_t logit_stride;  // not used where `shared`
  FloatType type;
  bool channels_last;
  bool shared;  // one row of logits, and of `highest` and `total`, for all channels; so without any
};

struct AttentiveStatsPoolParams {
  AttentiveStatsPoolInputs in;
  float* mean;     // (B, C)
  float* var;      // (B, C)
  float* highest;  // (B, C), or (B, 1) where `shared`
  float* total;    // as highest
};

struct AttentiveStatsPoolBackwardParams {
  AttentiveStatsPoolInputs in;
  const float* grad_mean;  // (B, C), as those below
  const float* grad_var;
  const float* mean;
  const float* var;
  const float* highest;  // (B, C), or (B, 1) where `shared`
  const float* total;
  // Of `type`, without gaps, at multiples of 16 bytes.
  void* grad_x;       // (B, C, T), or (B, T, C) with `channels_last`
  void* grad_logits;  // as grad_x, or (B, 1, T) where `shared`; null without logits
  float* workspace;   // attentive_stats_pool_backward_workspace() floats; need not be set
};

// One launch. Returns cudaErrorInvalidValue, launching nothing, for sizes that do not fit a grid.
cudaError_t launch_attentive_stats_pool(const AttentiveStatsPoolParams& params,
                                        cudaStream_t stream);

// Floats of workspace that the gradient needs; 0 but for shared logits.
size_t attentive_stats_pool_backward_workspace(const AttentiveStatsPoolInputs& in);

// One launch, and one more for shared logits; their gradient is summed over channels in an order
// that does not depend on the machine.
cudaError_t launch_attentive_stats_pool_backward(const AttentiveStatsPoolBackwardParams& params,
                                                 cudaStream_t stream);

}  // namespace spkfast
