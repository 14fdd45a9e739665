// Launcher of log_mel_fbank on CUDA: raw pointers in, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/platform.cuh"

namespace spkfast {

// Sizes: B utterances, S samples, L window samples, F = fft_size / 2 + 1 spectrum bins, M filters,
// C cepstra, N masks, T frames, D values per frame: C or M, and one more with energy. All pointers
// are device memory, arrays are contiguous. Settings are those of spkfast/frontend_tables.py.
struct LogMelFbankParams {
  const void* waveforms;   // (B, S) float, or int16_t where `is_int16`
  const int64_t* lengths;  // (B,) samples, 0 to S
  const float* window;     // (L,)
  const float* mel;        // (M, F)
  const float* cosines;    // (C, M), or null
  const int64_t* seeds;    // (B,), or null for no dither
  const int64_t* masks;    // (B, N, 4), or null
  void* features;          // (B, T, D) of `type`, every element is written
  int64_t* frame_lengths;  // (B,) frames
  float* workspace;        // log_mel_fbank_workspace() floats, 16-byte aligned; need not be set
  int64_t batch;           // B
  int64_t num_samples;     // S
  int64_t num_frames;      // T, a multiple of frame_multiple
  int64_t num_masks;       // N
  int32_t frame_length;    // L
  int32_t num_mels;        // M
  int32_t num_cosines;     // C
  int32_t frame_shift;
  int32_t fft_size;
  int32_t first_frame;
  int32_t offset;
  int32_t padding;
  int32_t waveform_norm;
  int32_t preemphasis_mode;
  int32_t energy;
  FloatType type;
  float sample_scale;
  float preemphasis;
  float spectrum_low;
  float spectrum_high;
  float energy_floor;
  float log_floor;
  float log_offset;
  float log_scale;
  float top_db;
  float var_eps;
  float std_eps;
  float dither;
  bool is_int16;
  bool remove_dc;
  bool magnitude;
  bool energy_last;
  bool mean_norm;
  bool std_norm;
  bool std_unbiased;
};

constexpr int64_t kMaxLogMelFbankFftSize = 2048;
constexpr int64_t kMaxLogMelFbankRows = 1025;
constexpr int64_t kMaxLogMelFbankSamples = int64_t{1} << 30;

// Which settings the kernels take: FFT sizes that are twice a product of 2, 3 and 5, hops that are
// no longer, and so many rows of `mel` and of `cosines` that the tables fit into shared memory.
constexpr bool log_mel_fbank_takes(int64_t fft_size, int64_t frame_shift, int64_t num_mels,
                                   int64_t num_cosines) {
  if (fft_size < 2 || fft_size > kMaxLogMelFbankFftSize || fft_size % 2 != 0) return false;
  int64_t rest = fft_size / 2;
  for (int64_t prime : {2, 3, 5}) {
    while (rest % prime == 0) rest /= prime;
  }
  return rest == 1 && frame_shift >= 1 && frame_shift <= fft_size && num_mels >= 1 &&
         num_mels <= kMaxLogMelFbankRows && num_cosines <= kMaxLogMelFbankRows;
}

// Floats of workspace that the launch needs on the current device; may be 0.
cudaError_t log_mel_fbank_workspace(const LogMelFbankParams& params, size_t& floats);

// What a block of the main kernel takes on the current device, for tests.
struct LogMelFbankBudget {
  size_t shared_bytes;
  int32_t tile_frames;
  bool general;  // not one of the transforms that are compiled for their size
};
cudaError_t log_mel_fbank_budget(const LogMelFbankParams& params, LogMelFbankBudget& budget);

// One launch, one more where features are normalised over the utterance, and one where the waveform
// is. Returns cudaErrorInvalidValue, launching nothing, for sizes that the kernels cannot take.
cudaError_t launch_log_mel_fbank(const LogMelFbankParams& params, cudaStream_t stream);

}  // namespace spkfast
