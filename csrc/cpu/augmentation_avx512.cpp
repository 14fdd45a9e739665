#include "simd/avx512.h"
// The vectors come first.
#include "augmentation_tile.h"

namespace spkfast::cpu {

const AugmentationKernel& augmentation_avx512() {
  static constexpr AugmentationKernel kernel = {W,    &to_floats, &change_speed, &energy,
                                                &add, &spectrum,  &convolved};
  return kernel;
}

}  // namespace spkfast::cpu
