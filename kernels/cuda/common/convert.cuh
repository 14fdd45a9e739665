// Output types: values are computed in float and rounded once, where they are stored.
#pragma once

#include <cstdint>

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
#endif

}  // namespace spkfast
