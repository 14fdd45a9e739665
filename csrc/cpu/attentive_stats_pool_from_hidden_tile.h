// The kernel of attentive_stats_pool_from_hidden over vectors of one instruction set, whose header
// the including unit names before: a block of logits at a time, pooled while it is in the cache.
#pragma once

#include "attentive_stats_pool_from_hidden_kernel.h"
#include "attentive_stats_pool_parts.h"

namespace {

using spkfast::cpu::AttentiveStatsPoolFromHiddenBatch;
using spkfast::cpu::kHiddenPadding;

// Sizes of a product: what is accumulated, two operands' vectors beside it, fits the registers.
// Strips of channels with panels of frames, and strips of frames with panels of channels.
constexpr int kChannelStrip = W == 16 ? 8 : 4, kFramePanel = 3;
constexpr int kFrameStrip = 6, kChannelPanel = W == 16 ? 4 : 2;
static_assert(kPoolChannels % kChannelStrip == 0 && kPoolChannels % (kChannelPanel * W) == 0);
static_assert(kHiddenPadding % (kFramePanel * W) == 0 && kHiddenPadding % kFrameStrip == 0);
// Frames between two merges, where the lanes are frames.
constexpr int64_t kBlockFrames = 480;
static_assert(kBlockFrames % (kFramePanel * W) == 0 && kTileFrames % kFrameStrip == 0);

// out[m * step + n] = sum over units of strip[unit * M + m] * panel[unit * width + n], n up to N
// vectors.
template <int M, int N>
[[gnu::always_inline]] inline void product(const float* strip, const float* panel, int64_t width,
                                           int64_t units, float* out, int64_t step) {
  V sums[M * N] = {};
  for (int64_t unit = 0; unit < units; ++unit) {
    V right[N];
    each<N>([&](auto n) __attribute__((always_inline)) { right[n] = load(panel + n * W); });
    each<M>([&](auto m) __attribute__((always_inline)) {
      const V left = all(strip[m]);
      each<N>([&](auto n) __attribute__((always_inline)) {
        sums[m * N + n] = madd(left, right[n], sums[m * N + n]);
      });
    });
    strip += M;
    panel += width;
  }
  each<M>([&](auto m) __attribute__((always_inline)) {
    each<N>([&](auto n)
                __attribute__((always_inline)) { store(out + m * step + n * W, sums[m * N + n]); });
  });
}

// Calls put(i, value) for each of `count` values from p on, as floats.
template <typename T, typename Put>
[[gnu::always_inline]] inline void for_values(const T* p, int64_t count, Put put) {
  float values[W];
  extent_of(count).each([&](int64_t i, auto width) __attribute__((always_inline)) {
    store(values, width.read(p + i * W, V{}));
    for (int64_t w = 0; w < smaller(W, count - i * W); ++w) put(i * W + w, values[w]);
  });
}

// Where the value of a unit belongs, in pieces of `width` channels or frames, of which it is number
// i.
struct Packed {
  float* data;
  int64_t units, width;
  float& at(int64_t unit, int64_t i) const {
    return data[i / width * units * width + unit * width + i % width];
  }
};

void pack_weight(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t group, float* out) {
  const int64_t first = group * kPoolChannels;
  const Packed packed = {out, batch.units + 1,
                         batch.pool.channels_last ? kChannelPanel * W : kChannelStrip};
  clear(out, kPoolChannels * packed.units);
  by_element(batch.pool.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t count = smaller(kPoolChannels, batch.pool.channels - first);
    for (int64_t c = 0; c < count; ++c) {
      for_values(static_cast<const T*>(batch.weight) + (first + c) * batch.weight_stride,
                 batch.units, [&](int64_t unit, float value) { packed.at(unit, c) = value; });
    }
    for_values(static_cast<const T*>(batch.bias) + first, count,
               [&](int64_t c, float value) { packed.at(batch.units, c) = value; });
  });
}

void pack_hidden(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, float* out) {
  const int64_t length = batch.pool.length(row);
  const Packed packed = {out, batch.units + 1,
                         batch.pool.channels_last ? kFrameStrip : kFramePanel * W};
  clear(out, (length + packed.width - 1) / packed.width * packed.width * packed.units);
  by_element(batch.pool.element, [&](auto zero) __attribute__((always_inline)) {
    const auto* hidden =
        static_cast<const decltype(zero)*>(batch.hidden) + row * batch.hidden_batch_stride;
    for (int64_t unit = 0; unit < batch.units; ++unit) {
      for_values(hidden + unit * batch.hidden_unit_stride, length,
                 [&](int64_t t, float value) { packed.at(unit, t) = value; });
    }
  });
  for (int64_t t = 0; t < length; ++t) packed.at(batch.units, t) = 1;
}

// Logits of a strip of channels for `frames` frames, which start at a panel.
inline void strip_logits(const float* strip, const float* panels, int64_t units, int64_t frames,
                         float* out) {
  constexpr int64_t kWidth = kFramePanel * W;
  for (int64_t t = 0; t < frames; t += kWidth) {
    const float* panel = panels + t * units;
    const int64_t left = frames - t;
    if (left > 2 * W) {
      product<kChannelStrip, 3>(strip, panel, kWidth, units, out + t, kBlockFrames);
    } else if (left > W) {
      product<kChannelStrip, 2>(strip, panel, kWidth, units, out + t, kBlockFrames);
    } else {
      product<kChannelStrip, 1>(strip, panel, kWidth, units, out + t, kBlockFrames);
    }
  }
}

// Adds frames t to t + frames of N channels to their moments; their logits lie kBlockFrames apart
// and are lost.
template <int N, typename T>
[[gnu::always_inline]] inline void add_frames(const PoolTensor& tensor, int64_t row,
                                              int64_t channel, int64_t t, int64_t frames,
                                              float* logits, Moments* seen) {
  const Sequences<T> x = {at<T>(tensor, row, channel, t), tensor.channel_stride, W};
  const auto ahead = [&](int64_t s, int64_t i)
                         __attribute__((always_inline)) { x.prefetch(s + kChannelStrip, i); };
  Moments block[N];
  softmax_moments<N>(Sequences<float>{logits, kBlockFrames, W}, x, extent_of(frames), logits,
                     kBlockFrames, ahead, block);
  each<N>([&](auto s) __attribute__((always_inline)) {
    seen[s] = t ? merged(seen[s], block[s]) : block[s];
  });
}

template <typename T>
void from_hidden_frames(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, int64_t first,
                        int64_t count, const float* weight, const float* hidden) {
  alignas(64) float logits[kChannelStrip * kBlockFrames];
  const PoolTensor& x = batch.pool.x;
  const int64_t length = batch.pool.length(row), units = batch.units + 1;
  Moments channels[kPoolChannels] = {}, seen[kTileVectors];
  for (int64_t strip = 0; strip < count; strip += kChannelStrip) {
    const int64_t inside = smaller(kChannelStrip, count - strip);
    for (int64_t t = 0; t < length; t += kBlockFrames) {
      const int64_t frames = smaller(kBlockFrames, length - t);
      strip_logits(weight + strip * units, hidden + t * units, units, frames, logits);
      int64_t c = 0;
      for (; c + kSequences <= inside; c += kSequences) {
        add_frames<kSequences, T>(x, row, first + strip + c, t, frames, logits + c * kBlockFrames,
                                  channels + strip + c);
      }
      for (; c < inside; ++c) {
        add_frames<1, T>(x, row, first + strip + c, t, frames, logits + c * kBlockFrames,
                         channels + strip + c);
      }
    }
  }
  for (int64_t v = 0; v * W < count; ++v) seen[v] = gathered(channels + v * W);
  write_moments(batch.pool, row * batch.pool.channels + first, seen, count);
}

template <typename T>
void from_hidden_channels(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row,
                          int64_t first, int64_t count, const float* weight, const float* hidden) {
  constexpr int64_t kWidth = kChannelPanel * W;
  alignas(64) float x[kTileFrames * kPoolChannels], logits[kTileFrames * kPoolChannels];
  const int64_t length = batch.pool.length(row), units = batch.units + 1;
  Moments seen[kTileVectors];
  for (int64_t t = 0; t < length; t += kTileFrames) {
    const int64_t frames = smaller(kTileFrames, length - t);
    for (int64_t i = 0; i < frames; ++i)
      copy_channels(at<T>(batch.pool.x, row, first, t + i), count, x + i * kPoolChannels);
    for (int64_t c = 0; c < count; c += kWidth) {
      for (int64_t i = 0; i < frames; i += kFrameStrip) {
        product<kFrameStrip, kChannelPanel>(hidden + (t + i) * units, weight + c * units, kWidth,
                                            units, logits + i * kPoolChannels + c, kPoolChannels);
      }
    }
    const auto ahead = [&](int64_t v, int64_t i) __attribute__((always_inline)) {
      __builtin_prefetch(at<T>(batch.pool.x, row, first + v * W, t + kTileFrames + i));
    };
    add_tile<false>({x, logits, nullptr, frames}, count, t == 0, ahead, seen);
  }
  write_moments(batch.pool, row * batch.pool.channels + first, seen, count);
}

void forward_from_hidden(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row, int64_t group,
                         const float* weight, const float* hidden) {
  const int64_t first = group * kPoolChannels;
  const int64_t count = smaller(kPoolChannels, batch.pool.channels - first);
  if (batch.pool.length(row) == 0)
    return write_nothing(batch.pool, row * batch.pool.channels + first, count);
  by_element(batch.pool.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    if (batch.pool.channels_last)
      return from_hidden_channels<T>(batch, row, first, count, weight, hidden);
    return from_hidden_frames<T>(batch, row, first, count, weight, hidden);
  });
}

}  // namespace
