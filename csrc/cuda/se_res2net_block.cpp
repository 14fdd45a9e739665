// se_res2net_block on CUDA: tensors to the launcher of kernels/cuda.
#include <cuda_runtime_api.h>
// cuda_runtime_api.h comes first: the torch macros below use its types.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <optional>
#include <vector>

#include "product_tensors.h"
#include "se_res2net_block.cuh"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `params` holds a weight and vectors for each layer: in, out, squeeze, excite, the shortcut where
// there is one, and the convolutions.
Tensor se_res2net_block(const Tensor& x, const std::vector<Tensor>& params,
                        const std::optional<Tensor>& padded, const std::optional<Tensor>& excited,
                        const std::vector<int64_t>& integers,
                        const std::vector<double>& /*floats*/) {
  check(integers.size() == 6, "se_res2net_block takes 6 integers, got ", integers.size());
  check_shape("x", x, {-1, -1, -1});
  const FloatType multiplied = multiplied_type(integers[0]);
  const int64_t convolutions = integers[1], taps = integers[2];
  check(convolutions >= 0 && convolutions <= kMaxRes2Convolutions,
        "on CUDA, a block must have at most ", kMaxRes2Convolutions, " Res2 convolutions, got ",
        convolutions);
  const bool shortcut = integers[5] != 0;
  const size_t layers = 4 + (shortcut ? 1 : 0) + convolutions;
  check(params.size() == 2 * layers, "se_res2net_block takes ", 2 * layers, " params, got ",
        params.size());
  check_shape("params", params[1], {kVectorRows, -1});
  check_shape("params", params[5], {kVectorRows, -1});
  const int64_t inputs = x.size(1), channels = params[1].size(1), units = params[5].size(1);
  check(channels % (convolutions + 1) == 0, "in must have a multiple of ", convolutions + 1,
        " channels, got ", channels);
  check(shortcut || inputs == channels, "x must have shape (B, ", channels, ", T), got ",
        shape_text(x));
  const int64_t width = channels / (convolutions + 1);
  const auto layer = [&](size_t i, FloatType type, int64_t rows, int64_t outputs) {
    check_given("params", params[2 * i], scalar_type(type), {rows, outputs}, x);
    check_given("params", params[2 * i + 1], ScalarType::Float, {kVectorRows, outputs}, x);
    return SERes2NetLayer{params[2 * i].const_data_ptr(),
                          params[2 * i + 1].const_data_ptr<float>()};
  };
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor values = channels_side_by_side(x);
  const auto pad_lengths = real_lengths("padded", padded, x);
  const auto mean_lengths = real_lengths("excited", excited, x);
  Tensor y = empty_frames(x, channels, x.scalar_type());
  SERes2NetBlockParams block = {
      .x = values.const_data_ptr(),
      .padded = counts_of(pad_lengths),
      .excited = counts_of(mean_lengths),
      .in = layer(0, multiplied, inputs, channels),
      .out = layer(1, multiplied, channels, channels),
      .squeeze = layer(2, FloatType::kFloat, channels, units),
      .excite = layer(3, FloatType::kFloat, units, channels),
      .shortcut = shortcut ? layer(4, multiplied, inputs, channels) : SERes2NetLayer{},
      .res = {},
      .y = y.mutable_data_ptr(),
      .workspace = nullptr,
      .batch = x.size(0),
      .inputs = inputs,
      .channels = channels,
      .units = units,
      .frames = x.size(2),
      .row_stride = values.stride(0),
      .frame_stride = values.stride(2),
      .taps = taps,
      .dilation = integers[3],
      .convolutions = static_cast<int32_t>(convolutions),
      .type = float_type("x", x.scalar_type()),
      .multiplied = multiplied,
      .reflect = (integers[4] & 1) != 0,
      .first_passes = (integers[4] & 2) != 0,
  };
  for (int64_t j = 0; j < convolutions; ++j) {
    block.res[j] = layer(layers - convolutions + j, multiplied, taps * width, width);
  }
  size_t floats = 0;
  STD_CUDA_CHECK(se_res2net_block_workspace(block, floats));
  Tensor workspace = torch::stable::new_empty(x, {static_cast<int64_t>(floats)}, ScalarType::Float);
  block.workspace = workspace.mutable_data_ptr<float>();
  STD_CUDA_CHECK(launch_se_res2net_block(block, current_stream(x)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) {
  m.impl("se_res2net_block", TORCH_BOX(&se_res2net_block));
}

}  // namespace spkfast::cuda
