// From tensors to what the engines of attentive_stats_pool take.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
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
