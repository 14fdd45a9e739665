#include "simd/scalar.h"
// The vectors come first.
#include "product_tile.h"

namespace spkfast::cpu {

const ProductKernel& product_scalar() {
  static constexpr ProductKernel kernel = {&run, &convert, &turn, &means, &moments, &gate};
  return kernel;
}

}  // namespace spkfast::cpu
