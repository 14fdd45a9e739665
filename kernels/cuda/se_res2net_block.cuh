// Launcher of se_res2net_block on CUDA: raw pointers in, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/platform.cuh"

namespace spkfast {

constexpr int kMaxRes2Convolutions = 32;

struct SERes2NetLayer {
  const void* weight;    // (R, N), rows by tap, then channel
  const float* vectors;  // (4, N): bias, scale, shift, and one that is not read
};

// Sizes: B rows, C channels, T frames, G groups of channels, one more than there are convolutions.
// All pointers are device memory.
struct SERes2NetBlockParams {
  const void* x;           // (B, inputs, T) of `type`, channels side by side; strides in values
  const int64_t* padded;   // (B,) frames at whose ends is padded, read as the nearest of 0 to T; or
                           // null where that is T
  const int64_t* excited;  // (B,) frames whose mean the gates are made of, in the same way
  SERes2NetLayer in;       // weight of `multiplied`, as those below
  SERes2NetLayer out;
  SERes2NetLayer squeeze;   // (C, units) of float
  SERes2NetLayer excite;    // (units, C) of float
  SERes2NetLayer shortcut;  // without vectors: x itself is added
  SERes2NetLayer res[kMaxRes2Convolutions];
  void* y;           // (B, T, C) of `type`, without gaps
  float* workspace;  // as many floats as se_res2net_block_workspace says, aligned to 16 bytes
  int64_t batch;     // B
  int64_t inputs;    // C where there is no shortcut
  int64_t channels;  // C, a multiple of G
  int64_t units;
  int64_t frames;  // T
  int64_t row_stride;
  int64_t frame_stride;
  int64_t taps;  // odd
  int64_t dilation;
  int32_t convolutions;  // G - 1
  FloatType type;
  FloatType multiplied;  // what the inputs of the convolutions are rounded to
  bool reflect;          // What is read beyond a row's ends is mirrored, not 0.
  bool first_passes;     // The group that passes is the first, not the last.
};

// Both return cudaErrorInvalidValue for sizes that do not fit a grid, the second launching nothing.
cudaError_t se_res2net_block_workspace(const SERes2NetBlockParams& params, size_t& floats);
cudaError_t launch_se_res2net_block(const SERes2NetBlockParams& params, cudaStream_t stream);

}  // namespace spkfast
