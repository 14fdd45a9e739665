// What the kernels of attentive_stats_pool and attentive_stats_pool_from_hidden share: tensors,
// tiles of channels and the outputs, over the vectors of one instruction set.
#pragma once

#include "attentive_stats_pool_kernel.h"
#include "attentive_stats_pool_moments.h"

namespace {

using spkfast::cpu::AttentiveStatsPoolBatch;
using spkfast::cpu::Element;
using spkfast::cpu::kPoolChannels;
using spkfast::cpu::PoolTensor;

// Frames between two merges, where the lanes are frames and where they are channels: what is read
// twice stays in the first cache.
constexpr int64_t kFrames = 512, kTileFrames = 48;
// Groups of sequences between the one that is computed and the one that is fetched.
constexpr int64_t kAhead = 2;
constexpr int64_t kTileVectors = kPoolChannels / W;

template <typename T>
[[gnu::always_inline]] inline T* at(const PoolTensor& tensor, int64_t row, int64_t channel,
                                    int64_t frame) {
  return static_cast<T*>(tensor.data) + row * tensor.batch_stride +
         channel * tensor.channel_stride + frame * tensor.frame_stride;
}

// What follows the real frames.
template <typename T>
[[gnu::always_inline]] inline void clear(T* p, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(p + i, V{});
  if (i < count) store_first(p + i, count - i, V{});
}

// Copies past the caches, but for the ends, whose lines belong to others too. `from` begins where
// `to` does in its line of 64 bytes.
template <typename T>
inline void stream(T* to, const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t begun = reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T);
  int64_t i = smaller(begun ? kLine - begun : 0, count);
  __builtin_memcpy(to, from, i * sizeof(T));
  for (; i + kLine <= count; i += kLine) stream_line(to + i, from + i);
  __builtin_memcpy(to + i, from + i, (count - i) * sizeof(T));
}

// Whether gradients at both can be written past the caches vector by vector: those of floats, that
// begin at like places of a vector.
template <typename T>
[[gnu::always_inline]] inline bool streams(const T* a, const T* b) {
  return sizeof(T) == sizeof(float) && kStreams &&
         reinterpret_cast<uintptr_t>(a) % sizeof(V) == reinterpret_cast<uintptr_t>(b) % sizeof(V);
}
// Values from p to where a vector of the memory begins.
template <typename T>
[[gnu::always_inline]] inline int64_t until_vector(const T* p) {
  return -reinterpret_cast<uintptr_t>(p) % sizeof(V) / sizeof(T);
}
template <typename T>
[[gnu::always_inline]] inline void stream_vector(T* to, V v) {
  if constexpr (sizeof(T) == sizeof(float)) stream(to, v);
}

// Memory for as many values, to be copied to `to`.
template <typename T, int64_t kCount>
struct Staged {
  alignas(64) T values[kCount + 64 / sizeof(T)];
  T* like(const T* to) { return values + reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T); }
};

// The first `count` channels from p on, up to kPoolChannels of them, as floats.
template <typename T>
[[gnu::always_inline]] inline void copy_channels(const T* p, int64_t count, float* out) {
  if (count == kPoolChannels) {
    for (int64_t c = 0; c < kPoolChannels; c += W) store(out + c, load(p + c));
    return;
  }
  int64_t c = 0;
  for (; c + W <= count; c += W) store(out + c, load(p + c));
  if (c < count) store(out + c, load_first(p + c, count - c, V{}));
}

[[gnu::always_inline]] inline V load_channels(const float* p, int64_t channel, int64_t count) {
  if (channel + W <= count) return load(p + channel);
  return channel < count ? load_first(p + channel, count - channel, V{}) : V{};
}
template <typename T>
[[gnu::always_inline]] inline void store_channels(T* p, int64_t channel, int64_t count, V v) {
  if (channel + W <= count) {
    store(p + channel, v);
  } else if (channel < count) {
    store_first(p + channel, count - channel, v);
  }
}

// Writes the outputs of `count` channels from `where` on, the lanes of `seen`.
inline void write_moments(const AttentiveStatsPoolBatch& batch, int64_t where, const Moments* seen,
                          int64_t count) {
  for (int64_t v = 0; v * W < count; ++v) {
    const Moments& m = seen[v];
    // Where no logit was finite both are NaN, as in the definition.
    store_channels(batch.mean + where, v * W, count, m.mean * (m.total / m.total));
    store_channels(batch.var + where, v * W, count, m.squares / m.total);
    if (batch.shared) continue;
    store_channels(batch.highest + where, v * W, count, m.highest);
    store_channels(batch.total + where, v * W, count, m.total);
  }
}

// Writes what a row without frames has.
inline void write_nothing(const AttentiveStatsPoolBatch& batch, int64_t where, int64_t count) {
  clear(batch.mean + where, count);
  clear(batch.var + where, count);
  if (batch.shared) return;
  clear(batch.highest + where, count);
  clear(batch.total + where, count);
}

template <typename Call>
[[gnu::always_inline]] inline void by_element(Element element, Call call) {
  switch (element) {
    case Element::float32:
      return call(float{});
    case Element::bfloat16:
      return call(BFloat16{});
    case Element::float16:
      return call(Float16{});
  }
}

// Frames of a tile: floats, a frame's channels side by side and kPoolChannels from the next's.
struct Tile {
  const float* x;
  float* weights;       // the logits at first, where there are no shared weights
  const float* shared;  // of each frame, or null
  int64_t frames;
};

template <int N, bool kShared, typename Ahead>
[[gnu::always_inline]] inline void tile_moments(const Tile& tile, int64_t vector, Ahead ahead,
                                                Moments* out) {
  const Sequences<float> x = {tile.x + vector * W, W, kPoolChannels};
  const auto fetch = [&](int64_t s, int64_t i)
                         __attribute__((always_inline)) { ahead(vector + s, i); };
  if constexpr (kShared) {
    const V highest[N] = {};
    const auto weight = [&](int64_t, int64_t i, auto...)
                            __attribute__((always_inline)) { return all(tile.shared[i]); };
    moments<N>(highest, x, {tile.frames, 0}, weight, weight, fetch, out);
  } else {
    float* weights = tile.weights + vector * W;
    softmax_moments<N>(Sequences<float>{weights, W, kPoolChannels}, x, {tile.frames, 0}, weights, W,
                       fetch, out);
  }
}

// Adds a tile to the moments of its channels, of which there are `count`. ahead(v, i) fetches what
// comes later for vector v of frame i.
template <bool kShared, typename Ahead>
[[gnu::always_inline]] inline void add_tile(const Tile& tile, int64_t count, bool begins,
                                            Ahead ahead, Moments* seen) {
  const int64_t vectors = (count + W - 1) / W;
  Moments block[kTileVectors];
  int64_t v = 0;
  for (; v + kSequences <= vectors; v += kSequences)
    tile_moments<kSequences, kShared>(tile, v, ahead, block + v);
  for (; v < vectors; ++v) tile_moments<1, kShared>(tile, v, ahead, block + v);
  for (v = 0; v < vectors; ++v) seen[v] = begins ? block[v] : merged(seen[v], block[v]);
}

}  // namespace
