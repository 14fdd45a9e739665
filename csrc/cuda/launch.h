// From tensors to launchers: types, devices, streams. Include after cuda_runtime_api.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "common/convert.cuh"

namespace spkfast::cuda {

inline FloatType float_type(const char* name, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        name, " must be Float, Half or BFloat16 on CUDA, got ", torch::headeronly::toString(dtype));
  if (dtype == ScalarType::Half) return FloatType::kHalf;
  return dtype == ScalarType::BFloat16 ? FloatType::kBfloat16 : FloatType::kFloat;
}

inline void check_beside(const char* name, const torch::stable::Tensor& tensor,
                         const torch::stable::Tensor& x) {
  check(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
        " must be on the device of x");
}

inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace spkfast::cuda
