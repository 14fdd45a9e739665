// What the ops of augmentation take from torch.
#pragma once

#include "augmentation_engine.h"
#include "tensors.h"

namespace spkfast::cpu {

// Samples of a contiguous tensor, float32 or int16.
inline Samples samples_of(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const bool shorts = tensor.scalar_type() == ScalarType::Short;
  check(shorts || tensor.scalar_type() == ScalarType::Float, name,
        " must be float32 or int16, got ", torch::headeronly::toString(tensor.scalar_type()));
  if (shorts) return {nullptr, tensor.const_data_ptr<int16_t>()};
  return {tensor.const_data_ptr<float>(), nullptr};
}

// A contiguous int64 tensor of a shape.
inline torch::stable::Tensor indexes(const char* name, const torch::stable::Tensor& tensor,
                                     std::initializer_list<int64_t> shape) {
  check_dtype(name, tensor, torch::headeronly::ScalarType::Long);
  check_shape(name, tensor, shape);
  return torch::stable::contiguous(tensor);
}

// Refuses recordings that are not inside.
inline void check_inside(const char* name, const torch::stable::Tensor& recordings,
                         const torch::stable::Tensor& begins, const torch::stable::Tensor& sizes) {
  const int64_t total = recordings.size(0);
  const int64_t *begin = begins.const_data_ptr<int64_t>(), *size = sizes.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < static_cast<int64_t>(begins.numel()); ++k) {
    if (size[k] <= 0) continue;
    check(begin[k] >= 0 && begin[k] <= total && size[k] <= total - begin[k],
          "begins and sizes must", " lie inside the ", total, " samples of ", name, ", got ",
          begin[k], " and ", size[k]);
  }
}

}  // namespace spkfast::cpu
