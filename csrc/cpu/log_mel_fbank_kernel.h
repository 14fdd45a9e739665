// Log-mel filterbank over raw pointers: free of torch, so that other callers and sanitizer builds
// can use it alone.
#pragma once

#include <cstdint>
#include <vector>

namespace spkfast::cpu {

struct LogMelFbankParams {
  const float* waveforms;  // (B, S), contiguous
  const int64_t* lengths;  // (B,), each in [0, S]
  const float* window;     // (L,)
  const float* mel;        // (M, fft_size / 2 + 1)
  float* features;         // (B, T, M)
  int64_t* frame_lengths;  // (B,)
  int64_t batch;
  int64_t samples;
  int64_t frames;
  int64_t frame_length;
  int64_t frame_shift;
  int64_t fft_size;
  int64_t mels;
  float sample_scale;
  float preemphasis;
  bool remove_dc;
  float log_floor;
  bool mean_norm;
};

class LogMelFbank {
 public:
  // Frames that are computed together, one per vector lane: as many as every x86-64 and Arm
  // register holds. Twice as many is slower, since GCC keeps wider vectors in memory.
  static constexpr int64_t kLanes = 4;
  using Lanes [[gnu::vector_size(kLanes * sizeof(float))]] = float;

  explicit LogMelFbank(const LogMelFbankParams& params);

  int64_t tiles() const { return params_.batch * tiles_per_row_; }
  // Log energies of the tiles [begin, end); tiles are independent of one another.
  void compute(int64_t begin, int64_t end) const;
  // Subtracts the mean over an utterance's frames, for the utterances [begin, end).
  void normalize(int64_t begin, int64_t end) const;

 private:
  struct Filter {
    int64_t first, last;  // bins with weight, half open
  };

  void load(int64_t row, int64_t frame, int64_t count, Lanes* frames) const;
  void power(const Lanes* frames, Lanes* re, Lanes* im, Lanes* energies) const;
  void write(int64_t row, int64_t frame, int64_t count, const Lanes* energies) const;

  LogMelFbankParams params_;
  int64_t tiles_per_row_;
  std::vector<Filter> filters_;
  std::vector<int32_t> reversed_;       // bit reversal of fft_size / 2 points
  std::vector<float> cosines_, sines_;  // of 2 pi k / fft_size, k < fft_size / 2
};

}  // namespace spkfast::cpu
