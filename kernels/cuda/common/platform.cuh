// The two spellings that differ between nvcc and the host build of the same source (tests/simt).
#pragma once

#ifdef SPKFAST_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

#define SPKFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SPKFAST_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
