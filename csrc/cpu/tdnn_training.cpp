// CPU kernels of a training step of TDNN layers: tensors checked, then handed to the engines as raw
// pointers. The weight's gradient has a file of its own.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "product_tensors.h"
#include "tdnn_training_engine.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

ScalarType type_of(Element element) {
  return element == Element::float32 ? ScalarType::Float : ScalarType::BFloat16;
}
Element element_of(Operand operand) {
  return operand == Operand::float32 ? Element::float32 : Element::bfloat16;
}
Operand trained(int64_t precision) {
  check(precision == 0 || precision == 1, "precision must be 0 or 1, got ", precision);
  return operand_of(precision);
}
Batch batch_of(const MaybeTensor& x) {
  return x ? spkfast::cpu::batch_of(*x) : Batch{nullptr, 0, 0};
}
BatchSize size_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }
float* floats(const Tensor& x) { return x.mutable_data_ptr<float>(); }

// A tensor of the shape and type of another one, its channels side by side.
MaybeTensor like(const char* name, const MaybeTensor& x, const Tensor& other) {
  if (!x) return x;
  check_dtype(name, *x, other.scalar_type());
  check_shape(name, *x, {other.size(0), other.size(1), other.size(2)});
  return channels_side_by_side(*x);
}
MaybeTensor vectors_of(const char* name, const MaybeTensor& x, int64_t rows, int64_t channels) {
  if (!x) return x;
  check_dtype(name, *x, ScalarType::Float);
  check_shape(name, *x, {rows, channels});
  return torch::stable::contiguous(*x);
}
MaybeTensor channel_vector(const char* name, const MaybeTensor& x, int64_t channels) {
  if (!x) return x;
  check_dtype(name, *x, ScalarType::Float);
  check_shape(name, *x, {channels});
  return torch::stable::contiguous(*x);
}
Tensor empty_vectors(const Tensor& like, int64_t rows, int64_t channels) {
  return torch::stable::new_empty(like, {rows, channels}, ScalarType::Float);
}
int64_t threads() { return torch::stable::get_num_threads(); }

// A product with weights that are packed for this call alone.
Layer layer_of(const Weight& form, const float* values, const Strides& strides, const float* bias,
               bool relu) {
  thread_local struct {
    Buffer weight, zeros;
  } memory;
  char* packed = memory.weight.of(form.packed_bytes());
  pack(form, values, strides, packed, kParallelFor);
  if (bias == nullptr) {
    float* zeros = reinterpret_cast<float*>(memory.zeros.of(form.channels * sizeof(float)));
    std::fill(zeros, zeros + form.channels, 0.0F);
    bias = zeros;
  }
  return {.form = form,
          .weight = packed,
          .unit = nullptr,
          .bias = bias,
          .scale = nullptr,
          .shift = nullptr,
          .quantiser = {},
          .relu = relu,
          .tanh = false};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu(const std::vector<Tensor>& x, const Tensor& weight,
                                             const MaybeTensor& bias,
                                             const std::vector<int64_t>& integers) {
  check(!x.empty(), "x must have at least one tensor");
  check(integers.size() == 6, "conv_relu takes 6 integers, got ", integers.size());
  check_shape("x", x[0], {-1, -1, -1});
  check_shape("weight", weight, {-1, -1, -1});
  check_dtype("weight", weight, ScalarType::Float);
  check(weight.size(2) % 2 == 1, "taps must be odd, got ", weight.size(2));
  check(integers[1] >= 1, "dilation must be at least 1, got ", integers[1]);
  const int64_t batch = x[0].size(0), channels = weight.size(0), frames = x[0].size(2);
  const Tensor values = torch::stable::contiguous(weight);
  Weight form = {trained(integers[0]), channels, weight.size(2), {}};
  std::vector<Tensor> inputs;
  int64_t all = 0;
  for (const Tensor& part : x) {
    check_shape("x", part, {batch, -1, frames});
    check_dtype("x", part, x[0].scalar_type());
    inputs.push_back(channels_side_by_side(part));
    form.parts.push_back(part.size(1));
    all += part.size(1);
  }
  check(all == weight.size(1), "x must have ", weight.size(1), " channels, got ", all);
  const auto added = channel_vector("bias", bias, channels);
  const Element out_element = integers[5] ? Element::float32 : element_of(form.operand);
  const Tensor y = empty_frames(x[0], channels, type_of(out_element));
  const bool moments = integers[3] != 0;
  const Tensor mean = empty_vectors(y, moments ? batch : 0, channels);
  const Tensor var = empty_vectors(y, moments ? batch : 0, channels);
  TdnnLayer call = {
      .layer = layer_of(form, values.const_data_ptr<float>(), {all * form.taps, form.taps, 1},
                        added ? added->const_data_ptr<float>() : nullptr, integers[4] != 0),
      .element = activation_of("x", x[0]),
      .out_element = out_element,
      .inputs = {},
      .offset = nullptr,
      .dilation = integers[1],
      .reflect = integers[2] != 0,
      .out = batch_of(y),
      .mean = moments ? floats(mean) : nullptr,
      .var = moments ? floats(var) : nullptr};
  for (const Tensor& part : inputs) call.inputs.push_back(batch_of(part));
  run_tdnn_layer(call, {batch, frames, nullptr}, level(), threads(), kParallelFor);
  return {y, mean, var};
}

Tensor conv_input_gradient(const Tensor& grad, const Tensor& weight,
                           const std::vector<int64_t>& integers) {
  check(integers.size() == 2, "conv_input_gradient takes 2 integers, got ", integers.size());
  check_shape("weight", weight, {-1, -1, -1});
  check_dtype("weight", weight, ScalarType::Float);
  const int64_t outputs = weight.size(0), channels = weight.size(1), taps = weight.size(2);
  check_shape("grad", grad, {-1, outputs, -1});
  check(taps % 2 == 1, "taps must be odd, got ", taps);
  check(integers[1] >= 1, "dilation must be at least 1, got ", integers[1]);
  const Weight form = {trained(integers[0]), channels, taps, {outputs}};
  const Tensor values = torch::stable::contiguous(weight);
  const Tensor given = channels_side_by_side(grad);
  // The same product with inputs and outputs swapped, and the taps the other way round.
  const Layer layer = layer_of(form, values.const_data_ptr<float>() + taps - 1,
                               {taps, channels * taps, -1}, nullptr, false);
  const Element out_element = element_of(form.operand);
  const Tensor out = empty_frames(grad, channels, type_of(out_element));
  const TdnnLayer call = {.layer = layer,
                          .element = activation_of("grad", grad),
                          .out_element = out_element,
                          .inputs = {batch_of(given)},
                          .offset = nullptr,
                          .dilation = integers[1],
                          .reflect = false,
                          .out = batch_of(out),
                          .mean = nullptr,
                          .var = nullptr};
  run_tdnn_layer(call, {grad.size(0), grad.size(2), nullptr}, level(), threads(), kParallelFor);
  return out;
}

std::tuple<Tensor, Tensor> conv_relu_backward(const MaybeTensor& grad_y,
                                              const MaybeTensor& grad_mean,
                                              const MaybeTensor& grad_var, const Tensor& y,
                                              const Tensor& mean) {
  check_shape("y", y, {-1, -1, -1});
  const Element element = activation_of("y", y);
  const BatchSize size = size_of(y);
  const Tensor values = channels_side_by_side(y);
  const auto given = like("grad_y", grad_y, y);
  const auto of_mean = vectors_of("grad_mean", grad_mean, size.rows, size.channels);
  const auto of_var = vectors_of("grad_var", grad_var, size.rows, size.channels);
  const bool moments = of_mean || of_var;
  const auto means =
      vectors_of("mean", moments ? MaybeTensor(mean) : std::nullopt, size.rows, size.channels);
  const Tensor grad = empty_frames(y, size.channels, y.scalar_type());
  const Tensor grad_bias = empty_vectors(y, size.rows, size.channels);
  // What the moments add to a frame: offset, and slope times the distance from the mean.
  const Tensor zeros = torch::stable::new_zeros(
      y, {moments && !(of_mean && of_var) ? size.rows : 0, size.channels}, ScalarType::Float);
  const float share = size.frames ? 1.0F / static_cast<float>(size.frames) : 0.0F;
  const Batch in = batch_of(given), from = batch_of(values), to = batch_of(grad);
  const ChannelKernel& kernel = channel_kernel(level());
  each_row(size, threads(), kParallelFor, [&](int64_t b, int64_t first, int64_t last) {
    const int64_t at = b * size.channels;
    const ReluGradient row = {
        .grad_y = in.row(b),
        .grad_total = {},
        .scale = nullptr,
        .grad_mean = moments ? (of_mean ? *of_mean : zeros).const_data_ptr<float>() + at : nullptr,
        .grad_var = moments ? (of_var ? *of_var : zeros).const_data_ptr<float>() + at : nullptr,
        .mean = moments ? means->const_data_ptr<float>() + at : nullptr,
        .share = share,
        .y = from.row(b),
        .grad = to.row(b),
        .grad_bias = floats(grad_bias) + at,
    };
    kernel.relu_gradient(row, element, size.frames, first, last);
  });
  return {grad, grad_bias};
}

Vectors rows_of(const Tensor& x) {
  return {x.const_data_ptr<float>(), x.size(0) == 1 ? 0 : x.size(1)};
}

// Scale or shift of all rows of a batch, or of each.
Tensor factors(const char* name, const Tensor& x, const BatchSize& size) {
  check(x.dim() == 2 && (x.size(0) == 1 || x.size(0) == size.rows), name, " must have 1 or ",
        size.rows, " rows, got shape ", shape_text(x));
  return *vectors_of(name, x, x.size(0), size.channels);
}

std::tuple<Tensor, Tensor> channel_affine(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                          const MaybeTensor& added, bool plain) {
  check_shape("x", x, {-1, -1, -1});
  const Element element = activation_of("x", x);
  const BatchSize size = size_of(x);
  const Tensor values = channels_side_by_side(x);
  const Tensor by = factors("scale", scale, size), plus = factors("shift", shift, size);
  check(by.size(0) == plus.size(0), "scale and shift must have the same rows, got ", by.size(0),
        " and ", plus.size(0));
  const auto rest = like("added", added, x);
  const auto made = [&](bool wanted) {
    return wanted ? empty_frames(x, size.channels, x.scalar_type())
                  : torch::stable::new_empty(x, {0});
  };
  const Tensor y = made(plain), total = made(rest.has_value());
  const Batch from = batch_of(values), other = batch_of(rest);
  const Batch to = plain ? batch_of(y) : Batch{}, sum = rest ? batch_of(total) : Batch{};
  const ChannelKernel& kernel = channel_kernel(level());
  each_row(size, threads(), kParallelFor, [&](int64_t b, int64_t first, int64_t last) {
    const Affine row = {
        .x = from.row(b),
        .scale = rows_of(by).row(b),
        .shift = rows_of(plus).row(b),
        .added = other.row(b),
        .y = to.row(b),
        .total = sum.row(b),
    };
    kernel.affine(row, element, size.frames, first, last);
  });
  return {y, total};
}

std::tuple<Tensor, Tensor, Tensor> channel_affine_backward(const MaybeTensor& grad_y,
                                                           const MaybeTensor& grad_total,
                                                           const Tensor& x, const Tensor& scale) {
  check_shape("x", x, {-1, -1, -1});
  const Element element = activation_of("x", x);
  const BatchSize size = size_of(x);
  const Tensor values = channels_side_by_side(x), by = factors("scale", scale, size);
  const auto of_y = like("grad_y", grad_y, x), of_total = like("grad_total", grad_total, x);
  const Tensor grad_x = empty_frames(x, size.channels, x.scalar_type());
  const Tensor grad_scale = empty_vectors(x, size.rows, size.channels);
  const Tensor grad_shift = empty_vectors(x, size.rows, size.channels);
  const Batch from = batch_of(values), first_grad = batch_of(of_y), second = batch_of(of_total);
  const Batch to = batch_of(grad_x);
  const ChannelKernel& kernel = channel_kernel(level());
  each_row(size, threads(), kParallelFor, [&](int64_t b, int64_t first, int64_t last) {
    const AffineGradient row = {
        .grad_y = first_grad.row(b),
        .grad_total = second.row(b),
        .x = from.row(b),
        .scale = rows_of(by).row(b),
        .grad_x = to.row(b),
        .grad_scale = floats(grad_scale) + b * size.channels,
        .grad_shift = floats(grad_shift) + b * size.channels,
    };
    kernel.affine_gradient(row, element, size.frames, first, last);
  });
  return {grad_x, grad_scale, grad_shift};
}

// Adds up what each row has of a channel.
template <typename F>
void add_rows(const BatchSize& size, float* sums, F of_row) {
  for (int64_t c = 0; c < size.channels; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < size.rows; ++b) sum += of_row(b * size.channels + c, c);
    sums[c] = static_cast<float>(sum);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_batch_norm(
    const std::vector<Tensor>& x, const Tensor& weight, const MaybeTensor& bias,
    const MaybeTensor& gamma, const MaybeTensor& beta, const MaybeTensor& added,
    const std::vector<int64_t>& integers, double eps) {
  check(integers.size() == 4, "conv_batch_norm takes 4 integers, got ", integers.size());
  const auto [y, means, vars] =
      conv_relu(x, weight, bias, {integers[0], integers[1], integers[2], 1, 1, 0});
  const BatchSize size = size_of(y);
  check(size.rows * size.frames > 0, "x must have frames, got shape ", shape_text(x[0]));
  const auto factor = channel_vector("gamma", gamma, size.channels);
  const auto offset = channel_vector("beta", beta, size.channels);
  const Tensor mean = torch::stable::new_empty(y, {size.channels}, ScalarType::Float);
  const Tensor var = torch::stable::new_empty(y, {size.channels}, ScalarType::Float);
  const float *of_rows = means.const_data_ptr<float>(),
              *vars_of_rows = vars.const_data_ptr<float>();
  const double share = 1.0 / static_cast<double>(size.rows);
  add_rows(size, floats(mean), [&](int64_t i, int64_t) { return of_rows[i] * share; });
  add_rows(size, floats(var), [&](int64_t i, int64_t c) {
    const double far = static_cast<double>(of_rows[i]) - floats(mean)[c];
    return (vars_of_rows[i] + far * far) * share;
  });
  const Tensor scale = empty_vectors(y, 1, size.channels),
               shift = empty_vectors(y, 1, size.channels);
  for (int64_t c = 0; c < size.channels; ++c) {
    const double s = (factor ? factor->const_data_ptr<float>()[c] : 1.0) /
                     std::sqrt(static_cast<double>(floats(var)[c]) + eps);
    const double plus = offset ? offset->const_data_ptr<float>()[c] : 0.0;
    floats(scale)[c] = static_cast<float>(s);
    floats(shift)[c] = static_cast<float>(plus - s * floats(mean)[c]);
  }
  const auto [out, total] = channel_affine(y, scale, shift, added, integers[3] != 0);
  return {out, total, y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_batch_norm_backward(
    const MaybeTensor& grad_out, const MaybeTensor& grad_total, const Tensor& y, const Tensor& mean,
    const Tensor& var, const MaybeTensor& gamma, double eps) {
  check_shape("y", y, {-1, -1, -1});
  const Element element = activation_of("y", y);
  const BatchSize size = size_of(y);
  const Tensor values = channels_side_by_side(y);
  const auto of_out = like("grad_out", grad_out, y), of_total = like("grad_total", grad_total, y);
  const Tensor means = *channel_vector("mean", mean, size.channels);
  const Tensor vars = *channel_vector("var", var, size.channels);
  const auto factor = channel_vector("gamma", gamma, size.channels);
  const Tensor rows = empty_vectors(y, 2 * size.rows, size.channels);
  const auto channels = [&] {
    return torch::stable::new_empty(y, {size.channels}, ScalarType::Float);
  };
  const Tensor grad_bias = channels(), grad_gamma = channels(), grad_beta = channels();
  const Batch out = batch_of(of_out), sum = batch_of(of_total), from = batch_of(values);
  const ChannelKernel& kernel = channel_kernel(level());
  float *sums = floats(rows), *products = sums + size.rows * size.channels;
  each_row(size, threads(), kParallelFor, [&](int64_t b, int64_t first, int64_t last) {
    const NormSums row = {
        .grad_y = out.row(b),
        .grad_total = sum.row(b),
        .y = from.row(b),
        .mean = means.const_data_ptr<float>(),
        .sums = sums + b * size.channels,
        .products = products + b * size.channels,
    };
    kernel.norm_sums(row, element, size.frames, first, last);
  });
  add_rows(size, floats(grad_beta), [&](int64_t i, int64_t) { return sums[i]; });
  add_rows(size, floats(grad_gamma), [&](int64_t i, int64_t) { return products[i]; });
  // Of the batch norm's factor, and of mean and half of the variance.
  const Tensor coefficients = empty_vectors(y, 3, size.channels);
  float *scale = floats(coefficients), *of_mean = scale + size.channels,
        *of_var = of_mean + size.channels;
  for (int64_t c = 0; c < size.channels; ++c) {
    const double root = 1 / std::sqrt(static_cast<double>(vars.const_data_ptr<float>()[c]) + eps);
    const double s = root * (factor ? factor->const_data_ptr<float>()[c] : 1.0);
    scale[c] = static_cast<float>(s);
    of_mean[c] = static_cast<float>(-s * floats(grad_beta)[c]);
    of_var[c] = static_cast<float>(-s * root * root * floats(grad_gamma)[c] / 2);
    floats(grad_gamma)[c] = static_cast<float>(root * floats(grad_gamma)[c]);
  }
  const Tensor grad = empty_frames(y, size.channels, y.scalar_type());
  const Batch to = batch_of(grad);
  each_row(size, threads(), kParallelFor, [&](int64_t b, int64_t first, int64_t last) {
    const ReluGradient row = {
        .grad_y = out.row(b),
        .grad_total = sum.row(b),
        .scale = scale,
        .grad_mean = of_mean,
        .grad_var = of_var,
        .mean = means.const_data_ptr<float>(),
        .share = 1.0F / static_cast<float>(size.rows * size.frames),
        .y = from.row(b),
        .grad = to.row(b),
        .grad_bias = sums + b * size.channels,
    };
    kernel.relu_gradient(row, element, size.frames, first, last);
  });
  add_rows(size, floats(grad_bias), [&](int64_t i, int64_t) { return sums[i]; });
  return {grad, grad_bias, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("channel_affine", TORCH_BOX(&channel_affine));
  m.impl("channel_affine_backward", TORCH_BOX(&channel_affine_backward));
  m.impl("conv_batch_norm", TORCH_BOX(&conv_batch_norm));
  m.impl("conv_batch_norm_backward", TORCH_BOX(&conv_batch_norm_backward));
  m.impl("conv_input_gradient", TORCH_BOX(&conv_input_gradient));
  m.impl("conv_relu", TORCH_BOX(&conv_relu));
  m.impl("conv_relu_backward", TORCH_BOX(&conv_relu_backward));
}

}  // namespace spkfast::cpu
