// One frame at a time, for streams and for the few frames that would leave most lanes of a tile
// empty. It does to each number what the tile does, so that the result is the same to the last bit:
// only what lies in the lanes differs. Included by the unit of AVX2 after the tile, whose pieces it
// uses; serves AVX-512 too.
#pragma once

#include "log_mel_fbank_tile.h"

namespace {

static_assert(W == spkfast::cpu::kFrameLanes);

// As `times`, with a factor in each lane.
[[gnu::always_inline]] inline Complex times_lanes(Complex a, V c, V s) {
  return {nmadd(a.im, s, a.re * c), madd(a.re, s, a.im * c)};
}

[[gnu::always_inline]] inline V reversed(V v) {
  return __builtin_shuffle(v, I{7, 6, 5, 4, 3, 2, 1, 0});
}

// Mean of a frame, in the order in which a tile of `lanes` frames adds.
float mean_of(const LogMelFbankPlan& plan, const float* frame, int64_t lanes) {
  const int64_t length = plan.frame_length, whole = length / lanes * lanes;
  const float origin = frame[0];
  float sums[16] = {};
  if (lanes == 16) {
    V low = {}, high = {};
    for (int64_t n = 0; n < whole; n += 16) {
      low += load(frame + n) - origin;
      high += load(frame + n + W) - origin;
    }
    store(sums, low);
    store(sums + W, high);
  } else {
    V low = {};
    for (int64_t n = 0; n < whole; n += W) low += load(frame + n) - origin;
    store(sums, low);
  }
  for (int64_t n = whole; n < length; ++n) sums[n - whole] += frame[n] - origin;
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t w = 0; w < half; ++w) sums[w] += sums[w + half];
  }
  return origin + sums[0] / static_cast<float>(length);
}

struct FrameWorkspace {
  int64_t signal, windowed, data, re, im, power, scratch, total;

  explicit FrameWorkspace(const LogMelFbankPlan& plan) {
    const int64_t points = round_up(plan.points, W) + W;
    signal = 0;
    windowed = round_up(plan.frame_length, W) + 2 * W;
    // The last lanes of the first pass read on behind the frame.
    data = windowed + round_up(plan.fft_size, W) + 2 * W;
    re = data + 2 * (plan.points / 8) * W;
    im = re + points;
    power = im + points;
    scratch = power + round_up(plan.fft_size / 2 + 1 + kMelUnroll, W);
    const int64_t general = 2 * plan.largest_radix * W, mels = kMelUnroll * plan.num_mels;
    total = scratch + (general > mels ? general : mels);
  }
};

int64_t frame_workspace(const LogMelFbankPlan& plan) { return FrameWorkspace(plan).total; }

// Eight transforms of an eighth of the points each, one in each lane, from the first pass on.
void transform_frame(const LogMelFbankPlan& plan, const float* windowed, float* data, float* re,
                     float* im, float* scratch) {
  const int64_t eighth = plan.points / 8, padded = round_up(eighth, W);
  for (int64_t j = 0; j < eighth; j += W) {
    Complex z[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const float* at = windowed + 2 * (j + r * eighth);
      const V a = load(at), b = load(at + W);
      z[r] = {__builtin_shuffle(a, b, I{0, 2, 4, 6, 8, 10, 12, 14}),
              __builtin_shuffle(a, b, I{1, 3, 5, 7, 9, 11, 13, 15})};
    }
    butterfly8(z);
    if (eighth > 1) {
#pragma GCC unroll 8
      for (int r = 1; r < 8; ++r) {
        const float* twiddles = plan.frame_twiddles + 2 * (r - 1) * padded + j;
        z[r] = times_lanes(z[r], load(twiddles), load(twiddles + padded));
      }
    }
    V real[W], imaginary[W];
    for (int r = 0; r < 8; ++r) {
      real[r] = z[r].re;
      imaginary[r] = z[r].im;
    }
    transpose(real);
    transpose(imaginary);
    const int64_t count = eighth - j < W ? eighth - j : W;
    for (int64_t i = 0; i < count; ++i) {
      store(data + 2 * (j + i) * W, real[i]);
      store(data + (2 * (j + i) + 1) * W, imaginary[i]);
    }
  }
  for (int64_t k = 1; k < plan.num_passes; ++k) {
    FftPass pass = plan.passes[k];
    pass.blocks /= 8;
    run_any_pass(pass, data, scratch);
  }
  for (int64_t k = 0; k < eighth; ++k) {
    const float* z = data + plan.positions[8 * k] * 2 * W;
    store(re + 8 * k, load(z));
    store(im + 8 * k, load(z + W));
  }
  re[plan.points] = re[0];
  im[plan.points] = im[0];
}

void frame_power(const LogMelFbankPlan& plan, const float* re, const float* im, float* power) {
  const int64_t points = plan.points;
  for (int64_t k = 0; k <= points / 2; k += W) {
    // Bins k to k + 7 and their mirror images.
    const V a = load(re + k), b = load(im + k);
    const V c = reversed(load(re + points - k - (W - 1))),
            d = reversed(load(im + points - k - (W - 1)));
    V low, high;
    split_power(a, b, c, d, load(plan.split_cosines + k), load(plan.split_sines + k), low, high);
    if (k + W <= points / 2 + 1) {
      store(power + k, low);
      store(power + points - k - (W - 1), reversed(high));
    } else {
      for (int64_t w = 0; k + w <= points / 2; ++w) {
        power[k + w] = low[w];
        power[points - k - w] = high[w];
      }
    }
  }
}

// Filter outputs (num_mels,); `out` holds four times as many.
void frame_energies(const LogMelFbankPlan& plan, const float* power, float* out) {
  // The four sums of the tile, in four lanes.
  static_assert(kMelUnroll == 4);
  for (int64_t m = 0; m < plan.num_mels; ++m) {
    const MelFilter filter = plan.filters[m];
    const float *weights = plan.weights + filter.weights, *from = power + filter.first;
    __m128 sum = _mm_setzero_ps();
    for (int32_t k = 0; k < filter.count; k += kMelUnroll)
      sum = _mm_fmadd_ps(_mm_loadu_ps(from + k), _mm_loadu_ps(weights + k), sum);
    _mm_storeu_ps(out + kMelUnroll * m, sum);
  }
  int64_t m = 0;
  for (; m + 4 <= plan.num_mels; m += 4) {
    __m128 a = _mm_loadu_ps(out + 4 * m), b = _mm_loadu_ps(out + 4 * m + 4);
    __m128 c = _mm_loadu_ps(out + 4 * m + 8), d = _mm_loadu_ps(out + 4 * m + 12);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out + m, (a + b) + (c + d));
  }
  for (; m < plan.num_mels; ++m) {
    const float* parts = out + 4 * m;
    out[m] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
}

bool frame(const LogMelFbankPlan& plan, const LogMelFbankRow& row, int64_t first, int64_t lanes,
           float* out, float* memory) {
  const FrameWorkspace at(plan);
  float *signal = memory + at.signal, *windowed = memory + at.windowed, *power = memory + at.power;
  const int64_t length = plan.frame_length, samples = round_up(length, W);
  const bool good = row.shorts ? prepare(plan, row, row.shorts, first, length, samples, signal)
                               : prepare(plan, row, row.floats, first, length, samples, signal);
  const float mean = plan.remove_dc ? mean_of(plan, signal, lanes) : 0.0F;
  const float emphasis = plan.preemphasis_mode == 0 ? plan.preemphasis : 0.0F;
  const auto one = [&](int64_t n) {
    const float current = signal[n] - mean, previous = signal[n > 0 ? n - 1 : 0] - mean;
    windowed[n] = __builtin_fmaf(-emphasis, previous, current) * plan.window[n];
  };
  int64_t n = 0;
  for (; n < 1; ++n) one(n);
  for (; n + W <= length; n += W) {
    const V current = load(signal + n) - mean, previous = load(signal + n - 1) - mean;
    store(windowed + n, nmadd(all(emphasis), previous, current) * load(plan.window + n));
  }
  for (; n < length; ++n) one(n);
  for (; n < plan.fft_size + 2 * W; ++n) windowed[n] = 0;

  float *re = memory + at.re, *im = memory + at.im, *scratch = memory + at.scratch;
  transform_frame(plan, windowed, memory + at.data, re, im, scratch);
  frame_power(plan, re, im, power);
  const int64_t bins = plan.fft_size / 2 + 1;
  if (plan.magnitude || plan.clip) {
    for (int64_t k = 0; k < bins; k += W) store(power + k, compress_bin(plan, load(power + k)));
  }
  for (int64_t k = 0; k < kMelUnroll; ++k) power[bins + k] = 0;

  float* energies = scratch;
  frame_energies(plan, power, energies);
  float* mels = plan.has_cosines ? energies : out;
  int64_t m = 0;
  for (; m + W <= plan.num_mels; m += W) store(mels + m, compress(plan, load(energies + m)));
  for (; m < plan.num_mels; ++m) mels[m] = compress(plan, all(energies[m]))[0];
  for (int64_t c = 0; c < plan.num_cosines; ++c) {
    float sum = 0;
    for (int64_t k = 0; k < plan.num_mels; ++k)
      sum = __builtin_fmaf(mels[k], plan.cosines[c * plan.num_mels + k], sum);
    out[c] = sum;
  }
  return good;
}

}  // namespace
