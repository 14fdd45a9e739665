#include "simd/scalar.h"
// The vectors come first.
#include "channel_tile.h"

namespace spkfast::cpu {

const ChannelKernel& channel_scalar() {
  static constexpr ChannelKernel kernel = {&affine, &affine_gradient, &norm_sums, &relu_gradient};
  return kernel;
}

}  // namespace spkfast::cpu
