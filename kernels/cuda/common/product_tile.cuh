// A tile of frames times a weight: operands in shared memory, sums in registers.
//
// Operands are rounded to the type of the products on their way into shared memory and are float
// there; sums are float. Each sum adds up in the order of the weight's rows, whichever tile a frame
// is in: a row gives the same bits whatever it is padded to, batched with or cut into.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "rows.cuh"

namespace spkfast {

constexpr int kTileChannels = 64;
constexpr int kTileDepth = 16;  // inputs that are in shared memory at once
constexpr int kOwnFrames = 8;   // of a thread
constexpr int kOwnChannels = 4;
constexpr int kChannelLanes = kTileChannels / kOwnChannels;
static_assert(kOwnChannels == kPackFrames, "a thread stores its channels of a frame as one pack");

template <int kThreads>
struct alignas(16) ProductTile {
  static constexpr int kFrames = kThreads / kChannelLanes * kOwnFrames;
  static constexpr int kStride = kFrames + 4;  // which spreads inputs over the banks
  float frames[kTileDepth * kStride];
  float weights[kTileDepth * kTileChannels];
  int sources[kFrames];  // that stand at the tile's frames; negative: zeros
};

// Sums of the frames `own_frame()` to `+ kOwnFrames` and channels `own_channel()` to
// `+ kOwnChannels` of the tile.
using ProductSums = float[kOwnFrames][kOwnChannels];

__device__ __forceinline__ int own_frame() {
  return static_cast<int>(threadIdx.x) / kChannelLanes * kOwnFrames;
}
__device__ __forceinline__ int own_channel() {
  return static_cast<int>(threadIdx.x) % kChannelLanes * kOwnChannels;
}

// The real frame to read for frame `at` of a row of `length`; -1 where zeros are read.
__device__ __forceinline__ int64_t source_of(int64_t at, int64_t length, bool reflect) {
  if (at >= 0 && at < length) return at;
  if (!reflect) return -1;
  const int64_t period = length > 1 ? 2 * length - 2 : 1;
  at %= period;
  if (at < 0) at += period;
  return at < period - at ? at : period - at;
}

// What stands at the tile's frames from `first` on for a tap `shift` frames away, counted from
// frame `origin`; zeros from `end` on. No barrier is needed before: sources are read between the
// two of multiply.
template <int kThreads>
__device__ __forceinline__ void find_sources(ProductTile<kThreads>& tile, int first, int end,
                                             int64_t shift, int length, bool reflect,
                                             int64_t origin = 0) {
  for (int t = static_cast<int>(threadIdx.x); t < tile.kFrames; t += kThreads) {
    const int64_t found = first + t < end ? source_of(first + t + shift, length, reflect) : -1;
    tile.sources[t] = found < 0 ? -1 : static_cast<int>(found - origin);
  }
}

// Inputs `depth` to `+ kTileDepth` of the tile's sources; zeros past the last input.
template <typename O, int kThreads, typename T>
__device__ __forceinline__ void stage_frames(ProductTile<kThreads>& tile, const T* values,
                                             int64_t frame_stride, int depth, int inputs) {
  // Neighbouring threads read neighbouring inputs.
  const int k = static_cast<int>(threadIdx.x) % kTileDepth;
  const int t = static_cast<int>(threadIdx.x) / kTileDepth;
  SPKFAST_UNROLL
  for (int n = 0; n < tile.kFrames * kTileDepth / kThreads; ++n) {
    const int at = t + n * (kThreads / kTileDepth), source = tile.sources[at];
    const bool exists = source >= 0 && depth + k < inputs;
    const float value = exists ? to_float(values[source * frame_stride + depth + k]) : 0.0f;
    tile.frames[k * tile.kStride + at] = to_float(from_float<O>(value));
  }
}

// Adds the product of `inputs` inputs with as many rows of a weight (rows, channels), of which the
// tile has the channels from `channel` on. `stage(depth)` calls stage_frames.
template <int kThreads, typename O, typename Stage>
__device__ __forceinline__ void multiply(ProductTile<kThreads>& tile, int inputs, const O* weight,
                                         int channels, int channel, const Stage& stage,
                                         ProductSums& sums) {
  constexpr int kSteps = kThreads / kTileChannels;
  const int thread = static_cast<int>(threadIdx.x);
  const int c = thread % kTileChannels, row = thread / kTileChannels;
  SPKFAST_NO_UNROLL
  for (int depth = 0; depth < inputs; depth += kTileDepth) {
    __syncthreads();
    stage(depth);
    SPKFAST_UNROLL
    for (int n = 0; n < kTileDepth / kSteps; ++n) {
      const int k = depth + row + n * kSteps;
      const bool exists = k < inputs && channel + c < channels;
      tile.weights[(row + n * kSteps) * kTileChannels + c] =
          exists ? to_float(weight[int64_t{k} * channels + channel + c]) : 0.0f;
    }
    __syncthreads();
    SPKFAST_UNROLL_4
    for (int k = 0; k < kTileDepth; ++k) {
      const float4 four =
          *reinterpret_cast<const float4*>(tile.weights + k * kTileChannels + own_channel());
      const float factors[kOwnChannels] = {four.x, four.y, four.z, four.w};
      SPKFAST_UNROLL
      for (int half = 0; half < kOwnFrames / 4; ++half) {
        const float4 values = *reinterpret_cast<const float4*>(tile.frames + k * tile.kStride +
                                                               own_frame() + 4 * half);
        const float frames[4] = {values.x, values.y, values.z, values.w};
        SPKFAST_UNROLL
        for (int t = 0; t < 4; ++t) {
          SPKFAST_UNROLL
          for (int n = 0; n < kOwnChannels; ++n) {
            sums[4 * half + t][n] = fmaf(frames[t], factors[n], sums[4 * half + t][n]);
          }
        }
      }
    }
  }
}

// What follows the sums of a layer.
struct ProductEnd {
  const float* vectors;  // (4, N): bias, scale, shift and one that is for bytes
  const float* offset;   // (N,), added to the bias, or null
  bool relu, affine, tanh;
};

__device__ __forceinline__ void finish(const ProductEnd& end, int channels, int channel,
                                       ProductSums& sums) {
  SPKFAST_UNROLL
  for (int n = 0; n < kOwnChannels; ++n) {
    const int c = channel + own_channel() + n;
    if (c >= channels) continue;
    const float bias = end.vectors[c] + (end.offset ? end.offset[c] : 0.0f);
    const float scale = end.affine ? end.vectors[channels + c] : 1.0f;
    const float shift = end.affine ? end.vectors[2 * int64_t{channels} + c] : 0.0f;
    SPKFAST_UNROLL
    for (int t = 0; t < kOwnFrames; ++t) {
      float value = sums[t][n] + bias;
      if (end.relu) value = value < 0 ? 0.0f : value;  // fmaxf would lose a NaN.
      if (end.affine) value = fmaf(value, scale, shift);
      if (end.tanh) value = tanhf(value);
      sums[t][n] = value;
    }
  }
}

}  // namespace spkfast
