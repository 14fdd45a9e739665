#include "simd/avx512bf16.h"
// The vectors come first.
#include "channel_tile.h"

namespace spkfast::cpu {

const ChannelKernel& channel_avx512bf16() {
  static constexpr ChannelKernel kernel = {&affine, &affine_gradient, &norm_sums, &relu_gradient};
  return kernel;
}

}  // namespace spkfast::cpu
