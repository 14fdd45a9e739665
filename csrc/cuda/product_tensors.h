// From tensors to what the launchers of the products take. Include after cuda_runtime_api.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../product.h"
#include "launch.h"

namespace spkfast::cuda {

inline torch::headeronly::ScalarType scalar_type(FloatType type) {
  using torch::headeronly::ScalarType;
  if (type == FloatType::kFloat) return ScalarType::Float;
  return type == FloatType::kHalf ? ScalarType::Half : ScalarType::BFloat16;
}

// What a precision multiplies, by its number in the ops; bytes are for the CPU.
inline FloatType multiplied_type(int64_t precision) {
  check(precision == 0 || precision == 1 || precision == 3,
        "precision must be 0, 1 or 3 on CUDA, got ", precision);
  if (precision == 0) return FloatType::kFloat;
  return precision == 1 ? FloatType::kBfloat16 : FloatType::kHalf;
}

// A tensor as the kernels read it in place; what they are handed must outlive their launch.
inline void check_given(const char* name, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> shape,
                        const torch::stable::Tensor& x) {
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, shape);
  check_beside(name, tensor, x);
  check(tensor.is_contiguous(), name, " must be contiguous");
}

inline std::optional<torch::stable::Tensor> real_lengths(
    const char* name, const std::optional<torch::stable::Tensor>& lengths,
    const torch::stable::Tensor& x) {
  if (!lengths) return lengths;
  const torch::stable::Tensor counts = torch::stable::contiguous(*lengths);
  check_given(name, counts, torch::headeronly::ScalarType::Long, {x.size(0)}, x);
  return counts;
}

inline const int64_t* counts_of(const std::optional<torch::stable::Tensor>& lengths) {
  return lengths ? lengths->const_data_ptr<int64_t>() : nullptr;
}

}  // namespace spkfast::cuda
