#include "simd/avx512bf16.h"
// The vectors come first.
#include "weight_gradient_tile.h"

namespace spkfast::cpu {

const WeightGradientKernel& weight_gradient_avx512bf16() {
  static constexpr WeightGradientKernel kernel = {&turn, &pack, &run, &finish};
  return kernel;
}

}  // namespace spkfast::cpu
