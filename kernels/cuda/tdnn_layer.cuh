// Launcher of tdnn_layer on CUDA: raw pointers in, no torch.
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "common/platform.cuh"

namespace spkfast {

constexpr int kMaxTdnnInputs = 16;

// (B, C, T) whose channels lie side by side; strides in values.
struct TdnnLayerInput {
  const void* values;
  int64_t row_stride;
  int64_t frame_stride;
  int64_t channels;
};

// Sizes: B rows, N output channels, T frames, R products per output. All pointers but those of
// `inputs` itself are device memory.
struct TdnnLayerParams {
  TdnnLayerInput inputs[kMaxTdnnInputs];  // of `type`
  const void* weight;      // (R, N) of `multiplied`, rows by input, then tap, then channel
  const float* vectors;    // (4, N): bias, scale, shift, and one that is not read
  const float* offset;     // (B, N), added to the bias, or null
  const int64_t* lengths;  // (B,) frames, read as the nearest of 0 to T; or null where all are real
  void* out;               // (B, T, N) of `out_type`, without gaps
  int64_t batch;           // B
  int64_t channels;        // N
  int64_t frames;          // T
  int64_t taps;            // odd
  int64_t dilation;
  int32_t num_inputs;
  FloatType type;
  FloatType multiplied;  // what inputs are rounded to
  FloatType out_type;
  bool reflect;  // What is read beyond a row's ends is mirrored, not 0.
  bool relu;
  bool affine;
  bool tanh;
};

// One launch. Returns cudaErrorInvalidValue, launching nothing, for sizes that do not fit a grid.
cudaError_t launch_tdnn_layer(const TdnnLayerParams& params, cudaStream_t stream);

}  // namespace spkfast
