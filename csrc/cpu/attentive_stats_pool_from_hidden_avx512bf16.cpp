#include "simd/avx512bf16.h"
// The vectors come first.
#include "attentive_stats_pool_from_hidden_tile.h"

namespace spkfast::cpu {

const AttentiveStatsPoolFromHiddenKernel& attentive_stats_pool_from_hidden_avx512bf16() {
  static constexpr AttentiveStatsPoolFromHiddenKernel kernel = {&pack_weight, &pack_hidden,
                                                                &forward_from_hidden};
  return kernel;
}

}  // namespace spkfast::cpu
