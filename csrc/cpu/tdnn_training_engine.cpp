#include "tdnn_training_engine.h"

#include <algorithm>

namespace spkfast::cpu {

const ChannelKernel& channel_kernel(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512bf16) return channel_avx512bf16();
  if (level == Level::avx512) return channel_avx512();
  if (level == Level::avx2) return channel_avx2();
#else
  (void)level;
#endif
  return channel_scalar();
}

void each_row(const BatchSize& size, int64_t threads, const ParallelFor& parallel_for,
              const std::function<void(int64_t, int64_t, int64_t)>& body) {
  // Values that are worth a second thread.
  constexpr int64_t kTaskValues = 1 << 14;
  // Whole rows, which lie in one place in memory, where there are enough of them.
  const int64_t parts = size.rows >= threads ? 1 : panels_of(size.channels);
  const int64_t channels = parts == 1 ? size.channels : kPanel;
  parallel_for(0, size.rows * parts, 1 + kTaskValues / (channels * size.frames + 1),
               [&](int64_t from, int64_t to) {
                 for (int64_t i = from; i < to; ++i) {
                   const int64_t first = i % parts * channels;
                   body(i / parts, first, std::min(size.channels, first + channels));
                 }
               });
}

}  // namespace spkfast::cpu
