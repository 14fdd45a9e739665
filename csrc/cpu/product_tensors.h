// From tensors to what the engines of the products take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../product.h"
#include "product_engine.h"
#include "tensors.h"

namespace spkfast::cpu {

inline Operand operand_of(int64_t precision) {
  check(precision >= 0 && precision <= 2, "precision must be 0, 1 or 2, got ", precision);
  return static_cast<Operand>(precision);
}

inline Element activation_of(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, name,
        " must be Float or BFloat16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? Element::float32 : Element::bfloat16;
}

inline Batch batch_of(const torch::stable::Tensor& x) {
  const int64_t size = x.element_size();
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.stride(0) * size,
          x.stride(2) * size};
}

inline RealFrames real_frames(const torch::stable::Tensor& x,
                              const std::optional<torch::stable::Tensor>& lengths) {
  return {x.size(0), x.size(2), lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// A layer from its packed weight and its vectors, which must outlive it.
inline Layer layer_of(const char* name, const Weight& form, const torch::stable::Tensor& weight,
                      const torch::stable::Tensor& vectors, bool relu, bool affine, bool tanh,
                      Quantiser quantiser) {
  using torch::headeronly::ScalarType;
  check_dtype(name, weight, ScalarType::Byte);
  check_dtype(name, vectors, ScalarType::Float);
  check_shape(name, weight, {form.packed_bytes()});
  check_shape(name, vectors, {kVectorRows, form.channels});
  check(weight.is_contiguous() && vectors.is_contiguous(), name, " must be contiguous");
  const float* rows = vectors.const_data_ptr<float>();
  const auto row = [&](VectorRow r, bool used) {
    return used ? rows + r * form.channels : nullptr;
  };
  return {form,
          static_cast<const char*>(weight.const_data_ptr()),
          row(kUnit, form.operand == Operand::int8),
          row(kBias, true),
          row(kScale, affine),
          row(kShift, affine),
          quantiser,
          relu,
          tanh};
}

}  // namespace spkfast::cpu
