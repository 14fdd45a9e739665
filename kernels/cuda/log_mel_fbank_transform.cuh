// The transforms of log_mel_fbank: from samples in shared memory to power spectra there.
#pragma once

#include "common/fft.cuh"
#include "common/reduce.cuh"
#include "log_mel_fbank_plan.cuh"

namespace spkfast {
namespace {

// Cosine and tangent of 2 pi k / n for 0 <= k <= n / 4; a right angle is told by large numbers.
__device__ __forceinline__ float2 cosine_and_tangent(int k, int n) {
  const float2 root = unit_root(k, n);
  return 4 * k == n ? make_float2(0x1p-40f, 0x1p40f) : make_float2(root.x, -root.y / root.x);
}

// Power in the bins k and half - k of a real frame, from the values there of the transform of half
// its size over even + i odd samples; `angle` is that of k / fft_size. Samples come halved.
__device__ __forceinline__ float2 split_power(float2 z, float2 mirrored, float2 angle) {
  float2 even = make_float2(z.x + mirrored.x, z.y - mirrored.y);
  float2 odd = make_float2(z.y + mirrored.y, mirrored.x - z.x);
  butterfly(even, odd, angle.x, angle.y);
  return make_float2(even.x * even.x + even.y * even.y, odd.x * odd.x + odd.y * odd.y);
}

// FFT of 2 kA kB points for windows of kLength samples, in registers. Groups of kA lanes take one
// frame each: with n = b + kB a for the pairs of samples, lane l transforms over a for some b,
// hands the results round through shared memory once, transforms over b, and then holds the values
// l + kA k for k < kB. Surplus lanes repeat what others do.
template <int kA, int kB, int kLength, int kThreadCount>
struct Unrolled {
  static constexpr int kThreads = kThreadCount, kBlocks = 2, kTile = 32, kSmallTile = 16;
  static constexpr int kPair = 2;  // frames that one thread filters
  static constexpr int kHalf = kA * kB, kSize = 2 * kHalf, kWindow = kLength;
  static constexpr int kGroups = kWarpSize / kA;  // frames of a warp
  // Even, for pairs. Of the lanes that write bins k and k + 1 of neighbouring frames, few meet in a
  // bank; none do for groups of two and of four.
  static constexpr int kPowerStride = kTile + (kGroups + 1) / 2 * 2;
  static constexpr int kRow = kB % 2 == 0 && kB > 16 ? kB + 5 : kB + 1;  // free of conflicts too
  static constexpr int kBufferFloats = 2 * kGroups * kA * kRow;          // per warp
  static_assert(kB % kA == 0 && kLength % 2 == 0);

  static __device__ __forceinline__ int power_stride(const Plan&) { return kPowerStride; }

  static __device__ __forceinline__ void make_tables(const Plan& plan, float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    auto* twiddles = reinterpret_cast<float2*>(shared + plan.twiddles);  // [kA][kB]
    auto* split = reinterpret_cast<float2*>(shared + plan.split);        // [kHalf / 2]
    for (int i = thread; i < kHalf; i += kThreads) {
      twiddles[i] = unit_root(i / kB * (i % kB), kHalf);
    }
    for (int k = thread; k < kHalf / 2; k += kThreads) split[k] = cosine_and_tangent(k, kSize);
  }

  static __device__ __forceinline__ float group_sum(float value, int base) {
    float sum = 0;
    if constexpr ((kA & (kA - 1)) == 0) {
      sum = value;
      SPKFAST_UNROLL
      for (int distance = kA / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kFullMask, sum, distance);
      }
    } else {
      SPKFAST_UNROLL
      for (int lane = 0; lane < kA; ++lane) sum += __shfl_sync(kFullMask, value, base + lane);
    }
    return sum;
  }

  static __device__ __forceinline__ void transform(const Plan& plan, float* shared, int frames) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int group = min(lane / kA, kGroups - 1), l = lane % kA;
    const int mirror = group * kA + (kA - l) % kA;
    const auto* window = reinterpret_cast<const float2*>(shared + plan.window);
    const auto* twiddles = reinterpret_cast<const float2*>(shared + plan.twiddles);
    const auto* split = reinterpret_cast<const float2*>(shared + plan.split);
    auto* exchange =
        reinterpret_cast<float2*>(shared + plan.buffers + warp * kBufferFloats) + group * kA * kRow;

    for (int first = warp * kGroups; first < frames; first += kThreads / kWarpSize * kGroups) {
      const int frame = min(first + group, frames - 1);
      const auto* pairs =
          reinterpret_cast<const float2*>(shared + plan.tile + frame * plan.p.frame_shift);
      const float2 edge = reinterpret_cast<const float2*>(shared + plan.edges)[frame];
      float2 x[kB / kA][kA];
      float sum = 0;
      SPKFAST_UNROLL
      for (int b = 0; b < kB / kA; ++b) {
        SPKFAST_UNROLL
        for (int a = 0; a < kA; ++a) {
          const int least = kA * b + kB * a;
          x[b][a] = make_float2(0, 0);
          if (2 * least < kLength && (2 * (least + kA) <= kLength || 2 * (least + l) < kLength)) {
            x[b][a] = pairs[least + l];
          }
          if (least == 0 && l == 0) x[b][a].x = edge.x;
          sum += x[b][a].x + x[b][a].y;
        }
      }
      // The mean commutes with pre-emphasis, but for the first and last sample of the frame.
      const float mean =
          plan.p.remove_dc ? (group_sum(sum, group * kA) - edge.y) * (1.0f / kLength) : 0.0f;
      if (l == 0) x[0][0].x *= 1 - plan.frame_preemphasis;
      float energy = 0;
      SPKFAST_UNROLL
      for (int b = 0; b < kB / kA; ++b) {
        SPKFAST_UNROLL
        for (int a = 0; a < kA; ++a) {
          const int least = kA * b + kB * a;
          if (2 * least >= kLength) continue;
          if (2 * (least + kA) <= kLength || 2 * (least + l) < kLength) {
            const float2 taper = window[least + l];
            x[b][a].x = (x[b][a].x - mean) * taper.x;
            x[b][a].y = (x[b][a].y - mean) * taper.y;
          }
        }
      }
      if (plan.p.energy == 2) {
        SPKFAST_UNROLL
        for (int b = 0; b < kB / kA; ++b) {
          SPKFAST_UNROLL
          for (int a = 0; a < kA; ++a) energy += x[b][a].x * x[b][a].x + x[b][a].y * x[b][a].y;
        }
        // The window is halved.
        energy = 4 * group_sum(energy, group * kA);
        if (l == 0) shared[plan.energies + frame] = energy;
      }

      SPKFAST_UNROLL
      for (int b = 0; b < kB / kA; ++b) {
        dft<kA>(x[b]);
        SPKFAST_UNROLL
        for (int a = 0; a < kA; ++a) {
          const int n = l + kA * b;
          exchange[a * kRow + n] = a == 0 ? x[b][a] : multiply(x[b][a], twiddles[a * kB + n]);
        }
      }
      __syncwarp();
      float2 z[kB];
      SPKFAST_UNROLL
      for (int b = 0; b < kB; ++b) z[b] = exchange[l * kRow + b];
      __syncwarp(
          kFullMask);  // Before the next frames are written; the shuffles below wait as well.
      dft<kB>(z);

      float* column = shared + plan.power + frame;
      SPKFAST_UNROLL
      for (int b = 0; b < kB / 2; ++b) {
        const float2 wanted = l == 0 ? z[(kB - b) % kB] : z[kB - 1 - b];
        float2 mirrored;
        mirrored.x = __shfl_sync(kFullMask, wanted.x, mirror);
        mirrored.y = __shfl_sync(kFullMask, wanted.y, mirror);
        const int k = l + kA * b;
        const float2 power = split_power(z[b], mirrored, split[k]);
        column[k * kPowerStride] = power.x;
        column[(kHalf - k) * kPowerStride] = power.y;
      }
      if (l == 0) {
        const float2 middle = z[kB / 2];
        column[kHalf / 2 * kPowerStride] = 4 * (middle.x * middle.x + middle.y * middle.y);
      }
    }
  }
};

// Any size: a warp takes one frame at a time through shared memory, pass by pass.
struct General {
  static constexpr int kThreads = 128, kBlocks = 4, kTile = kThreads / kWarpSize, kPair = 1;

  static __device__ __forceinline__ int power_stride(const Plan& plan) { return plan.power_stride; }

  static __device__ __forceinline__ int radix(const Plan& plan, int pass) {
    return static_cast<int>(plan.digits >> (4 * pass)) & 15;
  }

  static __device__ __forceinline__ void make_tables(const Plan& plan, float* shared) {
    const int thread = static_cast<int>(threadIdx.x), half = plan.half;
    auto* twiddles = reinterpret_cast<float2*>(shared + plan.twiddles);  // [half]
    auto* split = reinterpret_cast<float2*>(shared + plan.split);        // [half / 2 + 1]
    auto* order = reinterpret_cast<int16_t*>(shared + plan.order);       // [half] digits reversed
    int passes = 0;
    while (radix(plan, passes)) ++passes;
    for (int n = thread; n < half; n += kThreads) {
      twiddles[n] = unit_root(n, half);
      if (n <= half / 2) split[n] = cosine_and_tangent(n, 2 * half);
      int position = 0;
      for (int pass = passes - 1, size = half, rest = n; pass >= 0; --pass) {
        size /= radix(plan, pass);
        position += rest % radix(plan, pass) * size;
        rest /= radix(plan, pass);
      }
      order[n] = static_cast<int16_t>(position);
    }
  }

  template <int kRadix>
  static __device__ __forceinline__ void pass(float2* values, const float2* twiddles, int half,
                                              int width) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int i = lane; i < half / kRadix; i += kWarpSize) {
      const int offset = i % width, step = half / (kRadix * width) * offset;
      float2* base = values + (i - offset) * kRadix + offset;
      float2 x[kRadix];
      SPKFAST_UNROLL
      for (int r = 0; r < kRadix; ++r) x[r] = multiply(base[r * width], twiddles[r * step]);
      dft<kRadix>(x);
      SPKFAST_UNROLL
      for (int r = 0; r < kRadix; ++r) base[r * width] = x[r];
    }
  }

  static __device__ __forceinline__ void transform(const Plan& plan, float* shared, int frames) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int frame = static_cast<int>(threadIdx.x) / kWarpSize;
    if (frame >= frames) return;
    const int half = plan.half, length = plan.p.frame_length;
    const float* samples = shared + plan.tile + frame * plan.p.frame_shift;
    const float* window = shared + plan.window;
    const auto* twiddles = reinterpret_cast<const float2*>(shared + plan.twiddles);
    const auto* split = reinterpret_cast<const float2*>(shared + plan.split);
    const auto* order = reinterpret_cast<const int16_t*>(shared + plan.order);
    auto* values = reinterpret_cast<float2*>(shared + plan.buffers) + frame * half;
    const float2 edge = reinterpret_cast<const float2*>(shared + plan.edges)[frame];

    float mean = 0;
    if (plan.p.remove_dc) {
      float sum = 0;
      for (int n = lane; n < length; n += kWarpSize) sum += n == 0 ? edge.x : samples[n];
      mean = (warp_sum(sum) - edge.y) / static_cast<float>(length);
    }
    auto windowed = [&](int n) {
      if (n >= length) return 0.0f;
      const float x = n == 0 ? edge.x * (1 - plan.frame_preemphasis) : samples[n];
      return (x - mean) * window[n];
    };
    float energy = 0;
    for (int n = lane; n < half; n += kWarpSize) {
      const float2 pair = make_float2(windowed(2 * n), windowed(2 * n + 1));
      energy += pair.x * pair.x + pair.y * pair.y;
      values[order[n]] = pair;
    }
    if (plan.p.energy == 2) {
      energy = 4 * warp_sum(energy);  // The window is halved.
      if (lane == 0) shared[plan.energies + frame] = energy;
    }
    __syncwarp();

    for (int index = 0, width = 1; width < half; ++index) {
      const int r = radix(plan, index);
      if (r == 8) {
        pass<8>(values, twiddles, half, width);
      } else if (r == 4) {
        pass<4>(values, twiddles, half, width);
      } else if (r == 2) {
        pass<2>(values, twiddles, half, width);
      } else if (r == 3) {
        pass<3>(values, twiddles, half, width);
      } else {
        pass<5>(values, twiddles, half, width);
      }
      width *= r;
      __syncwarp();
    }

    float* column = shared + plan.power + frame;
    for (int k = lane; k <= half / 2; k += kWarpSize) {
      const float2 power = split_power(values[k], values[k == 0 ? 0 : half - k], split[k]);
      column[k * plan.power_stride] = power.x;
      column[(half - k) * plan.power_stride] = power.y;
    }
  }
};

}  // namespace
}  // namespace spkfast
