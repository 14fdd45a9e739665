// A launch of log_mel_fbank in numbers that every block needs.
#pragma once

#include "log_mel_fbank.cuh"

namespace spkfast {
namespace {

// The part of a filter that is not zero, and where its weights are in shared memory.
struct __align__(16) Band {
  int first, end, offset, unused;
};

// A launch in numbers that every block needs. Shared memory is laid out in floats.
struct Plan {
  LogMelFbankParams p;
  int half, bins, columns;
  unsigned long long bins_inverse;  // 2^32 / bins, rounded up
  int tile_frames, tile_bits;       // frames per tile, a power of two
  int tiles;                        // per utterance
  int stat_frames, stat_rows;       // frames per row of statistics, rows per utterance
  int stat_planes;       // 0; 1: sum, or maximum where there is a top_db; 2: and centred squares
  int segments, groups;  // of frames and of columns, in the second kernel
  bool shapes_spectrum, normalizes, limits;
  float energy_low, energy_high;  // bounds on what filters give, that of the logarithm included
  float frame_preemphasis, signal_preemphasis;  // one of them is 0
  float2* waveform_stats;                       // (B,) factor and offset of the samples
  float* stats;                                 // (B, stat_rows, stat_planes, D)
  float* raw;                                   // (B, T, D) features before normalisation
  unsigned long long digits;  // radices of the transform, first pass in the lowest 4 bits
  int power_stride, mel_stride, column_stride, weight_capacity;
  int window, twiddles, split, order, bands, weights, edges, energies, power, tile, buffers, size;
};

__host__ __device__ __forceinline__ int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Unlike fmaxf, these let NaN through.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// A length outside 0 to S would read out of bounds.
__device__ __forceinline__ int clamped_length(const LogMelFbankParams& p, int64_t utterance) {
  return static_cast<int>(min(max(p.lengths[utterance], int64_t{0}), p.num_samples));
}

__device__ __forceinline__ int count_frames(const LogMelFbankParams& p, int samples) {
  if (samples < max(1, p.first_frame)) return 0;
  return (samples - p.first_frame) / p.frame_shift + 1;
}

}  // namespace
}  // namespace spkfast
