// The kernel of attentive_stats_pool over vectors of one instruction set, whose header the
// including unit names before. Where frames lie side by side the lanes are frames of a channel,
// otherwise they are channels. A channel's numbers depend on its own frames alone, not on padding,
// other rows or threads.
#pragma once

#include "attentive_stats_pool_kernel.h"
#include "attentive_stats_pool_parts.h"

namespace {

using spkfast::cpu::RowLogits;

template <int N, typename T, bool kShared>
[[gnu::always_inline]] inline void forward_frames(const AttentiveStatsPoolBatch& batch, int64_t row,
                                                  int64_t channel, Moments* seen) {
  alignas(64) float weights[N * kFrames];
  const int64_t length = batch.length(row);
  for (int64_t t = 0; t < length; t += kFrames) {
    const Extent extent = extent_of(smaller(kFrames, length - t));
    const Sequences<T> x = {at<T>(batch.x, row, channel, t), batch.x.channel_stride, W};
    Moments block[N];
    if constexpr (kShared) {
      const float* shared = batch.weights + row * batch.padded_frames() + t;
      const V highest[N] = {};
      const auto weight = [&](int64_t, int64_t i, auto...)
                              __attribute__((always_inline)) { return load(shared + i * W); };
      const auto ahead = [&](int64_t s, int64_t i)
                             __attribute__((always_inline)) { x.prefetch(s + kAhead * N, i); };
      moments<N>(highest, x, extent, weight, weight, ahead, block);
    } else {
      const Sequences<T> logits = {at<T>(batch.logits, row, channel, t),
                                   batch.logits.channel_stride, W};
      const auto ahead = [&](int64_t s, int64_t i) __attribute__((always_inline)) {
        x.prefetch(s + kAhead * N, i);
        logits.prefetch(s + kAhead * N, i);
      };
      softmax_moments<N>(logits, x, extent, weights, kFrames, ahead, block);
    }
    each<N>([&](auto s) __attribute__((always_inline)) {
      seen[s] = t ? merged(seen[s], block[s]) : block[s];
    });
  }
}

template <typename T, bool kShared>
void forward_frames(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t first,
                    int64_t count) {
  Moments seen[kTileVectors];
  for (int64_t v = 0; v * W < count; ++v) {
    const int64_t begin = first + v * W, lanes = smaller(W, count - v * W);
    Moments channels[W] = {};
    int64_t c = 0;
    for (; c + kSequences <= lanes; c += kSequences)
      forward_frames<kSequences, T, kShared>(batch, row, begin + c, channels + c);
    for (; c < lanes; ++c) forward_frames<1, T, kShared>(batch, row, begin + c, channels + c);
    seen[v] = gathered(channels);
  }
  write_moments(batch, row * batch.channels + first, seen, count);
}

template <typename T, bool kShared>
void forward_channels(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t first,
                      int64_t count) {
  // Copies: frames as they lie, a power of two apart or nearly, would share few sets of the cache.
  alignas(64) float x[kTileFrames * kPoolChannels], weights[kTileFrames * kPoolChannels];
  const int64_t length = batch.length(row);
  const float* shared = kShared ? batch.weights + row * batch.padded_frames() : nullptr;
  Moments seen[kTileVectors];
  for (int64_t t = 0; t < length; t += kTileFrames) {
    const int64_t frames = smaller(kTileFrames, length - t);
    for (int64_t i = 0; i < frames; ++i) {
      copy_channels(at<T>(batch.x, row, first, t + i), count, x + i * kPoolChannels);
      if constexpr (!kShared)
        copy_channels(at<T>(batch.logits, row, first, t + i), count, weights + i * kPoolChannels);
    }
    const auto ahead = [&](int64_t v, int64_t i) __attribute__((always_inline)) {
      const int64_t later = t + kTileFrames + i;
      __builtin_prefetch(at<T>(batch.x, row, first + v * W, later));
      if constexpr (!kShared) __builtin_prefetch(at<T>(batch.logits, row, first + v * W, later));
    };
    add_tile<kShared>({x, weights, kShared ? shared + t : nullptr, frames}, count, t == 0, ahead,
                      seen);
  }
  write_moments(batch, row * batch.channels + first, seen, count);
}

// The gradient's constants of a channel, and what they make of a frame.
struct Slopes {
  V mean, var, grad_mean, grad_var;
  V of_x(V weight, V x) const { return weight * madd(grad_var + grad_var, x - mean, grad_mean); }
  // To be multiplied with the weight.
  V of_logit(V x) const {
    const V distance = x - mean;
    return madd(grad_mean, distance, grad_var * madd(distance, distance, -var));
  }
};

// Between the channel whose gradient is computed and the one that is fetched.
constexpr int64_t kChannelsAhead = 2;

template <typename T, bool kShared>
void backward_frames(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t first,
                     int64_t count) {
  const int64_t length = batch.length(row), padded = batch.padded_frames();
  const float* shared = kShared ? batch.weights + row * padded : nullptr;
  float* sums =
      batch.sums ? batch.sums + (row * batch.groups() + first / kPoolChannels) * padded : nullptr;
  if (sums) clear(sums, padded);
  for (int64_t c = first; c < first + count; ++c) {
    const int64_t where = row * batch.channels + c;
    const Slopes slopes = {all(batch.mean[where]), all(batch.var[where]),
                           all(batch.grad_mean[where]), all(batch.grad_var[where])};
    const V highest = kShared ? V{} : all(batch.highest[where]);
    const V scale = kShared ? V{} : all(1.0F) / all(batch.total[where]);
    const T* x = at<T>(batch.x, row, c, 0);
    const T* logits = kShared ? nullptr : at<T>(batch.logits, row, c, 0);
    T* grad_x = at<T>(batch.grad_x, row, c, 0);
    T* grad_logits = kShared ? nullptr : at<T>(batch.grad_logits, row, c, 0);
    // Frames from t on, as many as `width` has: into_x and into_logits take their gradients.
    const auto gradient = [&](int64_t t, auto width, auto into_x,
                              auto into_logits) __attribute__((always_inline)) {
      // The gaps that padding leaves end what the hardware fetches by itself.
      __builtin_prefetch(x + kChannelsAhead * batch.x.channel_stride + t);
      if constexpr (!kShared)
        __builtin_prefetch(logits + kChannelsAhead * batch.logits.channel_stride + t);
      const V value = width.read(x + t, V{}), of_logit = slopes.of_logit(value);
      V weight;
      if constexpr (kShared) {
        weight = width.read(shared + t, V{});
        if (sums) width.write(sums + t, width.read(sums + t, V{}) + of_logit);
      } else {
        const V logit = width.read(logits + t, all(-kInfinity));
        weight = exponential(logit - highest) * scale;
        into_logits(grad_logits + t, weight * of_logit);
      }
      into_x(grad_x + t, slopes.of_x(weight, value));
    };
    const auto stored = [&](int64_t t, auto width) __attribute__((always_inline)) {
      const auto into = [&](T* to, V v) __attribute__((always_inline)) { width.write(to, v); };
      gradient(t, width, into, into);
    };
    int64_t t = 0;
    if (batch.stream && streams<T>(grad_x, kShared ? grad_x : grad_logits)) {
      // Vectors begin where those of the memory do, so that each is written as one.
      const int64_t begun = smaller(until_vector(grad_x), length);
      if (begun) stored(0, Part{begun});
      const auto into = [](T* to, V v) __attribute__((always_inline)) { stream_vector(to, v); };
      for (t = begun; t + W <= length; t += W) gradient(t, Whole{}, into, into);
    }
    for (; t + W <= length; t += W) stored(t, Whole{});
    if (t < length) stored(t, Part{length - t});
    clear(grad_x + length, batch.frames - length);
    if constexpr (!kShared) clear(grad_logits + length, batch.frames - length);
  }
}

template <typename T, bool kShared>
void backward_channels(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t first,
                       int64_t count) {
  const int64_t length = batch.length(row), padded = batch.padded_frames();
  const int64_t where = row * batch.channels + first;
  const float* shared = kShared ? batch.weights + row * padded : nullptr;
  float* sums =
      batch.sums ? batch.sums + (row * batch.groups() + first / kPoolChannels) * padded : nullptr;
  if (sums) clear(sums, padded);
  Slopes slopes[kTileVectors];
  V highest[kTileVectors], scale[kTileVectors];
  for (int64_t v = 0; v * W < count; ++v) {
    const auto of = [&](const float* p) { return load_channels(p + where, v * W, count); };
    slopes[v] = {of(batch.mean), of(batch.var), of(batch.grad_mean), of(batch.grad_var)};
    if constexpr (kShared) continue;
    highest[v] = of(batch.highest);
    scale[v] = all(1.0F) / of(batch.total);
  }
  alignas(64) float x[kPoolChannels] = {}, logits[kPoolChannels] = {};
  Staged<T, kPoolChannels> staged_x, staged_logits;
  for (int64_t t = 0; t < length; ++t) {
    copy_channels(at<T>(batch.x, row, first, t), count, x);
    T* const to_x = at<T>(batch.grad_x, row, first, t);
    T* grad_x = batch.stream ? staged_x.like(to_x) : to_x;
    V of_frame = {};
    if constexpr (kShared) {
      for (int64_t v = 0; v * W < count; ++v) {
        const V value = load(x + v * W);
        store_channels(grad_x, v * W, count, slopes[v].of_x(all(shared[t]), value));
        // Lanes that are no channels have slopes of 0.
        of_frame += slopes[v].of_logit(value);
      }
      if (sums) sums[t] = sum(of_frame);
    } else {
      copy_channels(at<T>(batch.logits, row, first, t), count, logits);
      T* const to_logits = at<T>(batch.grad_logits, row, first, t);
      T* grad_logits = batch.stream ? staged_logits.like(to_logits) : to_logits;
      for (int64_t v = 0; v * W < count; ++v) {
        const V value = load(x + v * W);
        const V weight = exponential(load(logits + v * W) - highest[v]) * scale[v];
        store_channels(grad_x, v * W, count, slopes[v].of_x(weight, value));
        store_channels(grad_logits, v * W, count, weight * slopes[v].of_logit(value));
      }
      if (batch.stream) stream(to_logits, grad_logits, count);
    }
    if (batch.stream) stream(to_x, grad_x, count);
  }
  alignas(64) const T zeros[2 * kPoolChannels] = {};
  const auto clear_frame = [&](T* to) {
    // As far into its line as where it goes.
    if (batch.stream)
      return stream(to, zeros + reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T), count);
    clear(to, count);
  };
  for (int64_t t = length; t < batch.frames; ++t) {
    clear_frame(at<T>(batch.grad_x, row, first, t));
    if constexpr (!kShared) clear_frame(at<T>(batch.grad_logits, row, first, t));
  }
}

void forward(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t group) {
  const int64_t first = group * kPoolChannels,
                count = smaller(kPoolChannels, batch.channels - first);
  if (batch.length(row) == 0) return write_nothing(batch, row * batch.channels + first, count);
  by_element(batch.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    if (batch.shared) {
      if (batch.channels_last) return forward_channels<T, true>(batch, row, first, count);
      return forward_frames<T, true>(batch, row, first, count);
    }
    if (batch.channels_last) return forward_channels<T, false>(batch, row, first, count);
    return forward_frames<T, false>(batch, row, first, count);
  });
}

void backward(const AttentiveStatsPoolBatch& batch, int64_t row, int64_t group) {
  const int64_t first = group * kPoolChannels,
                count = smaller(kPoolChannels, batch.channels - first);
  by_element(batch.element, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    if (batch.shared) {
      if (batch.channels_last) return backward_channels<T, true>(batch, row, first, count);
      return backward_frames<T, true>(batch, row, first, count);
    }
    if (batch.channels_last) return backward_channels<T, false>(batch, row, first, count);
    return backward_frames<T, false>(batch, row, first, count);
  });
  if (batch.stream) end_stream();
}

void row_weights(const RowLogits& row, float* weights, float* highest, float* total) {
  const V none = all(-kInfinity);
  V top = none, sums = {};
  by_element(row.element, [&](auto zero) __attribute__((always_inline)) {
    const auto* logits = static_cast<const decltype(zero)*>(row.data);
    const Extent extent = extent_of(row.length);
    extent.each([&](int64_t i, auto width) __attribute__((always_inline)) {
      top = larger(width.read(logits + i * W, none), top);
    });
    top = all(largest(top));
    const V base = base_of(top);
    extent.each([&](int64_t i, auto width) __attribute__((always_inline)) {
      const V weight = exponential(width.read(logits + i * W, none) - base);
      width.write(weights + i * W, weight);
      sums += weight;
    });
  });
  clear(weights + row.length, row.padded_frames - row.length);
  *highest = row.length ? top[0] : 0.0F;
  *total = sum(sums);
}

void row_shares(const RowLogits& row, float highest, float total, float* weights) {
  const V top = all(highest), scale = all(1.0F / total);
  by_element(row.element, [&](auto zero) __attribute__((always_inline)) {
    const auto* logits = static_cast<const decltype(zero)*>(row.data);
    extent_of(row.length).each([&](int64_t i, auto width) __attribute__((always_inline)) {
      const V logit = width.read(logits + i * W, all(-kInfinity));
      width.write(weights + i * W, exponential(logit - top) * scale);
    });
  });
  clear(weights + row.length, row.padded_frames - row.length);
}

void finish_shared(const AttentiveStatsPoolBatch& batch, int64_t row, void* grad_logits) {
  const int64_t padded = batch.padded_frames(), length = batch.length(row);
  const float* sums = batch.sums + row * batch.groups() * padded;
  by_element(batch.element, [&](auto zero) __attribute__((always_inline)) {
    auto* out = static_cast<decltype(zero)*>(grad_logits) + row * batch.frames;
    for (int64_t t = 0; t < length; t += W) {
      V of_frames = {};
      for (int64_t group = 0; group < batch.groups(); ++group)
        of_frames += load(sums + group * padded + t);
      store_channels(out, t, length, of_frames * load(batch.weights + row * padded + t));
    }
    clear(out + length, batch.frames - length);
  });
}

}  // namespace
