// CPU kernel of add_noise: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "augmentation_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Into `out`, which may be x.
void add_noise_into(const Tensor& x, const Tensor& noises, const Tensor& begins,
                    const Tensor& sizes, const Tensor& offsets, const Tensor& snr_db,
                    double power_floor, Tensor& out) {
  check_shape("waveforms", x, {-1, -1});
  check_dtype("waveforms", x, ScalarType::Float);
  check_shape("noises", noises, {-1});
  const Tensor bank = torch::stable::contiguous(noises);
  const int64_t batch = x.size(0), samples = x.size(1);
  check_shape("begins", begins, {batch, -1});
  const int64_t each = begins.size(1);
  const Tensor begin = indexes("begins", begins, {batch, each});
  const Tensor size = indexes("sizes", sizes, {batch, each});
  const Tensor offset = indexes("offsets", offsets, {batch, each});
  check_dtype("snr_db", snr_db, ScalarType::Float);
  check_shape("snr_db", snr_db, {batch, each});
  const Tensor snr = torch::stable::contiguous(snr_db);
  check_inside("noises", bank, begin, size);
  check(power_floor >= 0, "power_floor must not be negative, got ", power_floor);
  for (int64_t k = 0; k < batch * each; ++k) {
    const int64_t at = offset.const_data_ptr<int64_t>()[k], of = size.const_data_ptr<int64_t>()[k];
    check(of <= 0 || (at >= 0 && at < of), "offsets must lie in 0..", of - 1, ", got ", at);
  }
  if (batch == 0 || samples == 0) return;
  run_add_noise({samples_of("waveforms", x),
                 {samples_of("noises", bank), begin.const_data_ptr<int64_t>(),
                  size.const_data_ptr<int64_t>()},
                 offset.const_data_ptr<int64_t>(),
                 snr.const_data_ptr<float>(),
                 power_floor,
                 out.mutable_data_ptr<float>(),
                 batch,
                 samples,
                 each},
                level(), kParallelFor);
}

Tensor add_noise(const Tensor& waveforms, const Tensor& noises, const Tensor& begins,
                 const Tensor& sizes, const Tensor& offsets, const Tensor& snr_db,
                 double power_floor) {
  const Tensor x = torch::stable::contiguous(waveforms);
  Tensor out = torch::stable::empty_like(x);
  add_noise_into(x, noises, begins, sizes, offsets, snr_db, power_floor, out);
  return out;
}

void add_noise_in_place(Tensor waveforms, const Tensor& noises, const Tensor& begins,
                        const Tensor& sizes, const Tensor& offsets, const Tensor& snr_db,
                        double power_floor) {
  check(waveforms.is_contiguous(), "waveforms must be contiguous to be changed in place");
  add_noise_into(waveforms, noises, begins, sizes, offsets, snr_db, power_floor, waveforms);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise));
  m.impl("add_noise_", TORCH_BOX(&add_noise_in_place));
}

}  // namespace spkfast::cpu
