// The kernel of log_mel_fbank over vectors of one instruction set, whose header the including unit
// names before. W frames at a time, one in each lane, sample by sample: no shuffles in the
// arithmetic, and a frame's numbers depend neither on its neighbours nor on the tile it falls in.
#pragma once

#include "log_mel_fbank_plan.h"
#include "simd/butterflies.h"

namespace {

using spkfast::cpu::FftPass;
using spkfast::cpu::kMelUnroll;
using spkfast::cpu::LogMelFbankKernel;
using spkfast::cpu::LogMelFbankPlan;
using spkfast::cpu::LogMelFbankRow;
using spkfast::cpu::MelFilter;

using U32 [[gnu::vector_size(W * 4)]] = uint32_t;
using U64 [[gnu::vector_size(W * 8)]] = uint64_t;

constexpr float kFloatMin = 1.17549435e-38F, kFloatMax = 3.40282347e+38F;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Natural logarithm of values that are not negative, within 2 units of rounding; NaN stays NaN.
// Polynomial of S. Moshier's Cephes library (logf). Values that are known to be normal numbers, or
// NaN or infinite, take the short way.
template <bool kNormal = false>
[[gnu::always_inline]] inline V logarithm(V x) {
  const I tiny = kNormal ? I{} : x < kFloatMin;
  const V scaled = kNormal ? x : tiny ? x * 0x1p25F : x;
  const I bits = reinterpret_cast<I>(scaled);
  I exponent = ((bits >> 23) - 127) - (tiny & 25);
  const I fraction_bits = (bits & 0x7fffff) | 0x3f800000;
  V fraction = reinterpret_cast<V>(fraction_bits);
  const I large = fraction > 1.41421356F;
  fraction = large ? fraction * 0.5F : fraction;
  exponent -= large;
  const V e = __builtin_convertvector(exponent, V);
  const V f = fraction - 1.0F, square = f * f;
  V y = f * 7.0376836292E-2F - 1.1514610310E-1F;
  y = madd(y, f, all(1.1676998740E-1F));
  y = madd(y, f, all(-1.2420140846E-1F));
  y = madd(y, f, all(1.4249322787E-1F));
  y = madd(y, f, all(-1.6668057665E-1F));
  y = madd(y, f, all(2.0000714765E-1F));
  y = madd(y, f, all(-2.4999993993E-1F));
  y = madd(y, f, all(3.3333331174E-1F));
  y = y * f * square;
  y = madd(e, all(-2.12194440e-4F), y);
  y = nmadd(all(0.5F), square, y);
  y = madd(e, all(0.693359375F), f + y);
  if constexpr (!kNormal) y = x == 0.0F ? all(-__builtin_inff()) : y;
  return x <= kFloatMax ? y : x;  // NaN and infinity are their own logarithm
}

// Cosine of 2 pi h / 2^24.
[[gnu::always_inline]] inline V cosine_of_turn(I h) {
  const I quadrant = ((h + (1 << 21)) >> 22) & 3;
  const I rest = ((h + (1 << 21)) & ((1 << 22) - 1)) - (1 << 21);
  const V x = __builtin_convertvector(rest, V) * 3.7450702e-7F, z = x * x;
  V sine = madd(z, all(-1.9515295891E-4F), all(8.3321608736E-3F));
  sine = madd(sine, z, all(-1.6666654611E-1F));
  sine = madd(sine * z, x, x);
  V cosine = madd(z, all(2.443315711809948E-5F), all(-1.388731625493765E-3F));
  cosine = madd(cosine, z, all(4.166664568298827E-2F));
  cosine = madd(cosine * z, z, 1.0F - 0.5F * z);
  const V value = (quadrant & 1) != 0 ? sine : cosine;
  return (quadrant == 1) | (quadrant == 2) ? -value : value;
}

// Standard normal noise of samples n: Philox2x32-10, then Box and Muller's cosine, as the
// definition has it.
inline V gaussian_noise(uint64_t seed, U32 n) {
  U32 low = n, high = U32{} + static_cast<uint32_t>(seed >> 32);
  uint32_t key = static_cast<uint32_t>(seed);
  for (int round = 0; round < 10; ++round) {
    const U64 product = __builtin_convertvector(low, U64) * uint64_t{0xD256D193};
    low = __builtin_convertvector(product >> 32, U32) ^ key ^ high;
    high = __builtin_convertvector(product, U32);
    key += 0x9E3779B9;
  }
  const I radius_bits = reinterpret_cast<I>(low) >> 9 & 0x7fffff;
  const I angle = reinterpret_cast<I>(high) >> 8 & 0xffffff;
  const V uniform = (__builtin_convertvector(radius_bits, V) + 0.5F) * 0x1p-23F;
  return root(logarithm(uniform) * -2.0F) * cosine_of_turn(angle);
}

// Sample at which the padding finds the value for position p; -1 for zero.
inline int64_t source(int64_t p, int64_t length, int64_t padding) {
  if (p >= 0 && p < length) return p;
  if (padding == 0 || length == 0) return -1;
  const int64_t period = padding == 1 ? (length > 1 ? 2 * length - 2 : 1) : 2 * length;
  p %= period;
  if (p < 0) p += period;
  return p < length ? p : (padding == 1 ? period : period - 1) - p;
}

// The signal from position `first` on into out: scaled, with noise, pre-emphasised where that is of
// the whole signal, padded. Whole vectors are written, `count` values and more. False where a
// sample among the first `used` is NaN or infinite.
template <typename Sample>
bool prepare(const LogMelFbankPlan& plan, const LogMelFbankRow& row, const Sample* samples,
             int64_t first, int64_t used, int64_t count, float* out) {
  const bool emphasise = plan.preemphasis_mode != 0;
  const V mean = all(row.mean), gain = all(row.gain);
  U32 steps;
  for (int64_t w = 0; w < W; ++w) steps[w] = static_cast<uint32_t>(w);
  I bad = {};
  const auto look_at = [&](V x, int64_t i, I outside) __attribute__((always_inline)) {
    I found = ~(x - x == 0.0F) & ~outside;
    if (i + W > used)
      found &= reinterpret_cast<I>(steps) < static_cast<int32_t>(used > i ? used - i : 0);
    bad |= found;
  };
  // Samples n as they come, to samples as the front-end sees them before pre-emphasis.
  const auto scaled = [&](V x, U32 n) __attribute__((always_inline)) {
    x = (x - mean) * gain;
    return row.noisy ? madd(all(plan.dither), gaussian_noise(row.seed, n), x) : x;
  };
  for (int64_t i = 0; i < count; i += W) {
    const int64_t p = first + i;
    if (p >= 1 && p + W <= row.length) {
      const U32 n = steps + static_cast<uint32_t>(p);
      const V x = load(samples + p);
      look_at(x, i, I{});
      V current = scaled(x, n);
      if (emphasise)
        current = nmadd(all(plan.preemphasis), scaled(load(samples + p - 1), n - 1), current);
      store(out + i, current);
      continue;
    }
    Sample now[W], past[W];
    U32 n, before;
    I outside = {}, unpreceded = {};
    for (int64_t w = 0; w < W; ++w) {
      int64_t at = source(p + w, row.length, plan.padding);
      outside[w] = at < 0 ? -1 : 0;
      at = at < 0 ? 0 : at;
      unpreceded[w] = at == 0 && plan.preemphasis_mode == 2 ? -1 : 0;
      // The second sample, reflected, stands before the first.
      const int64_t previous = at > 0 ? at - 1 : row.length > 1 ? 1 : 0;
      n[w] = static_cast<uint32_t>(at);
      before[w] = static_cast<uint32_t>(previous);
      now[w] = row.length > 0 ? samples[at] : Sample{};
      past[w] = row.length > 0 ? samples[previous] : Sample{};
    }
    const V x = load(now);
    look_at(x, i, outside);
    V current = scaled(x, n);
    if (emphasise) {
      const V preceding = scaled(load(past), before);
      current = nmadd(all(plan.preemphasis), unpreceded ? V{} : preceding, current);
    }
    store(out + i, outside ? V{} : current);
  }
  int32_t any = 0;
  for (int64_t w = 0; w < W; ++w) any |= bad[w];
  return any == 0;
}

// Means of the frames at signal + w * shift, one in each lane. Taken from the first sample, so that
// a constant frame has exactly its value.
V means(const LogMelFbankPlan& plan, const float* const* frames) {
  const int64_t length = plan.frame_length, whole = length / W * W;
  I inside;
  for (int64_t w = 0; w < W; ++w) inside[w] = whole + w < length ? -1 : 0;
  V sums[W], firsts;
  for (int64_t w = 0; w < W; ++w) {
    const float* frame = frames[w];
    const V origin = all(frame[0]);
    V sum = {};
    for (int64_t n = 0; n < whole; n += W) sum += load(frame + n) - origin;
    if (whole < length) sum += inside ? load(frame + whole) - origin : V{};
    sums[w] = sum;
    firsts[w] = frame[0];
  }
  transpose(sums);
  for (int64_t half = W / 2; half > 0; half /= 2) {
    for (int64_t w = 0; w < half; ++w) sums[w] += sums[w + half];
  }
  return firsts + sums[0] / static_cast<float>(length);
}

// Windowed frames into data as `stride` vectors a sample; returns the energy that the plan asks
// for.
V window_frames(const LogMelFbankPlan& plan, const float* const* frames, float* data,
                int64_t stride) {
  const V mean = plan.remove_dc ? means(plan, frames) : V{};
  const V emphasis = all(plan.preemphasis_mode == 0 ? plan.preemphasis : 0.0F);
  const int64_t length = plan.frame_length;
  V energy = {}, previous = {};
  for (int64_t n = 0; n < length; n += W) {
    V block[W];
    for (int64_t w = 0; w < W; ++w) block[w] = load(frames[w] + n);
    transpose(block);
    if (n == 0) previous = block[0] - mean;
    const int64_t count = length - n < W ? length - n : W;
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
      const V current = block[i] - mean;
      const V windowed = nmadd(emphasis, previous, current) * plan.window[n + i];
      previous = current;
      store(data + (n + i) * stride * W, windowed);
      if (plan.energy != 0) {
        const V counted = plan.energy == 1 ? current : windowed;
        energy = madd(counted, counted, energy);
      }
    };
    if (count == W) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) step(i);
    } else {
      for (int64_t i = 0; i < count; ++i) step(i);
    }
  }
  for (int64_t n = length; n < plan.fft_size; ++n) store(data + n * stride * W, V{});
  if (stride == 2) {
    for (int64_t n = 0; n < plan.fft_size; ++n) store(data + (2 * n + 1) * W, V{});
  }
  return energy;
}

// Decimation in frequency, in place: the results stay in digit-reversed order.
template <int R>
void run_pass(const FftPass& pass, float* data) {
  const int64_t stride = pass.stride;
  for (int64_t j = 0; j < stride; ++j) {
    const float* twiddles = pass.twiddles + j * (R - 1) * 2;
    for (int64_t b = 0; b < pass.blocks; ++b) {
      float* base = data + (b * R * stride + j) * 2 * W;
      Complex z[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float* at = base + r * stride * 2 * W;
        z[r] = {load(at), load(at + W)};
      }
      butterfly<R>(z);
      if (stride > 1) {
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) z[r] = times(z[r], twiddles[2 * r - 2], twiddles[2 * r - 1]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* at = base + r * stride * 2 * W;
        store(at, z[r].re);
        store(at + W, z[r].im);
      }
    }
  }
}

// Any radix, by the sum that defines the transform.
void run_general_pass(const FftPass& pass, float* data, float* scratch) {
  const int64_t radix = pass.radix, stride = pass.stride;
  const float *roots = pass.twiddles, *all_twiddles = roots + 2 * radix;
  for (int64_t j = 0; j < stride; ++j) {
    const float* twiddles = all_twiddles + j * (radix - 1) * 2;
    for (int64_t b = 0; b < pass.blocks; ++b) {
      float* base = data + (b * radix * stride + j) * 2 * W;
      for (int64_t r = 0; r < radix; ++r) {
        store(scratch + 2 * r * W, load(base + r * stride * 2 * W));
        store(scratch + (2 * r + 1) * W, load(base + r * stride * 2 * W + W));
      }
      for (int64_t q = 0; q < radix; ++q) {
        Complex sum = {load(scratch), load(scratch + W)};
        int64_t turn = 0;
        for (int64_t r = 1; r < radix; ++r) {
          turn += q;
          if (turn >= radix) turn -= radix;
          const Complex z = {load(scratch + 2 * r * W), load(scratch + (2 * r + 1) * W)};
          sum = sum + times(z, roots[2 * turn], roots[2 * turn + 1]);
        }
        if (q > 0) sum = times(sum, twiddles[2 * q - 2], twiddles[2 * q - 1]);
        store(base + q * stride * 2 * W, sum.re);
        store(base + q * stride * 2 * W + W, sum.im);
      }
    }
  }
}

void run_any_pass(const FftPass& pass, float* data, float* scratch) {
  switch (pass.radix) {
    case 2:
      return run_pass<2>(pass, data);
    case 3:
      return run_pass<3>(pass, data);
    case 4:
      return run_pass<4>(pass, data);
    case 5:
      return run_pass<5>(pass, data);
    case 8:
      return run_pass<8>(pass, data);
    default:
      return run_general_pass(pass, data, scratch);
  }
}

// Spectra of two mirrored bins from the two points of the transform of half the size.
[[gnu::always_inline]] inline void split_power(V a, V b, V c, V d, V cosine, V sine, V& low,
                                               V& high) {
  const V even_re = a + c, even_im = b - d, odd_re = b + d, odd_im = c - a;
  const V turned_re = madd(sine, odd_im, cosine * odd_re);
  const V turned_im = nmadd(sine, odd_re, cosine * odd_im);
  const V x = even_re + turned_re, y = even_im + turned_im;
  const V u = even_re - turned_re, v = even_im - turned_im;
  low = madd(x, x, y * y);
  high = madd(u, u, v * v);
}

// Power spectrum (fft_size / 2 + 1,). Where even samples are the real and odd ones the imaginary
// part of a transform of half the size, its result splits into the spectra of both.
void power_spectrum(const LogMelFbankPlan& plan, const float* data, float* power) {
  const int64_t points = plan.points;
  if (points == plan.fft_size) {
    for (int64_t k = 0; k <= points / 2; ++k) {
      const float* z = data + plan.positions[k] * 2 * W;
      const V re = load(z), im = load(z + W);
      store(power + k * W, madd(re, re, im * im));
    }
    return;
  }
  for (int64_t k = 0; k <= points / 2; ++k) {
    const float* low = data + plan.positions[k] * 2 * W;
    const float* high = data + plan.positions[k == 0 ? 0 : points - k] * 2 * W;
    V below, above;
    split_power(load(low), load(low + W), load(high), load(high + W), all(plan.split_cosines[k]),
                all(plan.split_sines[k]), below, above);
    store(power + k * W, below);
    store(power + (points - k) * W, above);
  }
}

// Neither takes NaN for a bound.
[[gnu::always_inline]] inline V at_least(V x, float bound) { return x < bound ? all(bound) : x; }
[[gnu::always_inline]] inline V at_most(V x, float bound) { return x > bound ? all(bound) : x; }

[[gnu::always_inline]] inline V compress(const LogMelFbankPlan& plan, V energy) {
  if (plan.clip) energy = at_most(at_least(energy, plan.spectrum_low), plan.spectrum_high);
  if (plan.log_scale == 0.0F) return energy;
  energy = at_least(energy, plan.log_floor) + plan.log_offset;
  const bool normal = plan.log_floor + plan.log_offset >= kFloatMin;
  return (normal ? logarithm<true>(energy) : logarithm<false>(energy)) * plan.log_scale;
}

[[gnu::always_inline]] inline V compress_bin(const LogMelFbankPlan& plan, V power) {
  if (plan.magnitude) power = root(power);
  if (plan.clip) power = at_most(at_least(power, plan.spectrum_low), plan.spectrum_high);
  return power;
}

void mel_energies(const LogMelFbankPlan& plan, const float* power, float* out) {
  for (int64_t m = 0; m < plan.num_mels; ++m) {
    const MelFilter filter = plan.filters[m];
    const float *weights = plan.weights + filter.weights, *bins = power + filter.first * W;
    V a = {}, b = {}, c = {}, d = {};
    for (int32_t k = 0; k < filter.count; k += kMelUnroll) {
      a = madd(load(bins + k * W), all(weights[k]), a);
      b = madd(load(bins + (k + 1) * W), all(weights[k + 1]), b);
      c = madd(load(bins + (k + 2) * W), all(weights[k + 2]), c);
      d = madd(load(bins + (k + 3) * W), all(weights[k + 3]), d);
    }
    store(out + m * W, compress(plan, (a + b) + (c + d)));
  }
}

// Lanes (size, W) to rows (count, size).
void write(const LogMelFbankPlan& plan, const float* lanes, int64_t count, float* out, double* sums,
           float* highest) {
  const int64_t size = plan.size;
  V most = all(highest ? *highest : 0.0F);
  for (int64_t m = 0; m < size; m += W) {
    V block[W];
    for (int64_t i = 0; i < W; ++i) block[i] = load(lanes + (m + i < size ? m + i : size - 1) * W);
    transpose(block);
    // From the first frame on, so that a constant column has exactly its value for a mean.
    V sum = {};
    for (int64_t w = 1; w < count; ++w) sum += block[w] - block[0];
    if (highest) {
      // NaN wins, and stays.
      for (int64_t w = 0; w < count; ++w)
        most = (block[w] > most) | (block[w] != block[w]) ? block[w] : most;
    }
    const int64_t rest = size - m < W ? size - m : W;
    if (rest == W) {
      for (int64_t w = 0; w < count; ++w) store(out + w * size + m, block[w]);
    } else {
      for (int64_t w = 0; w < count; ++w) {
        for (int64_t i = 0; i < rest; ++i) out[w * size + m + i] = block[w][i];
      }
    }
    if (sums) {
      for (int64_t i = 0; i < rest; ++i) {
        sums[m + i] += static_cast<double>(count) * static_cast<double>(block[0][i]) +
                       static_cast<double>(sum[i]);
      }
    }
  }
  for (int64_t w = 0; highest && w < W; ++w) {
    if (most[w] > *highest || most[w] != most[w]) *highest = most[w];
  }
}

// Mean and biased variance of the samples of an utterance.
template <typename Sample>
void moments_of(const Sample* samples, int64_t length, double* mean, double* variance) {
  using Doubles [[gnu::vector_size(W * 8)]] = double;
  const int64_t whole = length / W * W;
  double centre = 0, total = 0;
  for (int squared = 0; squared < 2; ++squared) {
    Doubles sums = {};
    for (int64_t n = 0; n < whole; n += W) {
      const Doubles x = __builtin_convertvector(load(samples + n), Doubles) - centre;
      sums += squared ? x * x : x;
    }
    total = 0;
    for (int64_t w = 0; w < W; ++w) total += sums[w];
    for (int64_t n = whole; n < length; ++n) {
      const double x = static_cast<double>(samples[n]) - centre;
      total += squared ? x * x : x;
    }
    total /= static_cast<double>(length > 0 ? length : 1);
    if (!squared) centre = total;
  }
  *mean = centre;
  *variance = total;
}

void moments(const LogMelFbankRow& row, double* mean, double* variance) {
  if (row.shorts) {
    moments_of(row.shorts, row.length, mean, variance);
  } else {
    moments_of(row.floats, row.length, mean, variance);
  }
}

// From one frame of a tile to the next among the prepared samples: frames that overlap share
// theirs, others stand side by side without what lies between.
int64_t frame_stride(const LogMelFbankPlan& plan) {
  return plan.frame_shift <= plan.frame_length ? plan.frame_shift : round_up(plan.frame_length, W);
}

struct Workspace {
  int64_t signal, data, power, scratch, lanes, total;

  explicit Workspace(const LogMelFbankPlan& plan) {
    data = 0;
    power = data + 2 * plan.points * W;
    lanes = power + (plan.fft_size / 2 + 1 + kMelUnroll) * W;
    scratch = lanes + (plan.num_mels + plan.size) * W;
    signal = scratch + 2 * plan.largest_radix * W;
    total = signal + round_up((W - 1) * frame_stride(plan) + plan.frame_length, W) + 2 * W;
  }
};

int64_t workspace_size(const LogMelFbankPlan& plan) { return Workspace(plan).total; }

// Asks for samples that the next tile needs, so that they come from memory while this one is
// computed.
void prefetch(const LogMelFbankRow& row, int64_t first, int64_t count) {
  const int64_t end = first + count < row.length ? first + count : row.length;
  const char* base = row.shorts ? reinterpret_cast<const char*>(row.shorts)
                                : reinterpret_cast<const char*>(row.floats);
  const int64_t size = row.shorts ? 2 : 4;
  for (int64_t byte = (first > 0 ? first : 0) * size; byte < end * size; byte += 64)
    __builtin_prefetch(base + byte, 0, 2);
}

bool tile(const LogMelFbankPlan& plan, const LogMelFbankRow& row, int64_t first, int64_t count,
          float* out, double* sums, float* highest, float* memory) {
  const Workspace at(plan);
  float *signal = memory + at.signal, *data = memory + at.data, *power = memory + at.power;
  const auto prepared = [&](int64_t from, int64_t used, float* to) {
    const int64_t whole = round_up(used, W);
    return row.shorts ? prepare(plan, row, row.shorts, from, used, whole, to)
                      : prepare(plan, row, row.floats, from, used, whole, to);
  };
  const int64_t stride = frame_stride(plan);
  bool good = true;
  if (stride == plan.frame_shift) {
    const int64_t used = (count - 1) * stride + plan.frame_length;
    good = prepared(first, used, signal);
    // Read, but not used, by the last vector of the last frame.
    for (int64_t w = 0; w < W; ++w) signal[round_up(used, W) + w] = 0;
  } else {
    for (int64_t w = 0; w < count; ++w)
      good &= prepared(first + w * plan.frame_shift, plan.frame_length, signal + w * stride);
  }
  // The next tile starts where this one has its last frames.
  const int64_t next = first + (W - 1) * plan.frame_shift + plan.frame_length,
                part = W * plan.frame_shift / 4;
  prefetch(row, next, part);
  for (int64_t i = 0; i < count * plan.size; i += 16) __builtin_prefetch(out + i, 1, 3);
  const float* frames[W];
  for (int64_t w = 0; w < W; ++w) frames[w] = signal + (w < count ? w : count - 1) * stride;
  V energy = window_frames(plan, frames, data, plan.points == plan.fft_size ? 2 : 1);
  prefetch(row, next + part, part);
  for (int64_t k = 0; k < plan.num_passes; ++k)
    run_any_pass(plan.passes[k], data, memory + at.scratch);
  prefetch(row, next + 2 * part, part);
  power_spectrum(plan, data, power);
  prefetch(row, next + 3 * part, part);
  if (plan.magnitude || plan.clip) {
    for (int64_t k = 0; k <= plan.fft_size / 2; ++k)
      store(power + k * W, compress_bin(plan, load(power + k * W)));
  }
  for (int64_t k = 0; k < kMelUnroll; ++k) store(power + (plan.fft_size / 2 + 1 + k) * W, V{});

  // Cepstra come after the filters that they are made of; an energy takes its place before or
  // behind the rest.
  float* lanes = memory + at.lanes;
  const bool energy_first = plan.energy != 0 && !plan.energy_last;
  float* features = lanes + (energy_first ? W : 0);
  if (plan.has_cosines) {
    float* mels = lanes + plan.size * W;
    mel_energies(plan, power, mels);
    for (int64_t c = 0; c < plan.num_cosines; ++c) {
      V sum = {};
      for (int64_t m = 0; m < plan.num_mels; ++m)
        sum = madd(load(mels + m * W), all(plan.cosines[c * plan.num_mels + m]), sum);
      store(features + c * W, sum);
    }
  } else {
    mel_energies(plan, power, features);
  }
  if (plan.energy != 0) {
    energy = logarithm(at_least(energy * plan.energy_scale, plan.energy_floor));
    store(lanes + (energy_first ? 0 : plan.size - 1) * W, energy);
  }
  write(plan, lanes, count, out, sums, highest);
  return good;
}

void finish(const LogMelFbankPlan& plan, float* features, int64_t count, double* sums,
            float highest) {
  const int64_t size = plan.size;
  const float floor = highest - plan.top_db;
  const bool floored = plan.top_db < kFloatMax;
  if (!floored && !plan.mean_norm && !plan.std_norm) return;
  if (floored) {
    for (int64_t m = 0; m < size; ++m) sums[m] = 0;
    for (int64_t t = 0; t < count; ++t) {
      float* row = features + t * size;
      for (int64_t m = 0; m < size; ++m) row[m] = row[m] >= floor ? row[m] : floor;
      for (int64_t m = 0; m < size; ++m) sums[m] += static_cast<double>(row[m]);
    }
  }
  if (!plan.mean_norm && !plan.std_norm) return;
  constexpr int64_t kColumns = 256;
  float mean[kColumns], scale[kColumns];
  double squares[kColumns];
  for (int64_t first = 0; first < size; first += kColumns) {
    const int64_t columns = size - first < kColumns ? size - first : kColumns;
    float* block = features + first;
    for (int64_t m = 0; m < columns; ++m)
      mean[m] = static_cast<float>(sums[first + m] / static_cast<double>(count));
    if (plan.std_norm) {
      for (int64_t m = 0; m < columns; ++m) squares[m] = 0;
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t m = 0; m < columns; ++m) {
          const double deviation = static_cast<double>(block[t * size + m]) - mean[m];
          squares[m] += deviation * deviation;
        }
      }
      const int64_t divisor = plan.std_unbiased && count > 1 ? count - 1 : count;
      for (int64_t m = 0; m < columns; ++m) {
        double variance = squares[m] / static_cast<double>(divisor) + plan.var_eps;
        variance = variance < 1e-20 ? 1e-20 : variance;
        scale[m] = static_cast<float>(1 / (__builtin_sqrt(variance) + plan.std_eps));
        if (!plan.mean_norm) mean[m] = 0;
      }
      for (int64_t t = 0; t < count; ++t) {
        float* row = block + t * size;
        for (int64_t m = 0; m < columns; ++m) row[m] = (row[m] - mean[m]) * scale[m];
      }
    } else {
      for (int64_t t = 0; t < count; ++t) {
        float* row = block + t * size;
        for (int64_t m = 0; m < columns; ++m) row[m] -= mean[m];
      }
    }
  }
}

}  // namespace
