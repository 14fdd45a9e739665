// Augmentation of waveforms over the vectors of one instruction set, whose header the including
// unit names before. What a row becomes depends neither on its neighbours nor on threads.
#pragma once

#include <type_traits>

#include "augmentation_kernel.h"
#include "simd/butterflies.h"
#include "simd/each.h"

namespace {

using spkfast::cpu::AugmentationKernel;
using spkfast::cpu::ConvolutionPlan;
using spkfast::cpu::RealFftPass;
using spkfast::cpu::Samples;
using spkfast::cpu::SpeedPlan;
using spkfast::cpu::SpeedTile;

constexpr float kShort = 1.0F / 32768;

// Calls body(i, count, vector of samples) for `count` samples, fewer than W at the end.
template <typename Body>
[[gnu::always_inline]] inline void each_vector(const Samples& samples, int64_t first, int64_t count,
                                               Body body) {
  const auto pass = [&](const auto* p, float scale) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + W <= count; i += W) body(i, W, load(p + i) * scale);
    if (i == count) return;
    std::remove_const_t<std::remove_pointer_t<decltype(p)>> last[W] = {};
    for (int64_t w = 0; i + w < count; ++w) last[w] = p[i + w];
    body(i, count - i, load(last) * scale);
  };
  if (samples.floats) {
    pass(samples.floats + first, 1.0F);
  } else {
    pass(samples.shorts + first, kShort);
  }
}

[[gnu::always_inline]] inline void store_count(float* p, int64_t count, V v) {
  if (count == W) return store(p, v);
  store_first(p, count, v);
}

void to_floats(const Samples& samples, int64_t first, int64_t count, float* out) {
  each_vector(samples, first, count, [&](int64_t i, int64_t n, V v) __attribute__((always_inline)) {
    store_count(out + i, n, v);
  });
}

template <int N>
[[gnu::always_inline]] inline void speed_periods(const SpeedTile& tile, int64_t p, int64_t q,
                                                 const float* x, float* out) {
  V sums[N] = {};
  for (int64_t k = 0; k < tile.taps; ++k) {
    const V weights = load(tile.weights + k * W);
    each<N>([&](auto n) __attribute__((always_inline)) {
      sums[n] = madd(weights, all(x[n * p + k]), sums[n]);
    });
  }
  each<N>([&](auto n)
              __attribute__((always_inline)) { store_count(out + n * q, tile.count, sums[n]); });
}

void change_speed(const SpeedPlan& plan, const float* x, int64_t periods, float* out) {
  constexpr int kTogether = 8;
  for (int64_t t = 0; t < plan.num_tiles; ++t) {
    const SpeedTile& tile = plan.tiles[t];
    const float* from = x + tile.start;
    float* to = out + tile.first;
    int64_t m = 0;
    for (; m + kTogether <= periods; m += kTogether) {
      speed_periods<kTogether>(tile, plan.p, plan.q, from + m * plan.p, to + m * plan.q);
    }
    for (; m < periods; ++m) {
      speed_periods<1>(tile, plan.p, plan.q, from + m * plan.p, to + m * plan.q);
    }
  }
}

double energy(const Samples& samples, int64_t first, int64_t count) {
  constexpr int64_t kBlock = 1024;  // summed in float32
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    V squares = {};
    each_vector(samples, first + begin, smaller(kBlock, count - begin),
                [&](int64_t, int64_t, V v)
                    __attribute__((always_inline)) { squares = madd(v, v, squares); });
    total += sum(squares);
  }
  return total;
}

void add(const Samples& samples, int64_t first, int64_t count, float gain, float* out) {
  const V by = all(gain);
  each_vector(samples, first, count, [&](int64_t i, int64_t n, V v) __attribute__((always_inline)) {
    if (n == W) {
      store(out + i, madd(by, v, load(out + i)));
    } else {
      store_first(out + i, n, madd(by, v, load_first(out + i, n, V{})));
    }
  });
}

// A transform across W vectors.
[[gnu::always_inline]] inline void butterfly_of_lanes(Complex* z) {
  if constexpr (W == 16) {
    Complex rows[4][4];
    each<4>([&](auto a) __attribute__((always_inline)) {
      Complex column[4] = {z[a], z[a + 4], z[a + 8], z[a + 12]};
      butterfly4(column);
      each<4>([&](auto b) __attribute__((always_inline)) {
        constexpr float kCosines[10] = {1.0F, 0.923879533F, 0.707106781F,  0.382683432F,
                                        0.0F, 0.0F,         -0.707106781F, 0.0F,
                                        0.0F, -0.923879533F};
        constexpr float kSines[10] = {0.0F,  -0.382683432F, -0.707106781F, -0.923879533F,
                                      -1.0F, 0.0F,          -0.707106781F, 0.0F,
                                      0.0F,  0.382683432F};
        constexpr int turn = a * b;
        rows[b][a] = turn == 0 ? column[b] : times(column[b], kCosines[turn], kSines[turn]);
      });
    });
    each<4>([&](auto b) __attribute__((always_inline)) {
      butterfly4(rows[b]);
      each<4>([&](auto a) __attribute__((always_inline)) { z[4 * a + b] = rows[b][a]; });
    });
  } else {
    butterfly<W>(z);
  }
}

// Decimation in frequency; on re and im exchanged, with the twiddles first, its own inverse up to
// the factor `points`.
template <int R, bool kInverse>
void run_pass(const RealFftPass& pass, int64_t points, float* re, float* im) {
  const int64_t stride = pass.stride, block = R * stride;
  for (int64_t begin = 0; begin < points; begin += block) {
    for (int64_t j = 0; j < stride; j += W) {
      float *at_re = re + begin + j, *at_im = im + begin + j;
      Complex z[R];
      each<R>([&](auto r) __attribute__((always_inline)) {
        z[r] = {load(at_re + r * stride), load(at_im + r * stride)};
      });
      const auto turn = [&]() __attribute__((always_inline)) {
        each<R - 1>([&](auto r) __attribute__((always_inline)) {
          const float* twiddles = pass.twiddles + 2 * r * stride + j;
          z[r + 1] = times(z[r + 1], load(twiddles), load(twiddles + stride));
        });
      };
      if constexpr (kInverse) turn();
      butterfly<R>(z);
      if constexpr (!kInverse) turn();
      each<R>([&](auto r) __attribute__((always_inline)) {
        store(at_re + r * stride, z[r].re);
        store(at_im + r * stride, z[r].im);
      });
    }
  }
}

template <bool kInverse>
void run_any_pass(const RealFftPass& pass, int64_t points, float* re, float* im) {
  switch (pass.radix) {
    case 2:
      return run_pass<2, kInverse>(pass, points, re, im);
    case 3:
      return run_pass<3, kInverse>(pass, points, re, im);
    case 4:
      return run_pass<4, kInverse>(pass, points, re, im);
    case 5:
      return run_pass<5, kInverse>(pass, points, re, im);
    default:
      return run_pass<8, kInverse>(pass, points, re, im);
  }
}

// The last transform, of W neighbours: W of them at a time, one in each lane. They stay transposed.
template <bool kInverse>
void run_lanes(int64_t points, float* re, float* im) {
  for (int64_t begin = 0; begin < points; begin += W * W) {
    V parts[2][W];
    for (int64_t w = 0; w < W; ++w) {
      parts[0][w] = load(re + begin + w * W);
      parts[1][w] = load(im + begin + w * W);
    }
    if constexpr (!kInverse) {
      transpose(parts[0]);
      transpose(parts[1]);
    }
    Complex z[W];
    each<W>([&](auto w) __attribute__((always_inline)) { z[w] = {parts[0][w], parts[1][w]}; });
    butterfly_of_lanes(z);
    each<W>([&](auto w) __attribute__((always_inline)) {
      parts[0][w] = z[w].re;
      parts[1][w] = z[w].im;
    });
    if constexpr (kInverse) {
      transpose(parts[0]);
      transpose(parts[1]);
    }
    for (int64_t w = 0; w < W; ++w) {
      store(re + begin + w * W, parts[0][w]);
      store(im + begin + w * W, parts[1][w]);
    }
  }
}

void spectrum(const ConvolutionPlan& plan, const Samples& samples, int64_t first, int64_t count,
              float* re, float* im) {
  const int64_t points = plan.points, low = smaller(count, points);
  to_floats(samples, first, low, re);
  to_floats(samples, first + low, count - low, im);
  for (int64_t n = low; n < points; ++n) re[n] = 0;
  for (int64_t n = count - low; n < points; ++n) im[n] = 0;
  for (int64_t n = 0; n < points; n += W) {
    const Complex z =
        times({load(re + n), load(im + n)}, load(plan.cosines + n), load(plan.sines + n));
    store(re + n, z.re);
    store(im + n, z.im);
  }
  for (int64_t pass = 0; pass < plan.num_passes; ++pass) {
    run_any_pass<false>(plan.passes[pass], points, re, im);
  }
  run_lanes<false>(points, re, im);
}

void convolved(const ConvolutionPlan& plan, float* re, float* im, const float* other_re,
               const float* other_im, float gain, int64_t count, float* out) {
  const int64_t points = plan.points;
  for (int64_t n = 0; n < points; n += W) {
    const Complex z = times({load(re + n), load(im + n)}, load(other_re + n), load(other_im + n));
    store(re + n, z.re);
    store(im + n, z.im);
  }
  run_lanes<true>(points, im, re);
  for (int64_t pass = plan.num_passes - 1; pass >= 0; --pass) {
    run_any_pass<true>(plan.passes[pass], points, im, re);
  }
  const V scale = all(gain / static_cast<float>(points));
  for (int64_t n = 0; n < points; n += W) {
    // By the conjugate of what the spectrum began with.
    const V c = load(plan.cosines + n) * scale, s = load(plan.sines + n) * scale;
    const V a = load(re + n), b = load(im + n);
    const V low = madd(b, s, a * c), high = nmadd(a, s, b * c);
    if (n < count) store_count(out + n, smaller(W, count - n), low);
    if (points + n < count) store_count(out + points + n, smaller(W, count - points - n), high);
  }
}

}  // namespace
