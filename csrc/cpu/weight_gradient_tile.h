// The gradient of a weight over vectors of one instruction set, whose header the including unit
// names before.
#pragma once

#include "product_sums.h"
#include "weight_gradient_kernel.h"

namespace {

using spkfast::cpu::Element;
using spkfast::cpu::Frames;
using spkfast::cpu::Operand;

constexpr int kLanes = static_cast<int>(W);
// Steps of a panel between one that is packed and one that is asked for.
constexpr int64_t kAhead = 4;

// How the values of a step become words: of one frame, or of two.
struct FloatWords {
  static constexpr int kFrames = 1;
  template <typename T, typename Width>
  [[gnu::always_inline]] static V of(const char* const* frames, int64_t channel, Width width) {
    return width.read(reinterpret_cast<const T*>(frames[0]) + channel, V{});
  }
};
struct BfloatWords {
  static constexpr int kFrames = 2;
  // In the upper half of each lane, with zeros below.
  template <typename Width>
  [[gnu::always_inline]] static Words upper(const BFloat16* p, Width width) {
    return bits_of<Words>(width.read(p, V{}));
  }
  template <typename Width>
  [[gnu::always_inline]] static Words upper(const float* p, Width width) {
    BFloat16 rounded[W];
    store(rounded, width.read(p, V{}));
    return bits_of<Words>(load(rounded));
  }
  template <typename T, typename Width>
  [[gnu::always_inline]] static V of(const char* const* frames, int64_t channel, Width width) {
    const Words even = upper(reinterpret_cast<const T*>(frames[0]) + channel, width);
    const Words odd = upper(reinterpret_cast<const T*>(frames[1]) + channel, width);
    return bits_of<V>(even >> 16 | odd);
  }
};

// Calls f with the words of an operand and a value of the element type.
template <typename F>
[[gnu::always_inline]] inline void by_form(const Product& form, F&& f) {
  const bool whole = form.operand == Operand::float32;
  if (form.element == Element::float32)
    return whole ? f(FloatWords{}, float{}) : f(BfloatWords{}, float{});
  whole ? f(FloatWords{}, BFloat16{}) : f(BfloatWords{}, BFloat16{});
}

// Asks for F frames from `first` on, vector by vector, while others are read: these come from
// memory, and too few at a time to be foreseen.
template <int64_t F>
struct Ahead {
  const char* frames[F];
  [[gnu::always_inline]] Ahead(const Product& form, const Source& source, int64_t first) {
    for (int64_t i = 0; i < F; ++i) frames[i] = frame_of(form, source, first + i);
  }
  // Where one more line of each begins.
  [[gnu::always_inline]] void fetch(int64_t byte) const {
    constexpr int64_t kLine = 64;
    if (byte % kLine) return;
    for (int64_t i = 0; i < F; ++i) __builtin_prefetch(frames[i] + byte, 0, 2);
  }
};

void turn(const Product& form, const Source& source, int64_t channels, const Frames& to) {
  by_form(form, [&](auto words, auto zero) __attribute__((always_inline)) {
    constexpr int kFrames = decltype(words)::kFrames;
    for (int64_t step = 0; step < source.steps; step += W) {
      const char* frames[W * kFrames];
      for (int64_t i = 0; i < W * kFrames; ++i)
        frames[i] = frame_of(form, source, step * kFrames + i);
      const int64_t count = smaller(W, source.steps - step);
      const Ahead<W * kFrames> ahead(form, source, (step + W) * kFrames);
      extent_of(channels).each([&](int64_t n, auto width) __attribute__((always_inline)) {
        ahead.fetch(n * W * sizeof(zero));
        V block[W];
        each<kLanes>([&](auto i) __attribute__((always_inline)) {
          block[i] =
              decltype(words)::template of<decltype(zero)>(frames + i * kFrames, n * W, width);
        });
        transpose(block);
        char* p = to.data + n * W * to.stride + step * kStepBytes;
        each<kLanes>([&](auto i) __attribute__((always_inline)) {
          if (i >= width.count()) return;
          float* row = reinterpret_cast<float*>(p + i * to.stride);
          if (count == W) {
            store(row, block[i]);
          } else {
            store_first(row, count, block[i]);
          }
        });
      });
    }
  });
}

void pack(const Product& form, const Source& source, int64_t channels, const Frames& to) {
  constexpr int64_t kVectors = kPanel / W;
  by_form(form, [&](auto words, auto zero) __attribute__((always_inline)) {
    constexpr int kFrames = decltype(words)::kFrames;
    const int64_t vectors = (channels + kPanel - 1) / kPanel * kVectors;
    for (int64_t step = 0; step < source.steps; ++step) {
      const char* frames[kFrames];
      for (int i = 0; i < kFrames; ++i) frames[i] = frame_of(form, source, step * kFrames + i);
      char* row = to.data + step * kPanel * kStepBytes;
      const auto at = [&](int64_t n) __attribute__((always_inline)) {
        return reinterpret_cast<float*>(row + n / kVectors * to.stride) + n % kVectors * W;
      };
      const Extent extent = extent_of(channels);
      const Ahead<kFrames> ahead(form, source, (step + kAhead) * kFrames);
      extent.each([&](int64_t n, auto width) __attribute__((always_inline)) {
        ahead.fetch(n * W * sizeof(zero));
        store(at(n), decltype(words)::template of<decltype(zero)>(frames, n * W, width));
      });
      for (int64_t n = extent.whole + (extent.rest != 0); n < vectors; ++n) store(at(n), V{});
    }
  });
}

template <typename Dot, int R, int N>
[[gnu::noinline]] void tile(const Product& product, int64_t frame, int64_t count, int64_t column,
                            bool add) {
  const auto at = [&](int64_t r) __attribute__((always_inline)) {
    return reinterpret_cast<float*>(product.out.data + (frame + r) * product.out.stride) + column;
  };
  // What is added to comes while the sums are made.
  if (add) {
    each<R>([&](auto r) __attribute__((always_inline)) {
      constexpr int kLine = 16;
      each<(N * kLanes + kLine - 1) / kLine>([&](auto n) __attribute__((always_inline)) {
        __builtin_prefetch(at(smaller(r, count - 1)) + n * kLine, 1);
      });
    });
  }
  V sums[R * N];
  add_up<Dot, R, N>(product, frame, count, product.weight + column * kStepBytes, sums);
  each<R>([&](auto r) __attribute__((always_inline)) {
    if (r >= count) return;
    each<N>([&](auto n) __attribute__((always_inline)) {
      float* p = at(r) + n * W;
      store(p, add ? load(p) + sums[r * N + n] : sums[r * N + n]);
    });
  });
}

template <typename Dot>
void run_as(const Product& product, bool add) {
  for (int64_t column = 0; column < product.channels; column += kTileColumns * W) {
    const bool narrow = product.channels - column <= W;
    for (int64_t frame = 0; frame < product.frames; frame += kTileRows) {
      const int64_t count = smaller(kTileRows, product.frames - frame);
      if (narrow) {
        tile<Dot, kTileRows, 1>(product, frame, count, column, add);
      } else {
        tile<Dot, kTileRows, kTileColumns>(product, frame, count, column, add);
      }
    }
  }
}

void run(const Product& product, bool add) {
  (product.operand == Operand::float32 ? &run_as<Floats> : &run_as<Bfloats>)(product, add);
}

void finish(const float* sums, int64_t count, int64_t stride, int64_t first, int64_t last,
            int64_t columns, float* out, int64_t out_stride) {
  for (int64_t row = first; row < last; row += W) {
    const int64_t rows = smaller(W, last - row);
    for (int64_t column = 0; column < columns; column += W) {
      V block[W];
      each<kLanes>([&](auto i) __attribute__((always_inline)) {
        const float* p = sums + (row + smaller(i, rows - 1)) * kPanel + column;
        V sum = V{};
        for (int64_t k = 0; k < count; ++k) {
          __builtin_prefetch(p + k * stride + W * kPanel);
          sum = sum + load(p + k * stride);
        }
        block[i] = sum;
      });
      transpose(block);
      each<kLanes>([&](auto i) __attribute__((always_inline)) {
        if (column + i >= columns) return;
        float* p = out + (column + i) * out_stride + row;
        if (rows == W) {
          store(p, block[i]);
        } else {
          store_first(p, rows, block[i]);
        }
      });
    }
  }
}

}  // namespace
