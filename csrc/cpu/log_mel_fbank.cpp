// CPU kernel of log_mel_fbank: tensors checked, then handed to the engine as raw pointers.
#include "../log_mel_fbank.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <list>
#include <memory>
#include <mutex>
#include <tuple>

#include "log_mel_fbank_engine.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The plan for these tables; the last few stay, since making one costs as much as a second of
// audio.
std::shared_ptr<const LogMelFbank> cached(const LogMelFbankSettings& settings,
                                          const LogMelFbankTables& tables) {
  constexpr size_t kKept = 16;
  static std::mutex mutex;
  static std::list<std::shared_ptr<const LogMelFbank>> kept;
  const Level wanted = level();
  const std::lock_guard lock(mutex);
  for (auto at = kept.begin(); at != kept.end(); ++at) {
    if (!(*at)->is_for(settings, tables, wanted)) continue;
    kept.splice(kept.begin(), kept, at);
    return kept.front();
  }
  kept.push_front(std::make_shared<const LogMelFbank>(settings, tables, wanted));
  if (kept.size() > kKept) kept.pop_back();
  return kept.front();
}

Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(dtype),
      torch::stable::detail::from(false), torch::stable::detail::from(false),
      torch::stable::detail::from(std::optional<int64_t>())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::to", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> log_mel_fbank(
    const Tensor& waveforms, const Tensor& lengths, const Tensor& window, const Tensor& mel,
    const std::optional<Tensor>& cosines, const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& masks, const std::vector<int64_t>& integers,
    const std::vector<double>& floats, ScalarType dtype, bool validate) {
  const LogMelFbankSettings settings =
      check_log_mel_fbank(waveforms, lengths, window, mel, cosines, seeds, masks, integers, floats);
  const int64_t batch = waveforms.size(0), samples = waveforms.size(1);
  const Tensor x = torch::stable::contiguous(waveforms), n = torch::stable::contiguous(lengths);
  const Tensor taper = torch::stable::contiguous(window), filters = torch::stable::contiguous(mel);
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
  };
  const auto transform = contiguous(cosines), noise = contiguous(seeds), zeros = contiguous(masks);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = n.const_data_ptr<int64_t>()[b];
    check(length >= 0 && length <= samples, "lengths must lie in 0..", samples, ", row ", b,
          " has ", length);
  }
  const LogMelFbankTables tables = {
      .window = taper.const_data_ptr<float>(),
      .frame_length = taper.size(0),
      .mel = filters.const_data_ptr<float>(),
      .num_mels = filters.size(0),
      // Where the energy replaces the only cepstrum there are no rows, and torch gives no address.
      .cosines = !transform           ? nullptr
                 : transform->size(0) ? transform->const_data_ptr<float>()
                                      : filters.const_data_ptr<float>(),
      .num_cosines = transform ? transform->size(0) : 0,
  };
  const auto fbank = cached(settings, tables);
  const int64_t frames = settings.padded_frames(samples);
  Tensor features =
      torch::stable::new_empty(x, {batch, frames, fbank->plan().size}, ScalarType::Float);
  Tensor frame_lengths = torch::stable::new_empty(n, {batch});
  const bool shorts = x.scalar_type() == ScalarType::Short;
  const int64_t bad =
      run_log_mel_fbank(*fbank,
                        {
                            .floats = shorts ? nullptr : x.const_data_ptr<float>(),
                            .shorts = shorts ? x.const_data_ptr<int16_t>() : nullptr,
                            .lengths = n.const_data_ptr<int64_t>(),
                            .seeds = noise ? noise->const_data_ptr<int64_t>() : nullptr,
                            .masks = zeros ? zeros->const_data_ptr<int64_t>() : nullptr,
                            .num_masks = zeros ? zeros->size(1) : 0,
                            .features = features.mutable_data_ptr<float>(),
                            .frame_lengths = frame_lengths.mutable_data_ptr<int64_t>(),
                            .batch = batch,
                            .samples = samples,
                            .frames = frames,
                        },
                        [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
                          torch::stable::parallel_for(begin, end, grain, body);
                        });
  if (validate && bad >= 0) {
    const float* row = x.const_data_ptr<float>() + bad * samples;
    int64_t sample = 0;
    while (std::isfinite(row[sample])) ++sample;
    check(false, "waveforms row ", bad, " holds a NaN or infinite value at sample ", sample,
          ": mend or drop that audio");
  }
  return {dtype == ScalarType::Float ? features : to_dtype(features, dtype), frame_lengths};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) { m.impl("log_mel_fbank", TORCH_BOX(&log_mel_fbank)); }

}  // namespace spkfast::cpu
