// attentive_stats_pool_from_hidden on CUDA: tensors to the launcher of kernels/cuda. Its gradient
// is made of other ops, in spkfast/ops.
#include <cuda_runtime_api.h>
// cuda_runtime_api.h comes first: the torch macros below use its types.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../attentive_stats_pool.h"
#include "attentive_stats_pool_from_hidden.cuh"
#include "launch.h"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> attentive_stats_pool_from_hidden(
    const Tensor& x, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& lengths) {
  check_shape("x", x, {-1, -1, -1});
  const FloatType type = float_type("x", x.scalar_type());
  const int64_t batch = x.size(0), channels = x.size(1), frames = x.size(2);
  const auto check_given = [&](const char* name, const Tensor& tensor, ScalarType dtype,
                               std::initializer_list<int64_t> shape) {
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, dtype);
    check_beside(name, tensor, x);
  };
  check_given("hidden", hidden, x.scalar_type(), {batch, -1, frames});
  const int64_t units = hidden.size(1);
  check_given("weight", weight, x.scalar_type(), {channels, units});
  check_given("bias", bias, x.scalar_type(), {channels});
  if (lengths) check_given("lengths", *lengths, ScalarType::Long, {batch});
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool last = channels_last(x);
  const Tensor values = readable(x), layer = readable(hidden);
  const Tensor factors = torch::stable::contiguous(weight);
  const Tensor offsets = torch::stable::contiguous(bias);
  std::optional<Tensor> counts;
  if (lengths) counts = torch::stable::contiguous(*lengths);
  const auto output = [&] {
    return torch::stable::new_empty(x, {batch, channels}, ScalarType::Float);
  };
  Tensor mean = output(), var = output(), highest = output(), total = output();
  const AttentiveStatsPoolFromHiddenParams params = {
      .x = values.const_data_ptr(),
      .hidden = layer.const_data_ptr(),
      .weight = factors.const_data_ptr(),
      .bias = offsets.const_data_ptr(),
      .lengths = counts ? counts->const_data_ptr<int64_t>() : nullptr,
      .mean = mean.mutable_data_ptr<float>(),
      .var = var.mutable_data_ptr<float>(),
      .highest = highest.mutable_data_ptr<float>(),
      .total = total.mutable_data_ptr<float>(),
      .batch = batch,
      .channels = channels,
      .units = units,
      .frames = frames,
      .x_row_stride = values.stride(0),
      .x_stride = values.stride(last ? 2 : 1),
      .hidden_row_stride = layer.stride(0),
      .unit_stride = layer.stride(1),
      .frame_stride = layer.stride(2),
      .type = type,
      .channels_last = last,
  };
  STD_CUDA_CHECK(launch_attentive_stats_pool_from_hidden(params, current_stream(x)));
  return {mean, var, highest, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) {
  m.impl("attentive_stats_pool_from_hidden", TORCH_BOX(&attentive_stats_pool_from_hidden));
}

}  // namespace spkfast::cuda
