#include "simd/avx2.h"
// The vectors come first.
#include "product_tile.h"

namespace spkfast::cpu {

const ProductKernel& product_avx2() {
  static constexpr ProductKernel kernel = {&run, &convert, &turn, &means, &moments, &gate};
  return kernel;
}

}  // namespace spkfast::cpu
