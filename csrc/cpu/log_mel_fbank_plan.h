// Plain data that the kernels of log_mel_fbank read: no library types, so that a unit compiled for
// one instruction set holds nothing that the linker could share with another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spkfast::cpu {

// One pass of the FFT: blocks of radix * stride points, each split into `radix` of `stride` points.
struct FftPass {
  int64_t radix, stride, blocks;
  const float*
      twiddles;  // [stride][radix - 1][2]; for a general radix, its roots [radix][2] come first
};

struct MelFilter {
  int32_t first;    // bin
  int32_t count;    // of weights, a multiple of kMelUnroll
  int64_t weights;  // position in `weights`
};
constexpr int64_t kMelUnroll = 4;  // power spectra are read this far past their end, times zero

struct LogMelFbankPlan {
  int64_t frame_shift, frame_length, fft_size, points, offset, padding, preemphasis_mode;
  int64_t num_mels, num_cosines, size;  // size of a feature vector
  int64_t energy;                       // 0 none, 1 raw, 2 windowed
  bool remove_dc, magnitude, clip, has_cosines, energy_last, mean_norm, std_norm, std_unbiased;
  float preemphasis, dither, spectrum_low, spectrum_high, energy_floor, energy_scale;
  float log_floor, log_offset, log_scale, top_db;
  double var_eps, std_eps;
  const float* window;  // (frame_length,), halved where two real points are one complex point
  const FftPass* passes;
  int64_t num_passes, largest_radix;
  const float *split_cosines, *split_sines;  // [points / 2 + 1] and more: of 2 pi k / fft_size
  const int32_t* positions;                  // [points]: where the transform leaves point k
  const MelFilter* filters;                  // [num_mels]
  const float* weights;
  const float* cosines;  // (num_cosines, num_mels)
  // Of the first pass, for single frames: [7][2][points / 8 rounded up to kFrameLanes]; null where
  // they go by tiles.
  const float* frame_twiddles;
};
constexpr int64_t kFrameLanes = 8;

// One utterance. The signal is (samples - mean) * gain.
struct LogMelFbankRow {
  const float* floats;
  const int16_t* shorts;  // one of the two is null
  int64_t length;
  float mean, gain;
  bool noisy;
  uint64_t seed;
};

// What an instruction set offers.
struct LogMelFbankKernel {
  int64_t lanes;  // frames of a tile
  // Floats of scratch memory, aligned to 64 bytes.
  int64_t (*workspace)(const LogMelFbankPlan& plan);
  // Features of `count` <= lanes frames, the first of which starts at sample `first`, into out
  // (count, size), before everything that is of the whole utterance. Adds the columns of all frames
  // to `sums` (size,) and raises `highest` to the largest value, each where not null. False where a
  // sample is NaN or infinite.
  bool (*tile)(const LogMelFbankPlan& plan, const LogMelFbankRow& row, int64_t first, int64_t count,
               float* out, double* sums, float* highest, float* workspace);
  // One frame, the same to the last bit as in a tile of `lanes`; null where there is no such
  // kernel.
  int64_t (*frame_workspace)(const LogMelFbankPlan& plan);
  bool (*frame)(const LogMelFbankPlan& plan, const LogMelFbankRow& row, int64_t first,
                int64_t lanes, float* out, float* workspace);
  // Mean and biased variance of the samples of an utterance, as they are stored.
  void (*moments)(const LogMelFbankRow& row, double* mean, double* variance);
  // Floor, mean and deviation of `count` frames; `sums` and `highest` are those of all their tiles.
  void (*finish)(const LogMelFbankPlan& plan, float* features, int64_t count, double* sums,
                 float highest);
};

const LogMelFbankKernel& log_mel_fbank_scalar();
const LogMelFbankKernel& log_mel_fbank_avx2();
const LogMelFbankKernel& log_mel_fbank_avx512();

}  // namespace spkfast::cpu
