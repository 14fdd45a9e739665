// The kernel of attentive_stats_pool_from_hidden over vectors of one instruction set, whose header
// the including unit names before: a block of logits at a time, pooled while it is in the cache.
#pragma once

#include "attentive_stats_pool_from_hidden_kernel.h"
#include "attentive_stats_pool_parts.h"
#include "product_sums.h"

namespace {

using spkfast::cpu::AttentiveStatsPoolFromHiddenBatch;
using spkfast::cpu::kHiddenPadding;
using spkfast::cpu::Operand;

// Sizes of a product where the lanes are frames: what is accumulated, two operands' vectors beside
// it, fits the registers.
constexpr int kChannelStrip = W == 16 ? 8 : 4, kFramePanel = 3;
static_assert(kPoolChannels % kChannelStrip == 0 && kPoolChannels == kPanel);
static_assert(kHiddenPadding % (kFramePanel * W) == 0);
// Frames between two merges, where the lanes are frames.
constexpr int64_t kBlockFrames = 480;
static_assert(kBlockFrames % (kFramePanel * W) == 0);
// Rows of a tile that are made beyond its last frame.
constexpr int64_t kTileRoom = (kTileFrames + kTileRows - 1) / kTileRows * kTileRows;

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

// Words of a group of channels that has so many of them as rows, `stride` apart: steps of
// kPoolChannels words. Those of channels that do not exist are 0.
inline void pack_words(const float* rows, int64_t stride, int64_t channels, int64_t words,
                       float* out) {
  for (int64_t c = 0; c < kPoolChannels; c += W) {
    for (int64_t word = 0; word < words; word += W) {
      const int64_t count = smaller(W, words - word);
      V block[W];
      for (int64_t i = 0; i < W; ++i) {
        const float* p = rows + (c + i) * stride + word;
        block[i] = c + i >= channels ? V{} : count == W ? load(p) : load_first(p, count, V{});
      }
      transpose(block);
      for (int64_t i = 0; i < count; ++i) store(out + (word + i) * kPoolChannels + c, block[i]);
    }
  }
}

template <typename T>
void pack_panel(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t first, int64_t count,
                float* out) {
  const T* weight = static_cast<const T*>(batch.weight) + first * batch.weight_stride;
  const int64_t step = step_channels(batch.operand()),
                steps = steps_of(batch.operand(), batch.units);
  if (batch.reads_hidden() && batch.weight_stride % step == 0) {
    pack_words(reinterpret_cast<const float*>(weight), batch.weight_stride / step, count, steps,
               out);
  } else {
    clear(out, kPoolChannels * steps);
    for (int64_t c = 0; c < count; ++c) {
      const T* row = weight + c * batch.weight_stride;
      if (batch.operand() == Operand::float32) {
        for_values(row, batch.units,
                   [&](int64_t unit, float value) { out[unit * kPoolChannels + c] = value; });
      } else {
        for (int64_t unit = 0; unit < batch.units; ++unit)
          __builtin_memcpy(
              reinterpret_cast<T*>(out + unit / step * kPoolChannels + c) + unit % step, row + unit,
              sizeof(T));
      }
    }
  }
  float* bias = out + steps * kPoolChannels;
  clear(bias, kPoolChannels);
  for_values(static_cast<const T*>(batch.bias) + first, count,
             [&](int64_t c, float value) { bias[c] = value; });
}

void pack_weight(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t group, float* out) {
  const int64_t first = group * kPoolChannels;
  const int64_t count = smaller(kPoolChannels, batch.pool.channels - first);
  by_element(batch.pool.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    if (batch.pool.channels_last) return pack_panel<T>(batch, first, count, out);
    const Packed packed = {out, batch.units + 1, kChannelStrip};
    clear(out, kPoolChannels * packed.units);
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
  by_element(batch.pool.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const T* hidden = static_cast<const T*>(batch.hidden) + row * batch.hidden_batch_stride;
    if (batch.pool.channels_last) {
      const int64_t steps = steps_of(batch.operand(), batch.units);
      for (int64_t t = 0; t < length; ++t) {
        const T* units = hidden + t * batch.hidden_frame_stride;
        float* words = out + t * steps;
        if (batch.operand() == Operand::float32) {
          for_values(units, batch.units, [&](int64_t unit, float value) { words[unit] = value; });
        } else {
          words[steps - 1] = 0;
          __builtin_memcpy(words, units, batch.units * sizeof(T));
        }
      }
      return;
    }
    const Packed packed = {out, batch.units + 1, kFramePanel * W};
    clear(out, (length + packed.width - 1) / packed.width * packed.width * packed.units);
    for (int64_t unit = 0; unit < batch.units; ++unit) {
      for_values(hidden + unit * batch.hidden_unit_stride, length,
                 [&](int64_t t, float value) { packed.at(unit, t) = value; });
    }
    for (int64_t t = 0; t < length; ++t) packed.at(batch.units, t) = 1;
  });
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

// Logits of frames [first, first + count) of the row that `hidden` describes, kPoolChannels apart.
template <typename Dot>
void panel_logits(const Product& hidden, const float* weight, int64_t first, int64_t count,
                  float* out) {
  const float* bias = weight + hidden.sources->steps * kPoolChannels;
  for (int64_t c = 0; c < kPoolChannels; c += kTileColumns * W) {
    for (int64_t i = 0; i < count; i += kTileRows) {
      V sums[kTileRows * kTileColumns];
      add_up<Dot, kTileRows, kTileColumns>(hidden, first + i, count - i,
                                           reinterpret_cast<const char*>(weight + c), sums);
      each<kTileColumns>([&](auto n) __attribute__((always_inline)) {
        const V added = load(bias + c + n * W);
        each<kTileRows>([&](auto r) __attribute__((always_inline)) {
          store(out + (i + r) * kPoolChannels + c + n * W, sums[r * kTileColumns + n] + added);
        });
      });
    }
  }
}

template <typename T>
void from_hidden_channels(const AttentiveStatsPoolFromHiddenBatch& batch, int64_t row,
                          int64_t first, int64_t count, const float* weight, const float* packed) {
  alignas(64) float x[kTileFrames * kPoolChannels], logits[kTileRoom * kPoolChannels];
  const int64_t length = batch.pool.length(row), steps = steps_of(batch.operand(), batch.units);
  Source source = {reinterpret_cast<const char*>(packed), steps * kStepBytes, steps, 0};
  if (batch.reads_hidden()) {
    source.data = reinterpret_cast<const char*>(static_cast<const T*>(batch.hidden) +
                                                row * batch.hidden_batch_stride);
    source.stride = batch.hidden_frame_stride * static_cast<int64_t>(sizeof(T));
  }
  Product hidden = {};
  hidden.sources = &source;
  hidden.num_sources = 1;
  hidden.frames = length;
  Moments seen[kTileVectors];
  for (int64_t t = 0; t < length; t += kTileFrames) {
    const int64_t frames = smaller(kTileFrames, length - t);
    for (int64_t i = 0; i < frames; ++i)
      copy_channels(at<T>(batch.pool.x, row, first, t + i), count, x + i * kPoolChannels);
    if (batch.operand() == Operand::bfloat16) {
      panel_logits<Bfloats>(hidden, weight, t, frames, logits);
    } else {
      panel_logits<Floats>(hidden, weight, t, frames, logits);
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
