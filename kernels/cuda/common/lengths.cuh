// Real frames of the rows of a padded batch.
#pragma once

#include <cstdint>

#include "platform.cuh"

namespace spkfast {

// Real frames of a row, within the row whatever `lengths` holds.
__device__ __forceinline__ int clamped_length(const int64_t* lengths, int64_t row, int64_t frames) {
  if (!lengths) return static_cast<int>(frames);
  const int64_t length = lengths[row];
  return static_cast<int>(length < 0 ? 0 : length < frames ? length : frames);
}

}  // namespace spkfast
