// CPU kernel of paired_dot: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "scoring_engine.h"
#include "tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor rows_of(const char* name, const Tensor& x, int64_t size) {
  check_dtype(name, x, ScalarType::Float);
  check_shape(name, x, {-1, size});
  return torch::stable::contiguous(x);
}

Tensor index_of(const char* name, const Tensor& index, int64_t pairs, int64_t rows) {
  check_dtype(name, index, ScalarType::Long);
  check_shape(name, index, {pairs});
  Tensor found = torch::stable::contiguous(index);
  const int64_t* p = found.const_data_ptr<int64_t>();
  if (pairs > 0) {
    const auto [low, high] = std::minmax_element(p, p + pairs);
    check(*low >= 0 && *high < rows, name, " must lie in 0..", rows - 1, ", got ", *low, " to ",
          *high);
  }
  return found;
}

Tensor paired_dot(const Tensor& a, const Tensor& b, const Tensor& first, const Tensor& second) {
  const Tensor left = rows_of("a", a, -1);
  const Tensor right = rows_of("b", b, a.size(1));
  const int64_t pairs = first.numel();
  const Tensor one = index_of("first", first, pairs, a.size(0));
  const Tensor other = index_of("second", second, pairs, b.size(0));
  Tensor out = torch::stable::new_empty(left, {pairs});
  run_paired_dot(
      {left.const_data_ptr<float>(), right.const_data_ptr<float>(), one.const_data_ptr<int64_t>(),
       other.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), pairs, a.size(1)},
      kParallelFor);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) { m.impl("paired_dot", TORCH_BOX(&paired_dot)); }

}  // namespace spkfast::cpu
