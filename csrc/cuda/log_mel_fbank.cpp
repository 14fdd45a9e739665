// CUDA kernel of log_mel_fbank: tensors checked, then handed to the launcher as raw pointers.
#include <cuda_runtime_api.h>
// The CUDA runtime comes first: the torch macros below use its types.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../log_mel_fbank.h"
#include "launch.h"
#include "log_mel_fbank.cuh"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t narrow(const char* name, int64_t value) {
  check(
      value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
      name, " must fit 32 bits, got ", value);
  return static_cast<int32_t>(value);
}

std::tuple<Tensor, Tensor> log_mel_fbank(
    const Tensor& waveforms, const Tensor& lengths, const Tensor& window, const Tensor& mel,
    const std::optional<Tensor>& cosines, const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& masks, const std::vector<int64_t>& integers,
    const std::vector<double>& floats, ScalarType dtype, bool /*validate*/) {
  const LogMelFbankSettings s =
      check_log_mel_fbank(waveforms, lengths, window, mel, cosines, seeds, masks, integers, floats);
  const auto contiguous = [&](const Tensor* tensor) -> std::optional<Tensor> {
    if (!tensor) return std::nullopt;
    check(tensor->is_cuda() && tensor->get_device_index() == waveforms.get_device_index(),
          "all tensors must be on the device of waveforms");
    return torch::stable::contiguous(*tensor);
  };
  const auto given = [](const std::optional<Tensor>& tensor) {
    return tensor ? &*tensor : nullptr;
  };
  const torch::stable::accelerator::DeviceGuard guard(waveforms.get_device_index());
  const Tensor x = *contiguous(&waveforms), n = *contiguous(&lengths);
  const Tensor taper = *contiguous(&window), filters = *contiguous(&mel);
  const auto transform = contiguous(given(cosines)), noise = contiguous(given(seeds)),
             zeros = contiguous(given(masks));

  const int64_t batch = x.size(0), samples = x.size(1), mels = filters.size(0);
  const int64_t cepstra = transform ? transform->size(0) : 0;
  check(log_mel_fbank_takes(s.fft_size, s.frame_shift, mels, cepstra),
        "on CUDA, fft_size must be twice a product of 2, 3 and 5 and at most ",
        kMaxLogMelFbankFftSize, ", frame_shift no longer than that, and mel of 1 to ",
        kMaxLogMelFbankRows, " rows; got ", s.fft_size, ", ", s.frame_shift, " and ", mels);
  check(samples <= kMaxLogMelFbankSamples, "on CUDA, rows must have at most ",
        kMaxLogMelFbankSamples, " samples, got ", samples);
  const int64_t frames = s.padded_frames(samples);
  const int64_t columns = (transform ? cepstra : mels) + (s.energy ? 1 : 0);
  Tensor features = torch::stable::new_empty(x, {batch, frames, columns}, dtype);
  Tensor frame_lengths = torch::stable::new_empty(n, {batch});
  const bool is_int16 = x.scalar_type() == ScalarType::Short;

  LogMelFbankParams params = {
      .waveforms = is_int16 ? static_cast<const void*>(x.const_data_ptr<int16_t>())
                            : static_cast<const void*>(x.const_data_ptr<float>()),
      .lengths = n.const_data_ptr<int64_t>(),
      .window = taper.const_data_ptr<float>(),
      .mel = filters.const_data_ptr<float>(),
      // A transform without rows has no address, and yet is not none.
      .cosines = !transform           ? nullptr
                 : transform->size(0) ? transform->const_data_ptr<float>()
                                      : taper.const_data_ptr<float>(),
      .seeds = noise ? noise->const_data_ptr<int64_t>() : nullptr,
      .masks = zeros ? zeros->const_data_ptr<int64_t>() : nullptr,
      .features = features.mutable_data_ptr(),
      .frame_lengths = frame_lengths.mutable_data_ptr<int64_t>(),
      .workspace = nullptr,
      .batch = batch,
      .num_samples = samples,
      .num_frames = frames,
      .num_masks = zeros ? zeros->size(1) : 0,
      .frame_length = narrow("window", taper.size(0)),
      .num_mels = narrow("mel", mels),
      .num_cosines = narrow("cosines", cepstra),
      .frame_shift = narrow("frame_shift", s.frame_shift),
      .fft_size = narrow("fft_size", s.fft_size),
      .first_frame = narrow("first_frame", s.first_frame),
      .offset = narrow("offset", s.offset),
      .padding = narrow("padding", s.padding),
      .waveform_norm = narrow("waveform_norm", s.waveform_norm),
      .preemphasis_mode = narrow("preemphasis_mode", s.preemphasis_mode),
      .energy = narrow("energy", s.energy),
      .type = float_type("dtype", dtype),
      .sample_scale = static_cast<float>(s.sample_scale),
      .preemphasis = static_cast<float>(s.preemphasis),
      .spectrum_low = static_cast<float>(s.spectrum_low),
      .spectrum_high = static_cast<float>(s.spectrum_high),
      .energy_floor = static_cast<float>(s.energy_floor),
      .log_floor = static_cast<float>(s.log_floor),
      .log_offset = static_cast<float>(s.log_offset),
      .log_scale = static_cast<float>(s.log_scale),
      .top_db = static_cast<float>(s.top_db),
      .var_eps = static_cast<float>(s.var_eps),
      .std_eps = static_cast<float>(s.std_eps),
      .dither = static_cast<float>(s.dither),
      .is_int16 = is_int16,
      .remove_dc = s.remove_dc,
      .magnitude = s.magnitude,
      .energy_last = s.energy_last,
      .mean_norm = s.mean_norm,
      .std_norm = s.std_norm,
      .std_unbiased = s.std_unbiased,
  };
  size_t needed = 0;
  STD_CUDA_CHECK(log_mel_fbank_workspace(params, needed));
  std::optional<Tensor> workspace;
  if (needed > 0) {
    workspace = torch::stable::new_empty(x, {static_cast<int64_t>(needed)}, ScalarType::Float);
    params.workspace = workspace->mutable_data_ptr<float>();
  }
  STD_CUDA_CHECK(launch_log_mel_fbank(params, current_stream(x)));
  return {features, frame_lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) { m.impl("log_mel_fbank", TORCH_BOX(&log_mel_fbank)); }

}  // namespace spkfast::cuda
