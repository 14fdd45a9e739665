// Launcher of the log-mel filterbank on CUDA: raw pointers in, no torch.
#pragma once

#include <cstdint>

#include "common/platform.cuh"

namespace spkfast {

// Sizes: B utterances, S samples, L window samples, M mel bins, F = fft_size / 2 + 1 spectrum bins,
// T = frames of the longest utterance. All pointers are device memory, arrays are contiguous.
struct LogMelFbankParams {
  const float* waveforms;  // (B, S)
  const int64_t* lengths;  // (B,) samples, 0 to S
  const float* window;     // (L,)
  const float* mel;        // (M, F)
  float* features;         // (B, T, M), every element is written
  int64_t* frame_lengths;  // (B,) frames
  int32_t* mel_ranges;     // (M, 2) workspace: first and one past the last nonzero weight
  int64_t batch;           // B
  int64_t num_samples;     // S
  int64_t num_frames;      // T
  int32_t frame_length;    // L
  int32_t frame_shift;
  int32_t fft_size;  // a power of two, L to kMaxLogMelFbankFftSize
  int32_t num_mels;  // M
  float sample_scale;
  float preemphasis;
  float log_floor;
  bool remove_dc;
  bool mean_norm;
};

constexpr int32_t kMaxLogMelFbankFftSize = 2048;

// Returns cudaErrorInvalidValue, launching nothing, for sizes that the kernels cannot take.
cudaError_t launch_log_mel_fbank(const LogMelFbankParams& params, cudaStream_t stream);

}  // namespace spkfast
