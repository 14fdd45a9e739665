// attentive_stats_pool on CUDA: tensors to the launchers of kernels/cuda.
#include <cuda_runtime_api.h>
// cuda_runtime_api.h comes first: the torch macros below use its types.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../attentive_stats_pool.h"
#include "attentive_stats_pool.cuh"
#include "launch.h"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The tensors as the kernels read them, and what is said of them in the parameters.
struct Inputs {
  Tensor x;
  Optional logits, lengths;
  bool shared;
  AttentiveStatsPoolInputs params;

  Inputs(const Tensor& given_x, const Optional& given_logits, const Optional& given_lengths)
      : x(given_x) {
    check_shape("x", x, {-1, -1, -1});
    const FloatType type = float_type("x", x.scalar_type());
    const int64_t batch = x.size(0), channels = x.size(1), frames = x.size(2);
    const bool last = channels_last(x);
    x = readable(x);
    shared = !given_logits || given_logits->size(1) != channels;
    if (given_logits) {
      check_shape("logits", *given_logits, {batch, shared ? 1 : channels, frames});
      check_dtype("logits", *given_logits, x.scalar_type());
      check_beside("logits", *given_logits, x);
      logits = laid_out(*given_logits, last && !shared);
    }
    if (given_lengths) {
      check_shape("lengths", *given_lengths, {batch});
      check_dtype("lengths", *given_lengths, ScalarType::Long);
      check_beside("lengths", *given_lengths, x);
      lengths = torch::stable::contiguous(*given_lengths);
    }
    params = {
        .x = x.const_data_ptr(),
        .logits = logits ? logits->const_data_ptr() : nullptr,
        .lengths = lengths ? lengths->const_data_ptr<int64_t>() : nullptr,
        .batch = batch,
        .channels = channels,
        .frames = frames,
        .x_row_stride = x.stride(0),
        .x_stride = x.stride(last ? 2 : 1),
        .logit_row_stride = logits ? logits->stride(0) : 0,
        .logit_stride = logits ? logits->stride(last ? 2 : 1) : 0,
        .type = type,
        .channels_last = last,
        .shared = shared,
    };
  }
};

// For what a row has whether it has channels or not; without any nothing is launched.
Tensor empty_shared(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return x.size(1) ? torch::stable::new_empty(x, sizes, dtype)
                   : torch::stable::new_zeros(x, sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attentive_stats_pool(const Tensor& x,
                                                                const Optional& logits,
                                                                const Optional& lengths) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, logits, lengths);
  const int64_t channels = x.size(1), own = in.shared ? 1 : channels;
  const auto output = [&](int64_t size) {
    return empty_shared(x, {x.size(0), size}, ScalarType::Float);
  };
  Tensor mean = output(channels), var = output(channels), highest = output(own),
         total = output(own);
  const AttentiveStatsPoolParams params = {
      .in = in.params,
      .mean = mean.mutable_data_ptr<float>(),
      .var = var.mutable_data_ptr<float>(),
      .highest = highest.mutable_data_ptr<float>(),
      .total = total.mutable_data_ptr<float>(),
  };
  STD_CUDA_CHECK(launch_attentive_stats_pool(params, current_stream(x)));
  return {mean, var, highest, total};
}

std::tuple<Tensor, Tensor> attentive_stats_pool_backward(
    const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Optional& logits,
    const Optional& lengths, const Tensor& mean, const Tensor& var, const Tensor& highest,
    const Tensor& total) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Inputs in(x, logits, lengths);
  const int64_t batch = x.size(0), channels = x.size(1), own = in.shared ? 1 : channels;
  const auto given = [&](const char* name, const Tensor& tensor, int64_t size) {
    check_shape(name, tensor, {batch, size});
    check_dtype(name, tensor, ScalarType::Float);
    check_beside(name, tensor, x);
    return torch::stable::contiguous(tensor);
  };
  const Tensor to_mean = given("grad_mean", grad_mean, channels);
  const Tensor to_var = given("grad_var", grad_var, channels);
  const Tensor means = given("mean", mean, channels), vars = given("var", var, channels);
  const Tensor tops = given("highest", highest, own), sums = given("total", total, own);
  Tensor grad_x = empty_gradient(x);
  Tensor grad_logits = !logits     ? torch::stable::new_empty(x, {0})
                       : in.shared ? empty_shared(x, {batch, 1, x.size(2)}, x.scalar_type())
                                   : empty_gradient(x);
  const size_t needed = attentive_stats_pool_backward_workspace(in.params);
  Tensor workspace = torch::stable::new_empty(x, {static_cast<int64_t>(needed)}, ScalarType::Float);
  const AttentiveStatsPoolBackwardParams params = {
      .in = in.params,
      .grad_mean = to_mean.const_data_ptr<float>(),
      .grad_var = to_var.const_data_ptr<float>(),
      .mean = means.const_data_ptr<float>(),
      .var = vars.const_data_ptr<float>(),
      .highest = tops.const_data_ptr<float>(),
      .total = sums.const_data_ptr<float>(),
      .grad_x = grad_x.mutable_data_ptr(),
      .grad_logits = logits ? grad_logits.mutable_data_ptr() : nullptr,
      .workspace = workspace.mutable_data_ptr<float>(),
  };
  STD_CUDA_CHECK(launch_attentive_stats_pool_backward(params, current_stream(x)));
  return {grad_x, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) {
  m.impl("attentive_stats_pool", TORCH_BOX(&attentive_stats_pool));
  m.impl("attentive_stats_pool_backward", TORCH_BOX(&attentive_stats_pool_backward));
}

}  // namespace spkfast::cuda
