#include "simd/avx2.h"
// The vectors come first.
#include "attentive_stats_pool_tile.h"

namespace spkfast::cpu {

const AttentiveStatsPoolKernel& attentive_stats_pool_avx2() {
  static constexpr AttentiveStatsPoolKernel kernel = {&row_weights, &row_shares, &forward,
                                                      &backward, &finish_shared};
  return kernel;
}

}  // namespace spkfast::cpu
