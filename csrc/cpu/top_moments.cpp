// CPU kernel of top_moments: tensors checked, then handed to the engine as raw pointers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "scoring_engine.h"
#include "tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> top_moments(const Tensor& scores, int64_t n) {
  check_dtype("scores", scores, ScalarType::Float);
  check_shape("scores", scores, {-1, -1});
  check(n >= 1 && n <= scores.size(1), "n must lie in 1..", scores.size(1), ", got ", n);
  const Tensor x = torch::stable::contiguous(scores);
  Tensor mean = torch::stable::new_empty(x, {x.size(0)});
  Tensor std = torch::stable::new_empty(x, {x.size(0)});
  run_top_moments({x.const_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                   std.mutable_data_ptr<float>(), x.size(0), x.size(1), n},
                  kParallelFor);
  return {mean, std};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) { m.impl("top_moments", TORCH_BOX(&top_moments)); }

}  // namespace spkfast::cpu
