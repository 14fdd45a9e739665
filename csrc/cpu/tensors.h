// What all CPU kernels take from torch.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
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

// Asks for huge pages under a new tensor that will be written whole. A large one is fresh memory,
// of which the kernel otherwise provides and clears 4 kB at a time: that took longer than the
// gradients.
inline void use_huge_pages([[maybe_unused]] const torch::stable::Tensor& tensor) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const auto first = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + tensor.numel() * tensor.element_size()) / kPage * kPage;
  // Where there are none the memory stays as it is.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace spkfast::cpu
