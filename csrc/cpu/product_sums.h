// Sums of products of a tile of frames and channels, over vectors of one instruction set, whose
// header the including unit names before.
#pragma once

#include "product_kernel.h"
#include "simd/dots.h"
#include "simd/each.h"

namespace {

using spkfast::cpu::kPanel;
using spkfast::cpu::kStepBytes;
using spkfast::cpu::Product;
using spkfast::cpu::Source;

// Frames and vectors of channels of a tile: its sums and a step of the weight fit the registers.
constexpr int kTileRows = W == 4 ? 4 : 6, kTileColumns = W == 16 ? 4 : 2;
static_assert(kPanel % (kTileColumns * W) == 0);

[[gnu::always_inline]] inline V broadcast(const char* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof(word));
  return all(word);
}

// Where a frame of a source lies.
inline const char* frame_of(const Product& product, const Source& source, int64_t frame) {
  int64_t t = frame + source.shift;
  if (t < 0 || t >= product.frames) {
    if (!product.reflect) return product.beyond;
    const int64_t period = product.frames > 1 ? 2 * product.frames - 2 : 1;
    t = (t % period + period) % period;
    t = smaller(t, period - t);
  }
  return source.data + t * source.stride;
}

// Adds the products of R frames from `frame` on, of which `count` exist, to their sums for N
// vectors of the channels whose weights begin at `weight`. `beside(at)` is called before the step
// at byte 0 of each source, and tells before which one it wants to be called again.
template <typename Dot, int R, int N, typename Beside>
[[gnu::always_inline]] inline void add_to(const Product& product, int64_t frame, int64_t count,
                                          const char* weight, V (&sums)[R * N], Beside beside) {
  constexpr int64_t kWeightStep = kPanel * kStepBytes;
  for (int64_t s = 0; s < product.num_sources; ++s) {
    const Source& source = product.sources[s];
    const char* rows[R];
    each<R>([&](auto r) __attribute__((always_inline)) {
      rows[r] = frame_of(product, source, frame + smaller(r, count - 1));
    });
    const int64_t bytes = source.steps * kStepBytes;
    for (int64_t at = 0; at < bytes;) {
      const int64_t end = smaller(bytes, beside(at));
      for (; at < end; at += kStepBytes) {
        V right[N];
        each<N>([&](auto n) __attribute__((always_inline)) {
          right[n] = load(reinterpret_cast<const float*>(weight) + n * W);
        });
        each<R>([&](auto r) __attribute__((always_inline)) {
          const V left = broadcast(rows[r] + at);
          each<N>([&](auto n) __attribute__((always_inline)) {
            sums[r * N + n] = Dot::add(sums[r * N + n], left, right[n]);
          });
        });
        weight += kWeightStep;
      }
    }
  }
}

// The sums alone.
template <typename Dot, int R, int N>
[[gnu::always_inline]] inline void add_up(const Product& product, int64_t frame, int64_t count,
                                          const char* weight, V (&sums)[R * N]) {
  each<R * N>([&](auto i) __attribute__((always_inline)) { sums[i] = V{}; });
  add_to<Dot, R, N>(product, frame, count, weight, sums,
                    [](int64_t) __attribute__((always_inline)) { return INT64_MAX; });
}

}  // namespace
