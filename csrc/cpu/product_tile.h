// The products over vectors of one instruction set, whose header the including unit names before.
#pragma once

#include "product_sums.h"

namespace {

using spkfast::cpu::Element;
using spkfast::cpu::Frames;
using spkfast::cpu::kChunkSteps;
using spkfast::cpu::Operand;
using spkfast::cpu::Quantiser;
using spkfast::cpu::steps_of;

// A panel is multiplied chunk by chunk of its steps, with all frames of a block. Bytes of the
// operands of a block, which stay in the second cache beside a chunk of the weights and the next.
constexpr int64_t kBlockBytes = 640 << 10;
// Frames of a block whose sums are kept from chunk to chunk.
constexpr int64_t kMostKept = 192;
// Of memory.
constexpr int64_t kLine = 64;
// Frames whose sum is added to a mean at once.
constexpr int64_t kPiece = 64;

[[gnu::always_inline]] inline V magnitude(V v) {
  return bits_of<V>(bits_of<Words>(v) & 0x7fffffff);
}
[[gnu::always_inline]] inline V hyperbolic_tangent(V v) {
  const V e = exponential(magnitude(v) * -2.0F);
  const V size = (1.0F - e) / (1.0F + e);
  return bits_of<V>(bits_of<Words>(size) | (bits_of<Words>(v) & 0x80000000));
}
[[gnu::always_inline]] inline V sigmoid(V v) {
  const V e = exponential(-magnitude(v));
  return (v < 0.0F ? e : all(1.0F)) / (1.0F + e);
}

// Values as operands: W of them from `channel` on.
template <typename Width>
[[gnu::always_inline]] inline void put(char* to, int64_t channel, V v, Operand operand,
                                       Quantiser quantiser, Width width) {
  if (operand == Operand::float32) {
    width.write(reinterpret_cast<float*>(to) + channel, v);
  } else if (operand == Operand::bfloat16) {
    width.write(reinterpret_cast<BFloat16*>(to) + channel, v);
  } else {
    V scaled = nearest_whole(v * quantiser.inverse_scale) + quantiser.zero;
    scaled = larger(scaled, V{});
    scaled = scaled > 255.0F ? all(255.0F) : scaled;
    const I whole = __builtin_convertvector(scaled, I);
    using Small [[gnu::vector_size(W)]] = uint8_t;
    const Small bytes = __builtin_convertvector(whole, Small);
    __builtin_memcpy(to + channel, &bytes, width.count());
  }
}

template <typename F>
[[gnu::always_inline]] inline void by_activation(Element element, F&& f) {
  if (element == Element::float32) return f(float{});
  f(BFloat16{});
}

// What follows the sums of a frame's channels from `channel` on.
template <typename Dot, typename T, typename Width>
[[gnu::always_inline]] inline void finish(const Product& product, int64_t frame, int64_t channel,
                                          V sum, Width width) {
  V v = Dot::number(sum);
  if (product.unit) v = v * width.read(product.unit + channel, V{});
  v = v + width.read(product.bias + channel, V{});
  if (product.relu) v = larger(V{}, v);  // NaN stays
  if (product.scale)
    v = madd(v, width.read(product.scale + channel, V{}), width.read(product.shift + channel, V{}));
  if (product.tanh) v = hyperbolic_tangent(v);
  width.write(reinterpret_cast<T*>(product.out.data + frame * product.out.stride) + channel, v);
  if (product.sum.data == nullptr) return;
  v = v + width.read(
              reinterpret_cast<const T*>(product.next.data + frame * product.next.stride) + channel,
              V{});
  put(product.sum.data + frame * product.sum.stride, channel, v, product.operand, product.quantiser,
      width);
}

// Asks for the weights that come next, so that they are in the second cache when they are needed:
// they would otherwise arrive, from the third one or from memory, more slowly than they are
// multiplied. A line at a time, since many at once would keep waiting what is multiplied now.
struct Ahead {
  const char *next, *end;
  int64_t period;  // bytes of the operands from a line to the next
  // Asks at a byte of the operands for a line, and tells when for the next one.
  [[gnu::always_inline]] int64_t fetch(int64_t at) {
    if (next >= end) return INT64_MAX;
    __builtin_prefetch(next, 0, 2);
    next += kLine;
    return at + period;
  }
};

// Which of the steps of a product are multiplied, and where the sums of earlier ones are kept.
struct Chunk {
  bool first, last;
  float* kept;
};

template <typename Dot, typename T, int R, int N>
[[gnu::noinline]] void tile(const Product& product, int64_t frame, int64_t count, int64_t channel,
                            const char* weight, const Chunk& chunk, Ahead& ahead) {
  V sums[R * N];
  if (chunk.first) {
    each<R * N>([&](auto i) __attribute__((always_inline)) { sums[i] = V{}; });
  } else {
    each<R * N>([&](auto i) __attribute__((always_inline)) { sums[i] = load(chunk.kept + i * W); });
  }
  Ahead own = ahead;
  add_to<Dot, R, N>(product, frame, count, weight, sums,
                    [&](int64_t at) __attribute__((always_inline)) { return own.fetch(at); });
  ahead = own;
  if (!chunk.last) {
    each<R * N>([&](auto i) __attribute__((always_inline)) { store(chunk.kept + i * W, sums[i]); });
    return;
  }
  each<N>([&](auto n) __attribute__((always_inline)) {
    const int64_t first = channel + n * W, left = product.channels - first;
    if (left <= 0) return;
    each<R>([&](auto r) __attribute__((always_inline)) {
      if (r >= count) return;
      if (left >= W) {
        finish<Dot, T>(product, frame + r, first, sums[r * N + n], Whole{});
      } else {
        finish<Dot, T>(product, frame + r, first, sums[r * N + n], Part{left});
      }
    });
  });
}

template <typename Dot, typename T>
void run_panel(const Product& product, int64_t first, int64_t last, int64_t panel,
               const char* weight, Ahead ahead, Chunk chunk) {
  const int64_t end = smaller(product.channels, (panel + 1) * kPanel);
  for (int64_t channel = panel * kPanel; channel < end; channel += kTileColumns * W) {
    const char* columns = weight + (channel - panel * kPanel) * kStepBytes;
    const bool narrow = end - channel <= W;
    for (int64_t frame = first; frame < last; frame += kTileRows) {
      const int64_t count = smaller(kTileRows, last - frame);
      const auto multiply = [&](auto rows, auto vectors) {
        tile<Dot, T, rows, vectors>(product, frame, count, channel, columns, chunk, ahead);
        if (chunk.kept) chunk.kept += kTileRows * kTileColumns * W;
      };
      // Frames that a last tile lacks would be multiplied for nothing.
      if (narrow) {
        multiply(Constant<kTileRows>{}, Constant<1>{});
      } else if (count > kTileRows - 2) {
        multiply(Constant<kTileRows>{}, Constant<kTileColumns>{});
      } else if (count > 2) {
        multiply(Constant<4>{}, Constant<kTileColumns>{});
      } else if (count > 1) {
        multiply(Constant<2>{}, Constant<kTileColumns>{});
      } else {
        multiply(Constant<1>{}, Constant<kTileColumns>{});
      }
    }
  }
}

template <typename Dot, typename T>
void run_as(const Product& product, int64_t first, int64_t last, int64_t first_panel,
            int64_t last_panel) {
  alignas(64) float kept[kMostKept * kPanel];
  constexpr int64_t kWeightStep = kPanel * kStepBytes;
  // Sources from `from` on that a chunk takes: at least one, and how many steps they have.
  const auto chunk_of = [&](int64_t from, int64_t* steps) {
    int64_t to = from;
    for (*steps = 0; to < product.num_sources; *steps += product.sources[to++].steps) {
      if (to > from && *steps + product.sources[to].steps > kChunkSteps) break;
    }
    return to;
  };
  int64_t steps = 0, of_chunk;
  for (int64_t s = 0; s < product.num_sources; ++s) steps += product.sources[s].steps;
  const bool whole = chunk_of(0, &of_chunk) == product.num_sources;
  // Blocks of like size.
  const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
  int64_t most = kBlockBytes / (kTileRows * steps * kStepBytes + 1);
  if (!whole) most = smaller(most, kMostKept / kTileRows);
  most = most > 1 ? most : 1;
  const int64_t blocks = (tiles + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * tiles / blocks, end = (b + 1) * tiles / blocks;
    const int64_t from = first + begin * kTileRows, to = smaller(last, first + end * kTileRows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const char* weight = product.weight + panel * steps * kWeightStep;
      int64_t left = (last_panel - panel) * steps * kWeightStep;
      for (int64_t s = 0; s < product.num_sources;) {
        const int64_t next = chunk_of(s, &of_chunk), bytes = of_chunk * kWeightStep;
        left -= bytes;
        Product part = product;
        part.sources = product.sources + s;
        part.num_sources = next - s;
        // After all panels those of the next block.
        const bool again = left == 0 && b + 1 < blocks;
        const char* coming =
            again ? product.weight + first_panel * steps * kWeightStep : weight + bytes;
        const int64_t lines = smaller(bytes, again ? bytes : left) / kLine;
        const int64_t passes = kPanel / (kTileColumns * W);  // over the frames
        const int64_t period = lines ? of_chunk * (end - begin) * passes / lines : 0;
        run_panel<Dot, T>(part, from, to, panel, weight,
                          {coming, coming + lines * kLine, (period > 1 ? period : 1) * kStepBytes},
                          {s == 0, next == product.num_sources, whole ? nullptr : kept});
        weight += bytes;
        s = next;
      }
    }
  }
}

void run(const Product& product, int64_t first, int64_t last, int64_t first_panel,
         int64_t last_panel) {
  by_activation(product.element, [&](auto zero) {
    using T = decltype(zero);
    const auto as = product.operand == Operand::float32    ? &run_as<Floats, T>
                    : product.operand == Operand::bfloat16 ? &run_as<Bfloats, T>
                                                           : &run_as<Bytes, T>;
    as(product, first, last, first_panel, last_panel);
  });
}

void convert(const Frames& from, Element element, int64_t channels, const Frames& to,
             Operand operand, Quantiser quantiser, int64_t first, int64_t last) {
  const int64_t bytes = steps_of(operand, channels) * kStepBytes;
  const int64_t used = channels * (operand == Operand::float32    ? 4
                                   : operand == Operand::bfloat16 ? 2
                                                                  : 1);
  by_activation(element, [&](auto zero) {
    for (int64_t t = first; t < last; ++t) {
      const auto* values = reinterpret_cast<const decltype(zero)*>(from.data + t * from.stride);
      char* out = to.data + t * to.stride;
      extent_of(channels).each([&](int64_t i, auto width) __attribute__((always_inline)) {
        put(out, i * W, width.read(values + i * W, V{}), operand, quantiser, width);
      });
      __builtin_memset(out + used, 0, bytes - used);
    }
  });
}

void turn(const char* from, int64_t stride, Element element, int64_t frames, const Frames& to,
          int64_t first, int64_t last) {
  by_activation(element, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t channel = first; channel < last; channel += W) {
      const int64_t channels = smaller(W, last - channel);
      for (int64_t t = 0; t < frames; t += W) {
        const int64_t count = smaller(W, frames - t);
        V block[W];
        for (int64_t i = 0; i < W; ++i) {
          const T* p =
              reinterpret_cast<const T*>(from + (channel + smaller(i, channels - 1)) * stride) + t;
          block[i] = count == W ? load(p) : load_first(p, count, V{});
        }
        transpose(block);
        for (int64_t i = 0; i < count; ++i) {
          T* p = reinterpret_cast<T*>(to.data + (t + i) * to.stride) + channel;
          if (channels == W) {
            store(p, block[i]);
          } else {
            store_first(p, channels, block[i]);
          }
        }
      }
    }
  });
}

// sums[n] = the sum over `frames` frames of value(t, n). In pieces, and with what each addition of
// one cuts off (Kahan): plain sums over a long utterance would round off more than all layers
// before them.
template <int N, typename F>
[[gnu::always_inline]] inline void sum_frames(int64_t frames, V (&sums)[N], F value) {
  V cut[N] = {};
  each<N>([&](auto n) __attribute__((always_inline)) { sums[n] = V{}; });
  for (int64_t begin = 0; begin < frames; begin += kPiece) {
    V pieces[N] = {};
    const int64_t end = smaller(begin + kPiece, frames);
    for (int64_t t = begin; t < end; ++t) {
      each<N>([&](auto n) __attribute__((always_inline)) { pieces[n] = pieces[n] + value(t, n); });
    }
    each<N>([&](auto n) __attribute__((always_inline)) {
      const V piece = pieces[n] - cut[n], total = sums[n] + piece;
      cut[n] = (total - sums[n]) - piece;
      sums[n] = total;
    });
  }
}

// out[c] = the mean over `frames` frames of f(value, channel) for channels [first, last), 0 of
// none.
template <typename T, typename F>
[[gnu::always_inline]] inline void average(const Frames& from, int64_t frames, float* out,
                                           int64_t first, int64_t last, F f) {
  constexpr int kSums = 4;
  const V share = all(frames ? 1.0F / static_cast<float>(frames) : 0.0F);
  const auto at = [&](int64_t t, int64_t channel) {
    return reinterpret_cast<const T*>(from.data + t * from.stride) + channel;
  };
  int64_t channel = first;
  for (; channel + kSums * W <= last; channel += kSums * W) {
    V sums[kSums];
    sum_frames(frames, sums, [&](int64_t t, auto n) __attribute__((always_inline)) {
      return f(load(at(t, channel + n * W)), channel + n * W, Whole{});
    });
    each<kSums>([&](auto n) __attribute__((always_inline)) {
      store(out + channel + n * W, sums[n] * share);
    });
  }
  extent_of(last - channel).each([&](int64_t i, auto width) __attribute__((always_inline)) {
    const int64_t c = channel + i * W;
    V sums[1];
    sum_frames(frames, sums, [&](int64_t t, auto) __attribute__((always_inline)) {
      return f(width.read(at(t, c), V{}), c, width);
    });
    width.write(out + c, sums[0] * share);
  });
}

void means(const Frames& from, Element element, int64_t frames, float* out, int64_t first,
           int64_t last) {
  by_activation(element, [&](auto zero) {
    average<decltype(zero)>(from, frames, out, first, last,
                            [](V v, int64_t, auto) __attribute__((always_inline)) { return v; });
  });
}

void moments(const Frames& from, Element element, int64_t frames, float* mean, float* var,
             int64_t first, int64_t last) {
  means(from, element, frames, mean, first, last);
  by_activation(element, [&](auto zero) {
    average<decltype(zero)>(from, frames, var, first, last,
                            [&](V v, int64_t channel, auto width) __attribute__((always_inline)) {
                              const V far = v - width.read(mean + channel, V{});
                              return far * far;
                            });
  });
}

void gate(const Frames& out, const Frames& rest, Element element, int64_t channels,
          const float* gates, int64_t first, int64_t last) {
  by_activation(element, [&](auto zero) {
    using T = decltype(zero);
    extent_of(channels).each([&](int64_t i, auto width) __attribute__((always_inline)) {
      const V factor = sigmoid(width.read(gates + i * W, V{}));
      for (int64_t t = first; t < last; ++t) {
        T* p = reinterpret_cast<T*>(out.data + t * out.stride) + i * W;
        const T* q = reinterpret_cast<const T*>(rest.data + t * rest.stride) + i * W;
        width.write(p, madd(width.read(p, V{}), factor, width.read(q, V{})));
      }
    });
  });
}

}  // namespace
