// What all CPU kernels take from torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../checks.h"
#include "parallel_for.h"

namespace spkfast::cpu {

inline const ParallelFor kParallelFor = [](int64_t begin, int64_t end, int64_t grain,
                                           const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

inline std::optional<torch::stable::Tensor> checked_lengths(
    const char* name, const std::optional<torch::stable::Tensor>& lengths, int64_t batch) {
  if (!lengths) return lengths;
  check_dtype(name, *lengths, torch::headeronly::ScalarType::Long);
  check_shape(name, *lengths, {batch});
  return torch::stable::contiguous(*lengths);
}

}  // namespace spkfast::cpu
