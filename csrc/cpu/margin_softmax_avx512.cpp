#include "simd/avx512.h"
// The vectors come first.
#include "margin_softmax_tile.h"

namespace spkfast::cpu {

const MarginSoftmaxKernel& margin_softmax_avx512() {
  static constexpr MarginSoftmaxKernel kernel = {&inverse_lengths, &add, &gradients, &project};
  return kernel;
}

}  // namespace spkfast::cpu
