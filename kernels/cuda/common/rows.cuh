// Rows of values that lie side by side, four to a thread at a time, at any alignment.
#pragma once

#include <cstdint>

#include "convert.cuh"

namespace spkfast {

constexpr int kPackFrames = 4;
constexpr int kRowLanes = 8;  // that share a row: what they read at once is a line of the cache
constexpr int kGroupFrames = kRowLanes * kPackFrames;

// How many values of a row one instruction may move, 4, 2 or 1, for any row of such strides.
inline int pack_width(const void* pointer, int64_t row_stride, int64_t stride, int64_t size,
                      int64_t bytes) {
  int width = kPackFrames;
  while (reinterpret_cast<uintptr_t>(pointer) % (width * bytes) || row_stride % width ||
         stride % width || size % width) {
    width /= 2;
  }
  return width;
}

// Four values from each `first + g kGroupFrames`, of those before `end`; zeros past it.
template <typename T, int kGroups>
__device__ __forceinline__ void load_row(const T* row, int first, int end, int width,
                                         Pack<T, kPackFrames> (&out)[kGroups]) {
  SPKFAST_UNROLL
  for (int g = 0; g < kGroups; ++g) out[g] = {};
  if (width == 4) {
    SPKFAST_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int t = first + g * kGroupFrames;
      if (t < end) out[g] = *reinterpret_cast<const Pack<T, 4>*>(row + t);
    }
  } else if (width == 2) {
    constexpr int kWords = sizeof(Pack<T, 2>) / 4;
    SPKFAST_UNROLL
    for (int i = 0; i < 2 * kGroups; ++i) {
      const int t = first + i / 2 * kGroupFrames + i % 2 * 2;
      if (t >= end) continue;
      const auto pair = *reinterpret_cast<const Pack<T, 2>*>(row + t);
      SPKFAST_UNROLL
      for (int k = 0; k < kWords; ++k) out[i / 2].words[i % 2 * kWords + k] = pair.words[k];
    }
  } else {
    SPKFAST_UNROLL
    for (int i = 0; i < 4 * kGroups; ++i) {
      const int t = first + i / 4 * kGroupFrames + i % 4;
      if (t < end) out[i / 4].set(i % 4, row[t]);
    }
  }
}

// Those of four values from `first` on that lie before `end`.
template <typename T>
__device__ __forceinline__ void store_row(T* row, int first, int end, int width,
                                          const float (&values)[kPackFrames]) {
  if (width == 1) {
    SPKFAST_UNROLL
    for (int i = 0; i < kPackFrames; ++i) {
      if (first + i < end) row[first + i] = from_float<T>(values[i]);
    }
    return;
  }
  Pack<T, 4> rounded = {};
  SPKFAST_UNROLL
  for (int i = 0; i < kPackFrames; ++i) rounded.set(i, from_float<T>(values[i]));
  if (width == 4) {
    if (first < end) *reinterpret_cast<Pack<T, 4>*>(row + first) = rounded;
    return;
  }
  constexpr int kWords = sizeof(Pack<T, 2>) / 4;
  SPKFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    Pack<T, 2> pair;
    SPKFAST_UNROLL
    for (int k = 0; k < kWords; ++k) pair.words[k] = rounded.words[i * kWords + k];
    if (first + 2 * i < end) *reinterpret_cast<Pack<T, 2>*>(row + first + 2 * i) = pair;
  }
}

}  // namespace spkfast
