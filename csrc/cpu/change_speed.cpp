// CPU kernel of change_speed: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "augmentation_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor change_speed(const Tensor& waveforms, const Tensor& lengths, const Tensor& which,
                    const std::vector<Tensor>& filters, const std::vector<int64_t>& ratios,
                    int64_t context, int64_t num_samples) {
  check_shape("waveforms", waveforms, {-1, -1});
  const Tensor x = torch::stable::contiguous(waveforms);
  const int64_t batch = x.size(0), samples = x.size(1);
  const Tensor n = indexes("lengths", lengths, {batch}), k = indexes("which", which, {batch});
  const auto count = static_cast<int64_t>(filters.size());
  check(static_cast<int64_t>(ratios.size()) == 2 * count, "ratios must hold ", 2 * count,
        " numbers, got ", ratios.size());
  check(context >= 0 && context <= samples, "context must lie in 0..", samples, ", got ", context);
  check(num_samples >= 0, "num_samples must not be negative, got ", num_samples);
  std::vector<Tensor> kept;
  std::vector<SpeedFilter> tables;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = ratios[2 * i], q = ratios[2 * i + 1];
    check(p > 0 && q > 0, "speeds must be positive, got ", p, "/", q);
    check_dtype("filters", filters[i], ScalarType::Float);
    check_shape("filters", filters[i], {q, -1});
    check(filters[i].size(1) % 2 == 1, "filters must have an odd number of weights, got ",
          filters[i].size(1));
    kept.push_back(torch::stable::contiguous(filters[i]));
    tables.push_back({p, q, filters[i].size(1) / 2, kept.back().const_data_ptr<float>()});
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t at = k.const_data_ptr<int64_t>()[b];
    check(at >= 0 && at < count, "which must lie in 0..", count - 1, ", row ", b, " has ", at);
  }
  Tensor out = torch::stable::new_empty(x, {batch, num_samples}, ScalarType::Float);
  if (batch == 0 || num_samples == 0) return out;
  run_change_speed(
      {samples_of("waveforms", x), n.const_data_ptr<int64_t>(), k.const_data_ptr<int64_t>(),
       out.mutable_data_ptr<float>(), batch, samples, context, num_samples},
      tables, level(), kParallelFor);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) { m.impl("change_speed", TORCH_BOX(&change_speed)); }

}  // namespace spkfast::cpu
