// What log_mel_fbank checks on every device.
#pragma once

#include "checks.h"

namespace spkfast {

inline void check_log_mel_fbank(const torch::stable::Tensor& waveforms,
                                const torch::stable::Tensor& lengths,
                                const torch::stable::Tensor& window,
                                const torch::stable::Tensor& mel, int64_t frame_shift,
                                int64_t fft_size) {
  using torch::headeronly::ScalarType;
  check_shape("waveforms", waveforms, {-1, -1});
  check_shape("lengths", lengths, {waveforms.size(0)});
  check_shape("window", window, {-1});
  check_shape("mel", mel, {-1, fft_size / 2 + 1});
  check_dtype("waveforms", waveforms, ScalarType::Float);
  check_dtype("lengths", lengths, ScalarType::Long);
  check_dtype("window", window, ScalarType::Float);
  check_dtype("mel", mel, ScalarType::Float);
  check(frame_shift > 0, "frame_shift must be positive, got ", frame_shift);
  check(fft_size >= 2 && (fft_size & (fft_size - 1)) == 0, "fft_size must be a power of two, got ",
        fft_size);
  check(window.size(0) >= 1 && window.size(0) <= fft_size,
        "window must have 1 to fft_size = ", fft_size, " samples, got ", window.size(0));
}

}  // namespace spkfast
