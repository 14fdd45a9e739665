// CPU kernel of tdnn_layer, and the packing of its weights: tensors checked, then handed to the
// engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "product_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor product_pack(const Tensor& weight, const std::vector<int64_t>& parts, int64_t precision) {
  check_dtype("weight", weight, ScalarType::Float);
  check_shape("weight", weight, {-1, -1, -1});
  int64_t inputs = 0;
  for (const int64_t part : parts) inputs += part;
  check(inputs == weight.size(1), "parts must add up to ", weight.size(1), ", got ", inputs);
  const Weight form = {operand_of(precision), weight.size(0), weight.size(2), parts};
  const Tensor values = torch::stable::contiguous(weight);
  Tensor packed = torch::stable::new_empty(weight, {form.packed_bytes()}, ScalarType::Byte);
  pack(form, values.const_data_ptr<float>(), {weight.size(1) * weight.size(2), weight.size(2), 1},
       static_cast<char*>(packed.mutable_data_ptr()), kParallelFor);
  return packed;
}

Tensor tdnn_layer(const std::vector<Tensor>& x, const Tensor& weight, const Tensor& vectors,
                  const std::optional<Tensor>& offset, const std::optional<Tensor>& lengths,
                  const std::vector<int64_t>& integers, const std::vector<double>& floats) {
  check(!x.empty(), "x must have at least one tensor");
  check(integers.size() == 7 && floats.size() == 2,
        "tdnn_layer takes 7 integers and 2 floats, got ", integers.size(), " and ", floats.size());
  check_shape("x", x[0], {-1, -1, -1});
  check_shape("vectors", vectors, {-1, -1});
  check(integers[1] >= 1 && integers[1] % 2 == 1, "taps must be odd, got ", integers[1]);
  const int64_t batch = x[0].size(0), frames = x[0].size(2), channels = vectors.size(1);
  Weight form = {operand_of(integers[0]), channels, integers[1], {}};
  std::vector<Tensor> inputs;
  for (const Tensor& part : x) {
    check_shape("x", part, {batch, -1, frames});
    check_dtype("x", part, x[0].scalar_type());
    inputs.push_back(channels_side_by_side(part));
    form.parts.push_back(part.size(1));
  }
  const Element element = activation_of("x", x[0]);
  const Quantiser quantiser = {static_cast<float>(floats[0]), static_cast<float>(floats[1])};
  const Layer layer = layer_of("weight", form, weight, vectors, integers[4] != 0, integers[5] != 0,
                               integers[6] != 0, quantiser);
  const auto counts = checked_lengths("lengths", lengths, batch);
  std::optional<Tensor> added;
  if (offset) {
    check_dtype("offset", *offset, ScalarType::Float);
    check_shape("offset", *offset, {batch, channels});
    added = torch::stable::contiguous(*offset);
  }
  const bool wide = form.operand == Operand::float32;
  const Tensor out = empty_frames(x[0], channels, wide ? ScalarType::Float : ScalarType::BFloat16);
  TdnnLayer call = {.layer = layer,
                    .element = element,
                    .out_element = wide ? Element::float32 : Element::bfloat16,
                    .inputs = {},
                    .offset = added ? added->const_data_ptr<float>() : nullptr,
                    .dilation = integers[2],
                    .reflect = integers[3] != 0,
                    .out = batch_of(out),
                    .mean = nullptr,
                    .var = nullptr};
  for (const Tensor& part : inputs) call.inputs.push_back(batch_of(part));
  run_tdnn_layer(call, real_frames(x[0], counts), level(), torch::stable::get_num_threads(),
                 kParallelFor);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("product_pack", TORCH_BOX(&product_pack));
  m.impl("tdnn_layer", TORCH_BOX(&tdnn_layer));
}

}  // namespace spkfast::cpu
