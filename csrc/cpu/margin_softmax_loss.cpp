// CPU kernel of margin_softmax_loss: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "margin_softmax_engine.h"
#include "product_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const float* floats(const Tensor& x) { return x.const_data_ptr<float>(); }
Tensor checked(const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
               ScalarType type = ScalarType::Float) {
  check_dtype(name, x, type);
  check_shape(name, x, shape);
  return torch::stable::contiguous(x);
}
Tensor made(const Tensor& like, std::initializer_list<int64_t> shape,
            ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, shape, type);
}

// The arguments that both directions have, and what their pointers point to.
struct Call {
  Tensor x, weight;
  MaybeTensor bias;
  MarginSoftmax form;

  Call(const Tensor& given_x, const Tensor& given_weight, const MaybeTensor& given_bias,
       const std::vector<int64_t>& integers, const std::vector<double>& numbers)
      : x(checked("x", given_x, {-1, -1})),
        weight(checked("weight", given_weight, {-1, given_x.size(1)})),
        bias(given_bias),
        form() {
    check(integers.size() == 6, "margin_softmax_loss takes 6 integers, got ", integers.size());
    check(numbers.size() == 2, "margin_softmax_loss takes 2 floats, got ", numbers.size());
    const int64_t subcenters = integers[1], topk = integers[2], summed = integers[4];
    const double scale = numbers[0], margin = numbers[1];
    check(subcenters >= 1, "num_subcenters must be at least 1, got ", subcenters);
    check(topk >= 0, "topk must be at least 0, got ", topk);
    check(summed >= 0 && summed <= 2, "what is summed must be 0, 1 or 2, got ", summed);
    check(integers[5] >= 1, "power must be at least 1, got ", integers[5]);
    check(std::isfinite(scale) && scale > 0, "scale must be positive, got ", scale);
    check(std::isfinite(margin), "margin must be finite, got ", margin);
    check(weight.size(0) % subcenters == 0, "weight must have num_subcenters = ", subcenters,
          " rows a class, got ", weight.size(0));
    check(weight.size(0) <= std::numeric_limits<int32_t>::max(),
          "weight must have at most 2^31 - 1 rows, got ", weight.size(0));
    const int64_t classes = weight.size(0) / subcenters;
    const bool binary = summed != 0;
    if (bias) bias = checked("bias", *bias, {binary ? 1 : classes});
    form = {.operand = operand_of(integers[3]),
            .normalise = integers[0] != 0,
            .sum = {.summed = static_cast<Summed>(summed),
                    .power = integers[5],
                    .scale = static_cast<float>(scale),
                    .margin = static_cast<float>(margin),
                    .cosine = static_cast<float>(std::cos(margin)),
                    .sine = static_cast<float>(std::sin(margin)),
                    .bias = binary && bias ? *floats(*bias) : 0.0F},
            .batch = x.size(0),
            .features = x.size(1),
            .classes = classes,
            .subcenters = subcenters,
            .topk = topk,
            .x = floats(x),
            .weight = floats(weight),
            .bias = bias && !binary ? floats(*bias) : nullptr};
    check(form.operand != Operand::int8, "precision must be 0 or 1, got ", integers[3]);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> margin_softmax_loss(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& target,
    const std::vector<int64_t>& integers, const std::vector<double>& numbers) {
  check_shape("x", x, {-1, -1});
  const Call call(x, weight, bias, integers, numbers);
  const int64_t batch = call.form.batch, chosen = 1 + call.form.topk;
  const Tensor classes = checked("target", target, {batch}, ScalarType::Long);
  const Tensor sums = made(x, {batch}), total = made(x, {batch}), best = made(x, {batch}),
               own = made(x, {batch}), found = made(x, {batch, chosen, call.form.features}),
               rows = made(x, {batch, chosen}, ScalarType::Long);
  const MarginSoftmaxSums out = {sums.mutable_data_ptr<float>(),  total.mutable_data_ptr<float>(),
                                 found.mutable_data_ptr<float>(), best.mutable_data_ptr<float>(),
                                 own.mutable_data_ptr<float>(),   rows.mutable_data_ptr<int64_t>()};
  run_margin_softmax(call.form, classes.const_data_ptr<int64_t>(), out, level(), kParallelFor);
  return {sums, total, found, best, own, rows};
}

std::tuple<Tensor, Tensor, Tensor> margin_softmax_loss_backward(
    const Tensor& grad_sums, const Tensor& grad_total, const Tensor& grad_chosen, const Tensor& x,
    const Tensor& weight, const MaybeTensor& bias, const Tensor&,
    const std::vector<int64_t>& integers, const std::vector<double>& numbers, const Tensor& sums,
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor& rows) {
  check_shape("x", x, {-1, -1});
  const Call call(x, weight, bias, integers, numbers);
  const int64_t batch = call.form.batch, features = call.form.features;
  const int64_t chosen = 1 + call.form.topk, all_rows = call.weight.size(0);
  const Tensor of_sums = checked("grad_sums", grad_sums, {batch});
  const Tensor of_total = checked("grad_total", grad_total, {batch});
  const Tensor of_chosen = checked("grad_chosen", grad_chosen, {batch, chosen, features});
  const Tensor logarithms = checked("sums", sums, {batch});
  const Tensor found = checked("rows", rows, {batch, chosen}, ScalarType::Long);
  const int64_t* first = found.const_data_ptr<int64_t>();
  check(std::all_of(first, first + batch * chosen, [&](int64_t row) { return row < all_rows; }),
        "rows must be less than ", all_rows);
  const Tensor grad_x = made(x, {batch, features}), grad_weight = made(x, {all_rows, features}),
               grad_bias = made(x, {call.bias ? call.bias->size(0) : 0});
  use_huge_pages(grad_weight);
  run_margin_softmax_backward(
      call.form,
      {.of_sums = floats(of_sums),
       .of_total = floats(of_total),
       .of_chosen = floats(of_chosen),
       .sums = floats(logarithms),
       .rows = first,
       .of_x = grad_x.mutable_data_ptr<float>(),
       .of_weight = grad_weight.mutable_data_ptr<float>(),
       .of_bias = call.bias ? grad_bias.mutable_data_ptr<float>() : nullptr},
      level(), kParallelFor);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("margin_softmax_loss", TORCH_BOX(&margin_softmax_loss));
  m.impl("margin_softmax_loss_backward", TORCH_BOX(&margin_softmax_loss_backward));
}

}  // namespace spkfast::cpu
