// What the C++ forms of the products share: the layout of their tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace spkfast {

// Rows of what follows a product, by output channel.
enum VectorRow { kBias, kScale, kShift, kUnit, kVectorRows };

// (B, C, T) with a frame's channels side by side; the stride of a single channel says nothing.
inline torch::stable::Tensor channels_side_by_side(const torch::stable::Tensor& x) {
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(x, 1, 2)), 1,
                                  2);
}

// An empty (B, channels, T), laid out so. Not the transpose of another tensor: outputs of ops with
// a gradient must not be views, or they could not be changed in place.
inline torch::stable::Tensor empty_frames(const torch::stable::Tensor& like, int64_t channels,
                                          torch::headeronly::ScalarType type) {
  const int64_t frames = like.size(2);
  const int64_t sizes[] = {like.size(0), channels, frames};
  const int64_t strides[] = {frames * channels, 1, channels};
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      3, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, like.get_device_index(), &made));
  return torch::stable::Tensor(made);
}

}  // namespace spkfast
