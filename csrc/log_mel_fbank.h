// What log_mel_fbank checks on every device.
#pragma once

#include <optional>
#include <vector>

#include "checks.h"
#include "log_mel_fbank_settings.h"

namespace spkfast {

// Checks everything but the values of `lengths`; returns the settings.
inline LogMelFbankSettings check_log_mel_fbank(const torch::stable::Tensor& waveforms,
                                               const torch::stable::Tensor& lengths,
                                               const torch::stable::Tensor& window,
                                               const torch::stable::Tensor& mel,
                                               const std::optional<torch::stable::Tensor>& cosines,
                                               const std::optional<torch::stable::Tensor>& seeds,
                                               const std::optional<torch::stable::Tensor>& masks,
                                               const std::vector<int64_t>& integers,
                                               const std::vector<double>& floats) {
  using torch::headeronly::ScalarType;
  check(integers.size() == LogMelFbankSettings::kIntegers, "integers must have ",
        LogMelFbankSettings::kIntegers, " values, got ", integers.size());
  check(floats.size() == LogMelFbankSettings::kFloats, "floats must have ",
        LogMelFbankSettings::kFloats, " values, got ", floats.size());
  const LogMelFbankSettings settings(integers.data(), floats.data());
  check(settings.frame_shift > 0, "frame_shift must be positive, got ", settings.frame_shift);
  check(settings.frame_multiple > 0, "frame_multiple must be positive, got ",
        settings.frame_multiple);
  check_shape("waveforms", waveforms, {-1, -1});
  check(
      waveforms.scalar_type() == ScalarType::Float || waveforms.scalar_type() == ScalarType::Short,
      "waveforms must be Float or Short, got ",
      torch::headeronly::toString(waveforms.scalar_type()));
  check_shape("lengths", lengths, {waveforms.size(0)});
  check_dtype("lengths", lengths, ScalarType::Long);
  check_shape("window", window, {-1});
  check_dtype("window", window, ScalarType::Float);
  check(window.size(0) >= 1 && window.size(0) <= settings.fft_size,
        "window must have 1 to fft_size = ", settings.fft_size, " samples, got ", window.size(0));
  check_shape("mel", mel, {-1, settings.fft_size / 2 + 1});
  check_dtype("mel", mel, ScalarType::Float);
  if (cosines) {
    check_shape("cosines", *cosines, {-1, mel.size(0)});
    check_dtype("cosines", *cosines, ScalarType::Float);
  }
  if (seeds) {
    check_shape("seeds", *seeds, {waveforms.size(0)});
    check_dtype("seeds", *seeds, ScalarType::Long);
  }
  if (masks) {
    check_shape("masks", *masks, {waveforms.size(0), -1, 4});
    check_dtype("masks", *masks, ScalarType::Long);
  }
  return settings;
}

}  // namespace spkfast
