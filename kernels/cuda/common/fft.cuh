// Small complex DFTs in the registers of one thread, and the roots of unity that join them.
#pragma once

#include "platform.cuh"

namespace spkfast {

__device__ __forceinline__ float2 add(float2 a, float2 b) {
  return make_float2(a.x + b.x, a.y + b.y);
}
__device__ __forceinline__ float2 subtract(float2 a, float2 b) {
  return make_float2(a.x - b.x, a.y - b.y);
}
__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
__device__ __forceinline__ float2 scale(float factor, float2 a) {
  return make_float2(factor * a.x, factor * a.y);
}
// a - i b and a + i b.
__device__ __forceinline__ float2 subtract_turned(float2 a, float2 b) {
  return make_float2(a.x + b.y, a.y - b.x);
}
__device__ __forceinline__ float2 add_turned(float2 a, float2 b) {
  return make_float2(a.x - b.y, a.y + b.x);
}

// exp(-2 pi i k / n), 0 <= k < n.
__device__ __forceinline__ float2 unit_root(int k, int n) {
  if (2 * k > n) k -= n;  // A small argument is rounded less.
  // sincospif needs no slow path for large arguments, unlike sincosf: no stack.
  float sine, cosine;
  sincospif(-2.0f * static_cast<float>(k) / static_cast<float>(n), &sine, &cosine);
  return make_float2(cosine, sine);
}

// a + w b and a - w b for w = cosine (1 - i tangent): six fused operations, where the product alone
// would take four of eight.
__device__ __forceinline__ void butterfly(float2& a, float2& b, float cosine, float tangent) {
  const float2 c = make_float2(fmaf(tangent, b.y, b.x), fmaf(-tangent, b.x, b.y));
  b = make_float2(fmaf(-cosine, c.x, a.x), fmaf(-cosine, c.y, a.y));
  a = make_float2(fmaf(cosine, c.x, a.x), fmaf(cosine, c.y, a.y));
}

// The same for w = exp(-2 pi i k / 16), k in 0 to 7 and known at compile time.
__device__ __forceinline__ void butterfly_16(float2& a, float2& b, int k) {
  constexpr float kCosine[8] = {
      1, 0.92387953251128674f,  0.70710678118654752f,  0.38268343236508977f,
      0, -0.38268343236508977f, -0.70710678118654752f, -0.92387953251128674f};
  constexpr float kTangent[8] = {0, 0.41421356237309505f,  1,  2.41421356237309505f,
                                 0, -2.41421356237309505f, -1, -0.41421356237309505f};
  const float2 c = a, d = b;
  if (k == 0) {
    a = add(c, d);
    b = subtract(c, d);
  } else if (k == 4) {
    a = subtract_turned(c, d);
    b = add_turned(c, d);
  } else {
    butterfly(a, b, kCosine[k], kTangent[k]);
  }
}

template <int kSize>
__device__ __forceinline__ void dft(float2 (&x)[kSize]);

// Four points, after turning x[n] by exp(-2 pi i n k / 16) for k in 0 to 3.
__device__ __forceinline__ void dft_4_turned(float2 (&x)[4], int k) {
  butterfly_16(x[0], x[2], 2 * k);
  butterfly_16(x[1], x[3], 2 * k);
  butterfly_16(x[0], x[1], k);
  butterfly_16(x[2], x[3], k + 4);
  const float2 swapped = x[1];
  x[1] = x[2];
  x[2] = swapped;
}

// 4 kB points for kB of 2 or 4.
template <int kB>
__device__ __forceinline__ void dft_twiddled(float2 (&x)[4 * kB]) {
  float2 columns[kB][4];
  SPKFAST_UNROLL
  for (int b = 0; b < kB; ++b) {
    SPKFAST_UNROLL
    for (int a = 0; a < 4; ++a) columns[b][a] = x[b + kB * a];
    dft<4>(columns[b]);
  }
  SPKFAST_UNROLL
  for (int a = 0; a < 4; ++a) {
    float2 row[kB];
    SPKFAST_UNROLL
    for (int b = 0; b < kB; ++b) row[b] = columns[b][a];
    if constexpr (kB == 2) {
      butterfly_16(row[0], row[1], 2 * a);
    } else {
      dft_4_turned(row, a);
    }
    SPKFAST_UNROLL
    for (int b = 0; b < kB; ++b) x[a + 4 * b] = row[b];
  }
}

// kA * kB points without twiddles, where the two have no common factor (Good and Thomas).
template <int kA, int kB>
__device__ __forceinline__ void dft_coprime(float2 (&x)[kA * kB]) {
  constexpr int kSize = kA * kB;
  float2 grid[kB][kA];
  SPKFAST_UNROLL
  for (int b = 0; b < kB; ++b) {
    SPKFAST_UNROLL
    for (int a = 0; a < kA; ++a) grid[b][a] = x[(kB * a + kA * b) % kSize];
    dft<kA>(grid[b]);
  }
  SPKFAST_UNROLL
  for (int a = 0; a < kA; ++a) {
    float2 row[kB];
    SPKFAST_UNROLL
    for (int b = 0; b < kB; ++b) row[b] = grid[b][a];
    dft<kB>(row);
    SPKFAST_UNROLL
    for (int b = 0; b < kB; ++b) grid[b][a] = row[b];
  }
  SPKFAST_UNROLL
  for (int k = 0; k < kSize; ++k) x[k] = grid[k % kB][k % kA];
}

// x[k] becomes the sum over n of x[n] exp(-2 pi i n k / kSize).
template <int kSize>
__device__ __forceinline__ void dft(float2 (&x)[kSize]) {
  if constexpr (kSize == 2) {
    const float2 a = x[0];
    x[0] = add(a, x[1]);
    x[1] = subtract(a, x[1]);
  } else if constexpr (kSize == 3) {
    const float2 sum = add(x[1], x[2]);
    const float2 turned = scale(0.86602540378443865f, subtract(x[1], x[2]));
    const float2 middle = add(x[0], scale(-0.5f, sum));
    x[0] = add(x[0], sum);
    x[1] = subtract_turned(middle, turned);
    x[2] = add_turned(middle, turned);
  } else if constexpr (kSize == 4) {
    dft_4_turned(x, 0);
  } else if constexpr (kSize == 5) {
    constexpr float kCosine1 = 0.30901699437494742f, kCosine2 = -0.80901699437494742f;
    constexpr float kSine1 = 0.95105651629515357f, kSine2 = 0.58778525229247313f;
    const float2 a = add(x[1], x[4]), b = add(x[2], x[3]);
    const float2 c = subtract(x[1], x[4]), d = subtract(x[2], x[3]);
    const float2 p = add(add(x[0], scale(kCosine1, a)), scale(kCosine2, b));
    const float2 q = add(add(x[0], scale(kCosine2, a)), scale(kCosine1, b));
    const float2 r = add(scale(kSine1, c), scale(kSine2, d));
    const float2 s = subtract(scale(kSine2, c), scale(kSine1, d));
    x[0] = add(x[0], add(a, b));
    x[1] = subtract_turned(p, r);
    x[2] = subtract_turned(q, s);
    x[3] = add_turned(q, s);
    x[4] = add_turned(p, r);
  } else if constexpr (kSize == 8) {
    dft_twiddled<2>(x);
  } else if constexpr (kSize == 10) {
    dft_coprime<5, 2>(x);
  } else if constexpr (kSize == 16) {
    dft_twiddled<4>(x);
  } else {
    static_assert(kSize == 20, "no DFT of this size");
    dft_coprime<5, 4>(x);
  }
}

}  // namespace spkfast
