// What the C++ forms of attentive_stats_pool share: checks and the layout of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"

namespace spkfast {

// Whether the channels of a frame lie side by side, and the frames of a channel do not: then
// gradients are laid out alike. spkfast/ops/attentive_stats_pool.py has the rule too.
inline bool channels_last(const torch::stable::Tensor& x) {
  return x.stride(1) == 1 && x.stride(2) != 1;
}

// x with its frames side by side, or its channels where they already are; the rest may have any
// strides.
inline torch::stable::Tensor readable(const torch::stable::Tensor& x) {
  return x.stride(2) == 1 || channels_last(x) ? x : torch::stable::contiguous(x);
}

// `value` in the layout of `x`, channels last or not.
inline torch::stable::Tensor laid_out(const torch::stable::Tensor& value, bool last) {
  if (last == channels_last(value)) return readable(value);
  if (!last) return torch::stable::contiguous(value);
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(value, 1, 2)),
                                  1, 2);
}

// An empty tensor like x, in the layout of its gradient.
inline torch::stable::Tensor empty_gradient(const torch::stable::Tensor& x) {
  if (!channels_last(x)) return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  return torch::stable::transpose(torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)}), 1,
                                  2);
}

}  // namespace spkfast
