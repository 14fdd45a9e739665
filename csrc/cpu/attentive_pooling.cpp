// CPU kernel of attentive_pooling: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attentive_pooling_engine.h"
#include "product_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attentive_pooling(
    const Tensor& x, const Tensor& hidden, const Tensor& hidden_vectors,
    const std::optional<Tensor>& context, const std::optional<Tensor>& context_vectors,
    const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& lengths,
    const std::vector<int64_t>& integers, const std::vector<double>& floats) {
  check(integers.size() == 4 && floats.size() == 4,
        "attentive_pooling takes 4 integers and 4 floats, got ", integers.size(), " and ",
        floats.size());
  check_shape("x", x, {-1, -1, -1});
  check_shape("hidden_vectors", hidden_vectors, {kVectorRows, -1});
  const int64_t batch = x.size(0), channels = x.size(1), units = hidden_vectors.size(1);
  const Element element = activation_of("x", x);
  const Operand operand = element == Element::float32 ? Operand::float32 : Operand::bfloat16;
  check(channels % step_channels(operand) == 0 && units % step_channels(operand) == 0,
        "x and the hidden layer must have an even number of channels, got ", channels, " and ",
        units);
  check_shape("weight", weight, {channels, units});
  check_shape("bias", bias, {channels});
  check_dtype("weight", weight, x.scalar_type());
  check_dtype("bias", bias, x.scalar_type());
  check(weight.is_contiguous() && bias.is_contiguous(), "weight and bias must be contiguous");
  const auto counts = checked_lengths("lengths", lengths, batch);
  const bool turned = x.stride(1) != 1 && x.stride(2) == 1;
  const Tensor values = turned ? x : channels_side_by_side(x);
  Layer of_context = {};
  if (context) {
    check(context_vectors.has_value(), "context needs context_vectors");
    of_context = layer_of("context", {Operand::float32, units, 1, {channels, channels}}, *context,
                          *context_vectors, false, false, false, {});
  }
  const auto empty = [&] {
    return torch::stable::new_empty(x, {batch, channels}, ScalarType::Float);
  };
  Tensor mean = empty(), var = empty();
  const auto number = [&](size_t i) { return static_cast<float>(floats[i]); };
  const Batch frames = batch_of(values);
  run_attentive_pooling(
      {.element = element,
       .hidden = layer_of("hidden", {operand, units, 1, {channels}}, hidden, hidden_vectors,
                          integers[0] != 0, integers[1] != 0, integers[2] != 0, {}),
       .context = context ? &of_context : nullptr,
       .deviation = {integers[3] != 0, number(0), number(1), number(2), number(3)},
       .weight = weight.const_data_ptr(),
       .bias = bias.const_data_ptr(),
       .channels = channels,
       .x = frames,
       .turned = turned,
       .channel_stride = x.stride(1) * static_cast<int64_t>(x.element_size()),
       .mean = mean.mutable_data_ptr<float>(),
       .var = var.mutable_data_ptr<float>()},
      real_frames(x, counts), level(), torch::stable::get_num_threads(), kParallelFor);
  return {mean, var};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("attentive_pooling", TORCH_BOX(&attentive_pooling));
}

}  // namespace spkfast::cpu
