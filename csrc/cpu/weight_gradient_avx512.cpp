#include "simd/avx512.h"
// The vectors come first.
#include "weight_gradient_tile.h"

namespace spkfast::cpu {

const WeightGradientKernel& weight_gradient_avx512() {
  static constexpr WeightGradientKernel kernel = {&turn, &pack, &run, &finish};
  return kernel;
}

}  // namespace spkfast::cpu
