// What the C++ forms of the products share: the layout of their tensors.
#pragma once

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

// An empty (B, channels, T), laid out so.
inline torch::stable::Tensor empty_frames(const torch::stable::Tensor& like, int64_t channels,
                                          torch::headeronly::ScalarType type) {
  return torch::stable::transpose(
      torch::stable::new_empty(like, {like.size(0), like.size(2), channels}, type), 1, 2);
}

}  // namespace spkfast
