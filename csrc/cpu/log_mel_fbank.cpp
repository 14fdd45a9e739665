// CPU kernel of log_mel_fbank: tensors checked, then handed to the kernel as raw pointers.
#include "../log_mel_fbank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "log_mel_fbank_kernel.h"

namespace spkfast::cpu {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> log_mel_fbank(const Tensor& waveforms, const Tensor& lengths,
                                         const Tensor& window, const Tensor& mel,
                                         int64_t frame_shift, int64_t fft_size, double sample_scale,
                                         double preemphasis, bool remove_dc, double log_floor,
                                         bool mean_norm) {
  check_log_mel_fbank(waveforms, lengths, window, mel, frame_shift, fft_size);
  const int64_t batch = waveforms.size(0), samples = waveforms.size(1);
  const int64_t frame_length = window.size(0), mels = mel.size(0);

  const Tensor x = torch::stable::contiguous(waveforms), n = torch::stable::contiguous(lengths);
  const Tensor taper = torch::stable::contiguous(window), filters = torch::stable::contiguous(mel);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = n.const_data_ptr<int64_t>()[b];
    check(length >= 0 && length <= samples, "lengths must lie in 0..", samples, ", row ", b,
          " has ", length);
  }
  const int64_t frames = samples < frame_length ? 0 : (samples - frame_length) / frame_shift + 1;
  Tensor features = torch::stable::new_empty(x, {batch, frames, mels});
  Tensor frame_lengths = torch::stable::new_empty(n, {batch});

  const LogMelFbank fbank({
      .waveforms = x.const_data_ptr<float>(),
      .lengths = n.const_data_ptr<int64_t>(),
      .window = taper.const_data_ptr<float>(),
      .mel = filters.const_data_ptr<float>(),
      .features = features.mutable_data_ptr<float>(),
      .frame_lengths = frame_lengths.mutable_data_ptr<int64_t>(),
      .batch = batch,
      .samples = samples,
      .frames = frames,
      .frame_length = frame_length,
      .frame_shift = frame_shift,
      .fft_size = fft_size,
      .mels = mels,
      .sample_scale = static_cast<float>(sample_scale),
      .preemphasis = static_cast<float>(preemphasis),
      .remove_dc = remove_dc,
      .log_floor = static_cast<float>(log_floor),
      .mean_norm = mean_norm,
  });
  torch::stable::parallel_for(0, fbank.tiles(), 4,
                              [&](int64_t begin, int64_t end) { fbank.compute(begin, end); });
  if (mean_norm) {
    torch::stable::parallel_for(0, batch, 4,
                                [&](int64_t begin, int64_t end) { fbank.normalize(begin, end); });
  }
  return {features, frame_lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) { m.impl("log_mel_fbank", TORCH_BOX(&log_mel_fbank)); }

}  // namespace spkfast::cpu
