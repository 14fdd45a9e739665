// Sums over a warp and over a block.
#pragma once

#include "platform.cuh"

namespace spkfast {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Every lane of the warp gets the sum, added in the same order by each.
__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullMask, value, distance);
  }
  return value;
}

// Every thread gets the sum. `scratch` holds one float per warp; the block is one-dimensional and a
// multiple of the warp size.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += scratch[warp];
  __syncthreads();  // The caller may reuse scratch at once.
  return total;
}

}  // namespace spkfast
