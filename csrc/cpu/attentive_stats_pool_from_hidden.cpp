// CPU kernel of attentive_stats_pool_from_hidden: tensors checked, then handed to the engine as raw
// pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "attentive_stats_pool_from_hidden_engine.h"
#include "attentive_stats_pool_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> attentive_stats_pool_from_hidden(
    const Tensor& x, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& lengths) {
  check_shape("x", x, {-1, -1, -1});
  const Element element = element_of("x", x);
  const int64_t batch = x.size(0), channels = x.size(1), frames = x.size(2);
  check_shape("hidden", hidden, {batch, -1, frames});
  const int64_t units = hidden.size(1);
  check_shape("weight", weight, {channels, units});
  check_shape("bias", bias, {channels});
  check_dtype("hidden", hidden, x.scalar_type());
  check_dtype("weight", weight, x.scalar_type());
  check_dtype("bias", bias, x.scalar_type());
  const Tensor values = readable(x);
  const Tensor layer = laid_out(hidden, channels_last(values));
  const Tensor factors = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  const Tensor offsets = torch::stable::contiguous(bias);
  const auto counts = checked_lengths("lengths", lengths, batch);
  const auto empty = [&] {
    return torch::stable::new_empty(x, {batch, channels}, ScalarType::Float);
  };
  Tensor mean = empty(), var = empty(), highest = empty(), total = empty();
  AttentiveStatsPoolBatch pool = {};
  pool.element = element;
  pool.channels_last = channels_last(values);
  pool.batch = batch;
  pool.channels = channels;
  pool.frames = frames;
  pool.lengths = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  pool.x = pool_tensor(values);
  pool.mean = mean.mutable_data_ptr<float>();
  pool.var = var.mutable_data_ptr<float>();
  pool.highest = highest.mutable_data_ptr<float>();
  pool.total = total.mutable_data_ptr<float>();
  run_attentive_stats_pool_from_hidden({.pool = pool,
                                        .hidden = layer.const_data_ptr(),
                                        .hidden_batch_stride = layer.stride(0),
                                        .hidden_unit_stride = layer.stride(1),
                                        .hidden_frame_stride = layer.stride(2),
                                        .weight = factors.const_data_ptr(),
                                        .weight_stride = factors.stride(0),
                                        .bias = offsets.const_data_ptr(),
                                        .units = units},
                                       level(), kParallelFor);
  return {mean, var, highest, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("attentive_stats_pool_from_hidden", TORCH_BOX(&attentive_stats_pool_from_hidden));
}

}  // namespace spkfast::cpu
