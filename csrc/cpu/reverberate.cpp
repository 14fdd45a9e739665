// CPU kernel of reverberate: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "augmentation_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Into `out`, which may be x.
void reverberate_into(const Tensor& x, const Tensor& responses, const Tensor& begins,
                      const Tensor& sizes, const Tensor& gains, int64_t longest, Tensor& out) {
  check_shape("waveforms", x, {-1, -1});
  check_dtype("waveforms", x, ScalarType::Float);
  check_shape("responses", responses, {-1});
  const Tensor bank = torch::stable::contiguous(responses);
  const int64_t batch = x.size(0), samples = x.size(1);
  const Tensor begin = indexes("begins", begins, {batch}), size = indexes("sizes", sizes, {batch});
  check_dtype("gains", gains, ScalarType::Float);
  check_shape("gains", gains, {batch});
  const Tensor gain = torch::stable::contiguous(gains);
  check_inside("responses", bank, begin, size);
  check(longest >= 1, "longest must be at least 1, got ", longest);
  if (batch == 0 || samples == 0) return;
  run_reverberate({samples_of("waveforms", x),
                   {samples_of("responses", bank), begin.const_data_ptr<int64_t>(),
                    size.const_data_ptr<int64_t>()},
                   gain.const_data_ptr<float>(),
                   out.mutable_data_ptr<float>(),
                   batch,
                   samples,
                   longest},
                  level(), kParallelFor);
}

Tensor reverberate(const Tensor& waveforms, const Tensor& responses, const Tensor& begins,
                   const Tensor& sizes, const Tensor& gains, int64_t longest) {
  const Tensor x = torch::stable::contiguous(waveforms);
  Tensor out = torch::stable::empty_like(x);
  reverberate_into(x, responses, begins, sizes, gains, longest, out);
  return out;
}

void reverberate_in_place(Tensor waveforms, const Tensor& responses, const Tensor& begins,
                          const Tensor& sizes, const Tensor& gains, int64_t longest) {
  check(waveforms.is_contiguous(), "waveforms must be contiguous to be changed in place");
  reverberate_into(waveforms, responses, begins, sizes, gains, longest, waveforms);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("reverberate", TORCH_BOX(&reverberate));
  m.impl("reverberate_", TORCH_BOX(&reverberate_in_place));
}

}  // namespace spkfast::cpu
