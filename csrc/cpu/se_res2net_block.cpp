// CPU kernel of se_res2net_block: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include "product_tensors.h"
#include "se_res2net_block_engine.h"

namespace spkfast::cpu {
namespace {

using torch::stable::Tensor;

// `params` holds a packed weight and vectors for each layer: in, out, squeeze, excite, the shortcut
// where there is one, and the convolutions.
Tensor se_res2net_block(const Tensor& x, const std::vector<Tensor>& params,
                        const std::optional<Tensor>& padded, const std::optional<Tensor>& excited,
                        const std::vector<int64_t>& integers, const std::vector<double>& floats) {
  check(integers.size() == 6, "se_res2net_block takes 6 integers, got ", integers.size());
  check_shape("x", x, {-1, -1, -1});
  const Operand operand = operand_of(integers[0]);
  const int64_t convolved = integers[1], taps = integers[2], batch = x.size(0);
  const bool shortcut = integers[5] != 0;
  check(convolved >= 0, "the number of convolutions must not be negative, got ", convolved);
  check(taps >= 1 && taps % 2 == 1, "taps must be odd, got ", taps);
  const size_t layers = 4 + (shortcut ? 1 : 0) + convolved, quantisers = 2 + convolved;
  check(params.size() == 2 * layers && floats.size() == 2 * quantisers, "se_res2net_block takes ",
        2 * layers, " params and ", 2 * quantisers, " floats, got ", params.size(), " and ",
        floats.size());
  for (size_t i = 1; i < params.size(); i += 2) check_shape("params", params[i], {kVectorRows, -1});
  const int64_t inputs = x.size(1), channels = params[1].size(1), units = params[5].size(1);
  const int64_t width = channels / (convolved + 1);
  check(channels % (convolved + 1) == 0, "channels must be a multiple of ", convolved + 1, ", got ",
        channels);
  check(shortcut || inputs == channels, "x must have ", channels, " channels, got ", inputs);
  const auto layer = [&](size_t i, const Weight& form, bool relu, bool affine, size_t quantiser) {
    const Quantiser q = {static_cast<float>(floats[2 * quantiser]),
                         static_cast<float>(floats[2 * quantiser + 1])};
    return layer_of("params", form, params[2 * i], params[2 * i + 1], relu, affine, false, q);
  };
  const Element element = activation_of("x", x);
  const Tensor values = channels_side_by_side(x);
  const auto pad_lengths = checked_lengths("padded", padded, batch);
  const auto mean_lengths = checked_lengths("excited", excited, batch);
  const Tensor y = empty_frames(x, channels, x.scalar_type());
  Layer added = {};
  if (shortcut) added = layer(4, {operand, channels, 1, {inputs}}, false, false, 0);
  SERes2NetBlock block = {
      .element = element,
      .in = layer(0, {operand, channels, 1, {inputs}}, true, true, 0),
      .out = layer(1, {operand, channels, 1, {channels}}, true, true, 1),
      .res = {},
      .squeeze = layer(2, {Operand::float32, units, 1, {channels}}, true, false, 0),
      .excite = layer(3, {Operand::float32, channels, 1, {units}}, false, false, 0),
      .shortcut = shortcut ? &added : nullptr,
      .width = width,
      .dilation = integers[3],
      .reflect = (integers[4] & 1) != 0,
      .first_passes = (integers[4] & 2) != 0,
      .x = batch_of(values),
      .y = batch_of(y)};
  for (int64_t j = 0; j < convolved; ++j) {
    block.res.push_back(
        layer(layers - convolved + j, {operand, width, taps, {width}}, true, true, 2 + j));
  }
  run_se_res2net_block(block, real_frames(x, pad_lengths), real_frames(x, mean_lengths), level(),
                       torch::stable::get_num_threads(), kParallelFor);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("se_res2net_block", TORCH_BOX(&se_res2net_block));
}

}  // namespace spkfast::cpu
