#include "simd/scalar.h"
// The vectors come first.
#include "log_mel_fbank_tile.h"

namespace spkfast::cpu {

const LogMelFbankKernel& log_mel_fbank_scalar() {
  static constexpr LogMelFbankKernel kernel = {W,       &workspace_size, &tile,  nullptr,
                                               nullptr, &moments,        &finish};
  return kernel;
}

}  // namespace spkfast::cpu
