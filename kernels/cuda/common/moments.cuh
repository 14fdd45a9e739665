// Weighted mean and variance of frames, in parts that merge; the weights are exponentials of
// logits.
#pragma once

#include <cmath>
#include <cstdint>

#include "lengths.cuh"
#include "reduce.cuh"

namespace spkfast {

struct Moments {
  float highest;  // of the logits
  float total;    // sum of weights w = exp(logit - highest)
  float mean;     // sum(w x) / total
  float squares;  // sum(w (x - mean)^2)
};

__device__ __forceinline__ Moments no_moments() { return {-INFINITY, 0, 0, 0}; }

// On their way through shared memory.
__device__ __forceinline__ float4 pack(const Moments& m) {
  return make_float4(m.highest, m.total, m.mean, m.squares);
}
__device__ __forceinline__ Moments unpack(const float4& v) { return {v.x, v.y, v.z, v.w}; }

// The product rounds more the larger x is, and the less it then weighs.
__device__ __forceinline__ float exponential(float x) {
  return approximate_exp2(x * 0x1.715476p+0f);
}

// What logits are taken relative to: from -inf, that of a weight of zero would be NaN.
__device__ __forceinline__ float finite_highest(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}

// Frames that one thread holds.
struct OwnFrames {
  __device__ __forceinline__ float highest(float value) const { return value; }
  __device__ __forceinline__ float sum(float value) const { return value; }
};

// Frames that as many neighbouring lanes hold; all lanes of the warp take part at once.
template <int kLanes>
struct SharedFrames {
  __device__ __forceinline__ float highest(float value) const {
    SPKFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value = fmaxf(value, __shfl_xor_sync(kFullMask, value, distance));
    }
    return value;
  }
  __device__ __forceinline__ float sum(float value) const {
    SPKFAST_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(kFullMask, value, distance);
    }
    return value;
  }
};

// Of frames in registers, by two passes. Logits of -inf stand for no frame, where x must be a
// number; a NaN in x counts even under a weight of zero, as it does in the definition. Leaves
// weights in place of logits.
template <int kCount, typename Frames>
__device__ __forceinline__ Moments moments_of(const float (&x)[kCount], float (&logits)[kCount],
                                              Frames frames) {
  float highest = logits[0];
  SPKFAST_UNROLL
  for (int i = 1; i < kCount; ++i) highest = fmaxf(highest, logits[i]);
  highest = frames.highest(highest);
  const float from = finite_highest(highest);
  float total = 0, sum = 0;
  SPKFAST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    logits[i] = exponential(logits[i] - from);
    total += logits[i];
    sum = fmaf(logits[i], x[i], sum);
  }
  total = frames.sum(total);
  sum = frames.sum(sum);
  const float inverse = total > 0 ? 1.0f / total : 1.0f;
  float mean = sum * inverse;
  float squares = 0, rest = 0;
  SPKFAST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float centred = x[i] - mean, weighted = logits[i] * centred;
    squares = fmaf(weighted, centred, squares);
    rest += weighted;
  }
  squares = frames.sum(squares);
  rest = frames.sum(rest);  // What the sum lost to rounding; no number beside an infinite mean.
  if (fabsf(rest) < INFINITY) mean = fmaf(rest, inverse, mean);
  return {highest, total, mean, squares};
}

// Chan, Golub and LeVeque, 1979. To merge with the moments of no frame changes no
// bit of finite ones; infinite values make NaN.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  const float highest = fmaxf(a.highest, b.highest), from = finite_highest(highest);
  const float scale_a = exponential(a.highest - from), scale_b = exponential(b.highest - from);
  const float weight_a = a.total * scale_a, weight_b = b.total * scale_b;
  const float total = weight_a + weight_b, part = total > 0 ? weight_b / total : 0.0f;
  const float shift = b.mean - a.mean;
  return {highest, total, fmaf(shift, part, a.mean),
          fmaf(a.squares, scale_a, b.squares * scale_b) + shift * part * weight_a * shift};
}

// Where the moments of a pooled channel go.
struct PooledMoments {
  float* mean;     // (B, C)
  float* var;      // (B, C)
  float* highest;  // (B, C) or (B, 1)
  float* total;    // as highest
};

// `shared`: one row of logits for all channels.
__device__ __forceinline__ void write_moments(const PooledMoments& out, Moments moments, int length,
                                              int64_t row, int64_t channel, int64_t channels,
                                              bool shared) {
  float var = moments.squares / moments.total;
  if (length == 0) {
    moments = {0, 0, 0, 0};
    var = 0;
  } else if (moments.total == 0) {
    moments.mean = NAN;  // As the softmax of nothing but -inf.
  }
  out.mean[row * channels + channel] = moments.mean;
  out.var[row * channels + channel] = var;
  if (shared && channel > 0) return;
  const int64_t index = shared ? row : row * channels + channel;
  out.highest[index] = moments.highest;
  out.total[index] = moments.total;
}

}  // namespace spkfast
