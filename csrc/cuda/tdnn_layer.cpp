// tdnn_layer on CUDA: tensors to the launcher of kernels/cuda.
#include <cuda_runtime_api.h>
// cuda_runtime_api.h comes first: the torch macros below use its types.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "product_tensors.h"
#include "tdnn_layer.cuh"

namespace spkfast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor tdnn_layer(const std::vector<Tensor>& x, const Tensor& weight, const Tensor& vectors,
                  const std::optional<Tensor>& offset, const std::optional<Tensor>& lengths,
                  const std::vector<int64_t>& integers, const std::vector<double>& /*floats*/) {
  check(!x.empty() && x.size() <= kMaxTdnnInputs, "on CUDA, x must have 1 to ", kMaxTdnnInputs,
        " tensors, got ", x.size());
  check(integers.size() == 7, "tdnn_layer takes 7 integers, got ", integers.size());
  check_shape("x", x[0], {-1, -1, -1});
  check_shape("vectors", vectors, {kVectorRows, -1});
  const int64_t batch = x[0].size(0), frames = x[0].size(2), channels = vectors.size(1);
  const FloatType multiplied = multiplied_type(integers[0]);
  const torch::stable::accelerator::DeviceGuard guard(x[0].get_device_index());
  TdnnLayerParams params = {};
  std::vector<Tensor> inputs;
  int64_t rows = 0;
  for (const Tensor& part : x) {
    check_dtype("x", part, x[0].scalar_type());
    check_shape("x", part, {batch, -1, frames});
    check_beside("x", part, x[0]);
    const Tensor& values = inputs.emplace_back(channels_side_by_side(part));
    params.inputs[params.num_inputs++] = {values.const_data_ptr(), values.stride(0),
                                          values.stride(2), values.size(1)};
    rows += values.size(1) * integers[1];
  }
  check_given("weight", weight, scalar_type(multiplied), {rows, channels}, x[0]);
  check_given("vectors", vectors, ScalarType::Float, {kVectorRows, channels}, x[0]);
  std::optional<Tensor> added;
  if (offset) {
    added = torch::stable::contiguous(*offset);
    check_given("offset", *added, ScalarType::Float, {batch, channels}, x[0]);
  }
  const auto counts = real_lengths("lengths", lengths, x[0]);
  Tensor out = empty_frames(x[0], channels, scalar_type(multiplied));
  params.weight = weight.const_data_ptr();
  params.vectors = vectors.const_data_ptr<float>();
  params.offset = added ? added->const_data_ptr<float>() : nullptr;
  params.lengths = counts_of(counts);
  params.out = out.mutable_data_ptr();
  params.batch = batch;
  params.channels = channels;
  params.frames = frames;
  params.taps = integers[1];
  params.dilation = integers[2];
  params.type = float_type("x", x[0].scalar_type());
  params.multiplied = params.out_type = multiplied;
  params.reflect = integers[3] != 0;
  params.relu = integers[4] != 0;
  params.affine = integers[5] != 0;
  params.tanh = integers[6] != 0;
  STD_CUDA_CHECK(launch_tdnn_layer(params, current_stream(x[0])));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CUDA, m) { m.impl("tdnn_layer", TORCH_BOX(&tdnn_layer)); }

}  // namespace spkfast::cuda
