// From tensors to what the engines of attentive_stats_pool take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../attentive_stats_pool.h"
#include "attentive_stats_pool_engine.h"
#include "tensors.h"

namespace spkfast::cpu {

inline Element element_of(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
        " must be Float, BFloat16 or Half, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float      ? Element::float32
         : type == ScalarType::BFloat16 ? Element::bfloat16
                                        : Element::float16;
}

inline PoolTensor pool_tensor(const torch::stable::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

}  // namespace spkfast::cpu
