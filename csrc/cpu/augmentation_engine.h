// Augmentation of the rows of a batch, over raw pointers; rows go to threads.
#pragma once

#include <cstdint>
#include <vector>

#include "augmentation_kernel.h"
#include "cpu_level.h"
#include "parallel_for.h"

namespace spkfast::cpu {

// Recordings one after the other, and what each row takes of them: see the definitions in
// spkfast/reference. Every begin and size lies inside.
struct Recordings {
  Samples samples;
  const int64_t *begins, *sizes;
};

struct SpeedFilter {
  int64_t p, q, half;
  const float* weights;  // (q, 2 half + 1)
};

struct SpeedBatch {
  Samples x;  // (batch, samples)
  const int64_t *lengths, *which;
  float* out;  // (batch, outputs)
  int64_t batch, samples, context, outputs;
};

struct ReverberationBatch {
  Samples x;  // (batch, samples)
  Recordings responses;
  const float* gains;
  float* out;
  int64_t batch, samples, longest;
};

struct NoiseBatch {
  Samples x;               // (batch, samples)
  Recordings noises;       // (batch, each)
  const int64_t* offsets;  // (batch, each), 0 to the size and less
  const float* snr_db;     // (batch, each)
  double power_floor;
  float* out;
  int64_t batch, samples, each;
};

void run_change_speed(const SpeedBatch& batch, const std::vector<SpeedFilter>& filters, Level level,
                      const ParallelFor& parallel_for);
void run_reverberate(const ReverberationBatch& batch, Level level, const ParallelFor& parallel_for);
void run_add_noise(const NoiseBatch& batch, Level level, const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
