// Front-end of one FrontendSpec on the CPU, over raw pointers: free of torch, so that the streaming
// class and sanitizer builds can use it alone.
#pragma once

#include <cstdint>
#include <vector>

#include "../log_mel_fbank_settings.h"
#include "cpu_level.h"
#include "log_mel_fbank_plan.h"
#include "parallel_for.h"

namespace spkfast::cpu {

// Scratch memory of a thread, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(floats + 16) {}
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64 / sizeof(float);
  }

 private:
  std::vector<float> memory_;
};

struct LogMelFbankTables {
  const float* window;  // (frame_length,)
  int64_t frame_length;
  const float* mel;  // (num_mels, fft_size / 2 + 1)
  int64_t num_mels;
  const float* cosines;  // (num_cosines, num_mels), or null
  int64_t num_cosines;
};

// Tables and plan, made once for a spec.
class LogMelFbank {
 public:
  LogMelFbank(const LogMelFbankSettings& settings, const LogMelFbankTables& tables, Level level);
  LogMelFbank(const LogMelFbank&) = delete;
  LogMelFbank& operator=(const LogMelFbank&) = delete;

  // Whether it was made for these.
  bool is_for(const LogMelFbankSettings& settings, const LogMelFbankTables& tables,
              Level level) const;

  const LogMelFbankSettings& settings() const { return settings_; }
  const LogMelFbankPlan& plan() const { return plan_; }
  // Frames that are computed together.
  int64_t lanes() const { return kernel_->lanes; }
  // Floats of scratch memory for compute.
  int64_t workspace() const;
  // As LogMelFbankKernel::tile.
  bool compute(const LogMelFbankRow& row, int64_t first, int64_t count, float* out, double* sums,
               float* highest, float* workspace) const;
  // As LogMelFbankKernel::moments.
  void moments(const LogMelFbankRow& row, double* mean, double* variance) const {
    kernel_->moments(row, mean, variance);
  }
  // As LogMelFbankKernel::finish.
  void finish(float* features, int64_t count, double* sums, float highest) const {
    kernel_->finish(plan_, features, count, sums, highest);
  }

 private:
  void plan_transform();
  void plan_frames();
  bool goes_by_frames() const { return plan_.frame_twiddles && frame_kernel_->frame; }
  void plan_filters();

  LogMelFbankSettings settings_;
  Level level_;
  const LogMelFbankKernel *kernel_, *frame_kernel_;
  std::vector<float> window_, mel_, cosines_;  // as given
  std::vector<float> taper_, twiddles_, split_cosines_, split_sines_, frame_twiddles_, weights_;
  std::vector<FftPass> passes_;
  std::vector<int32_t> positions_;
  std::vector<MelFilter> filters_;
  LogMelFbankPlan plan_;
};

// A padded batch. Exactly one of `floats` and `shorts` (batch, samples) is not null.
struct LogMelFbankBatch {
  const float* floats;
  const int16_t* shorts;
  const int64_t* lengths;  // (batch,), each in [0, samples]
  const int64_t* seeds;    // (batch,), or null for no dither
  const int64_t* masks;    // (batch, num_masks, 4), or null
  int64_t num_masks;
  float* features;         // (batch, frames, size)
  int64_t* frame_lengths;  // (batch,)
  int64_t batch, samples, frames;
};

// Computes all of `features` and `frame_lengths`. Returns the first row with a NaN or infinite
// sample, or -1.
int64_t run_log_mel_fbank(const LogMelFbank& fbank, const LogMelFbankBatch& batch,
                          const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
