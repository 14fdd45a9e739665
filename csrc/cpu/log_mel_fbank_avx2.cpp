#include "simd/avx2.h"
// The vectors come first.
#include "log_mel_fbank_frame.h"

namespace spkfast::cpu {

const LogMelFbankKernel& log_mel_fbank_avx2() {
  static constexpr LogMelFbankKernel kernel = {W,      &workspace_size, &tile,  &frame_workspace,
                                               &frame, &moments,        &finish};
  return kernel;
}

}  // namespace spkfast::cpu
