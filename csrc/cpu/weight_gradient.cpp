// CPU kernel of conv_weight_gradient: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "product_tensors.h"
#include "weight_gradient_engine.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor conv_weight_gradient(const std::vector<Tensor>& x, const Tensor& grad,
                            const std::vector<int64_t>& integers) {
  check(!x.empty(), "x must have at least one tensor");
  check(integers.size() == 4, "conv_weight_gradient takes 4 integers, got ", integers.size());
  const int64_t taps = integers[0], dilation = integers[1];
  check(taps >= 1 && taps % 2 == 1, "taps must be odd, got ", taps);
  check(dilation >= 1, "dilation must be at least 1, got ", dilation);
  const Operand operand = operand_of(integers[3]);
  check(operand != Operand::int8, "precision must be 0 or 1, got ", integers[3]);
  check_shape("grad", grad, {-1, -1, -1});
  const int64_t batch = grad.size(0), channels = grad.size(1), frames = grad.size(2);
  const Tensor outer = channels_side_by_side(grad);
  WeightGradient call = {.operand = operand,
                         .batch = batch,
                         .frames = frames,
                         .element = activation_of("x", x[0]),
                         .inputs = {},
                         .parts = {},
                         .grad_element = activation_of("grad", grad),
                         .grad = batch_of(outer),
                         .channels = channels,
                         .taps = taps,
                         .dilation = dilation,
                         .reflect = integers[2] != 0,
                         .out = nullptr};
  std::vector<Tensor> parts;  // what the pointers point to
  int64_t inputs = 0;
  for (const Tensor& part : x) {
    check_shape("x", part, {batch, -1, frames});
    check_dtype("x", part, x[0].scalar_type());
    parts.push_back(channels_side_by_side(part));
    call.inputs.push_back(batch_of(parts.back()));
    call.parts.push_back(part.size(1));
    inputs += part.size(1);
  }
  Tensor out = torch::stable::new_empty(grad, {channels, inputs, taps}, ScalarType::Float);
  call.out = out.mutable_data_ptr<float>();
  run_weight_gradient(call, level(), torch::stable::get_num_threads(), kParallelFor);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("conv_weight_gradient", TORCH_BOX(&conv_weight_gradient));
}

}  // namespace spkfast::cpu
