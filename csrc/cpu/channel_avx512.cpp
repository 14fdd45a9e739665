#include "simd/avx512.h"
// The vectors come first.
#include "channel_tile.h"

namespace spkfast::cpu {

const ChannelKernel& channel_avx512() {
  static constexpr ChannelKernel kernel = {&affine, &affine_gradient, &norm_sums, &relu_gradient};
  return kernel;
}

}  // namespace spkfast::cpu
