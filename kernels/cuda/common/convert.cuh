// Types in memory: values are computed in float, and rounded once where they are stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.cuh"
#ifndef SPKFAST_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace spkfast {

enum class FloatType : int32_t { kFloat, kHalf, kBfloat16 };

#if defined(__CUDACC__) || defined(SPKFAST_SIMT)
__device__ __forceinline__ void store_as(FloatType type, void* array, int64_t index, float value) {
  if (type == FloatType::kFloat) {
    static_cast<float*>(array)[index] = value;
  } else if (type == FloatType::kHalf) {
    static_cast<__half*>(array)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(array)[index] = __float2bfloat16_rn(value);
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}

// Values that one instruction moves; their address must be a multiple of their size. Kept as words,
// so that a load need not be waited for before values are taken apart.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  static_assert(sizeof(T) * kCount % 4 == 0);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[kCount / kPerWord];

  __device__ __forceinline__ float get(int i) const {
    const uint32_t bits = words[i / kPerWord] >> (i % kPerWord * 16);
    T value;
    memcpy(&value, &bits, sizeof(T));
    return to_float(value);
  }
  // Where zeros are.
  __device__ __forceinline__ void set(int i, T value) {
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    words[i / kPerWord] |= bits << (i % kPerWord * 16);
  }
};
#endif

}  // namespace spkfast
