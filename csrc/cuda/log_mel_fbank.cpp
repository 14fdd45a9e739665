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
#include <tuple>

#include "../log_mel_fbank.h"
#include "log_mel_fbank.cuh"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> log_mel_fbank(const Tensor& waveforms, const Tensor& lengths,
                                         const Tensor& window, const Tensor& mel,
                                         int64_t frame_shift, int64_t fft_size, double sample_scale,
                                         double preemphasis, bool remove_dc, double log_floor,
                                         bool mean_norm) {
  check_log_mel_fbank(waveforms, lengths, window, mel, frame_shift, fft_size);
  const int64_t batch = waveforms.size(0), samples = waveforms.size(1);
  for (const Tensor* tensor : {&lengths, &window, &mel}) {
    check(tensor->is_cuda() && tensor->get_device_index() == waveforms.get_device_index(),
          "lengths, window and mel must be on the device of waveforms");
  }
  const int64_t frame_length = window.size(0), mels = mel.size(0);
  check(frame_shift <= std::numeric_limits<int32_t>::max(), "frame_shift must fit 32 bits, got ",
        frame_shift);
  check(fft_size <= kMaxLogMelFbankFftSize, "fft_size must be at most ", kMaxLogMelFbankFftSize,
        " on CUDA, got ", fft_size);
  check(mels >= 1, "mel must have at least one row");

  const torch::stable::accelerator::DeviceGuard guard(waveforms.get_device_index());
  const Tensor x = torch::stable::contiguous(waveforms), n = torch::stable::contiguous(lengths);
  const Tensor taper = torch::stable::contiguous(window), filters = torch::stable::contiguous(mel);
  const int64_t frames = samples < frame_length ? 0 : (samples - frame_length) / frame_shift + 1;
  Tensor features = torch::stable::new_empty(x, {batch, frames, mels});
  Tensor frame_lengths = torch::stable::new_empty(n, {batch});
  Tensor ranges = torch::stable::new_empty(n, {mels, 2}, ScalarType::Int);

  const LogMelFbankParams params = {
      .waveforms = x.const_data_ptr<float>(),
      .lengths = n.const_data_ptr<int64_t>(),
      .window = taper.const_data_ptr<float>(),
      .mel = filters.const_data_ptr<float>(),
      .features = features.mutable_data_ptr<float>(),
      .frame_lengths = frame_lengths.mutable_data_ptr<int64_t>(),
      .mel_ranges = ranges.mutable_data_ptr<int32_t>(),
      .batch = batch,
      .num_samples = samples,
      .num_frames = frames,
      .frame_length = static_cast<int32_t>(frame_length),
      .frame_shift = static_cast<int32_t>(frame_shift),
      .fft_size = static_cast<int32_t>(fft_size),
      .num_mels = static_cast<int32_t>(mels),
      .sample_scale = static_cast<float>(sample_scale),
      .preemphasis = static_cast<float>(preemphasis),
      .log_floor = static_cast<float>(log_floor),
      .remove_dc = remove_dc,
      .mean_norm = mean_norm,
  };
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  STD_CUDA_CHECK(launch_log_mel_fbank(params, static_cast<cudaStream_t>(stream)));
  return {features, frame_lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) { m.impl("log_mel_fbank", TORCH_BOX(&log_mel_fbank)); }

}  // namespace spkfast::cuda
