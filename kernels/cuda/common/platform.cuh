// The spellings that differ between nvcc and the host build of the same source (tests/simt).
#pragma once

#ifdef SPKFAST_SIMT
#include "simt.h"
#define SPKFAST_UNROLL
#define SPKFAST_UNROLL_4
#define SPKFAST_NO_UNROLL
#else
#include <cuda_runtime.h>

#define SPKFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SPKFAST_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#define SPKFAST_UNROLL _Pragma("unroll")
#define SPKFAST_UNROLL_4 _Pragma("unroll 4")
#define SPKFAST_NO_UNROLL _Pragma("unroll 1")
#endif

#if defined(__CUDACC__) || defined(SPKFAST_SIMT)
namespace spkfast {

// Within 2^-21 for x around 1; not for subnormal x, which __log2f spends instructions on.
__device__ __forceinline__ float approximate_log2(float x) {
#ifdef SPKFAST_SIMT
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Within two units in the last place, and 0 where the result would be subnormal.
__device__ __forceinline__ float approximate_exp2(float x) {
#ifdef SPKFAST_SIMT
  return x < -126 ? 0.0f : std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace spkfast
#endif
