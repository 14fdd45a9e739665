#include "simd/scalar.h"
// The vectors come first.
#include "weight_gradient_tile.h"

namespace spkfast::cpu {

const WeightGradientKernel& weight_gradient_scalar() {
  static constexpr WeightGradientKernel kernel = {&turn, &pack, &run, &finish};
  return kernel;
}

}  // namespace spkfast::cpu
