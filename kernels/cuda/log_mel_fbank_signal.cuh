// The samples of log_mel_fbank, on their way into shared memory.
#pragma once

#include "log_mel_fbank_plan.cuh"

namespace spkfast {
namespace {

// Value `n` of the noise that spkfast/reference/log_mel_fbank.py defines as gaussian_noise.
__device__ __forceinline__ float gaussian_noise(unsigned long long seed, unsigned n) {
  unsigned low = n, high = static_cast<unsigned>(seed >> 32), key = static_cast<unsigned>(seed);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product = 0xD256D193ull * low;
    low = static_cast<unsigned>(product >> 32) ^ key ^ high;
    high = static_cast<unsigned>(product);
    key += 0x9E3779B9u;
  }
  const float radius = sqrtf(-2.0f * logf((static_cast<float>(low >> 9) + 0.5f) * 0x1p-23f));
  return radius * cospif(static_cast<float>(high >> 8) * 0x1p-23f);
}

// The samples of one utterance as its frames see them.
struct Signal {
  const void* row;
  bool is_int16;
  int length;
  float gain, bias;
  unsigned long long seed;
  int padding;
  int preemphasis_mode;

  __device__ __forceinline__ Signal(const Plan& plan, int64_t utterance, int samples)
      : is_int16(plan.p.is_int16),
        length(samples),
        gain(plan.p.sample_scale),
        bias(0),
        seed(plan.p.seeds ? static_cast<unsigned long long>(plan.p.seeds[utterance]) : 0),
        padding(plan.p.padding),
        preemphasis_mode(plan.p.preemphasis_mode) {
    const int64_t start = utterance * plan.p.num_samples;
    if (is_int16) {
      row = static_cast<const int16_t*>(plan.p.waveforms) + start;
    } else {
      row = static_cast<const float*>(plan.p.waveforms) + start;
    }
    if (plan.p.waveform_norm) {
      gain = plan.waveform_stats[utterance].x;
      bias = plan.waveform_stats[utterance].y;
    }
    if (is_int16) gain *= 0x1p-15f;
  }

  // Scaled, without noise. Streamed past the caches, where the features should stay.
  __device__ __forceinline__ float sample(const float* at) const {
    return fmaf(__ldcs(at), gain, bias);
  }
  __device__ __forceinline__ float sample(const int16_t* at) const {
    return fmaf(static_cast<float>(__ldcs(at)), gain, bias);
  }
  __device__ __forceinline__ float sample(int position) const {
    return is_int16 ? sample(static_cast<const int16_t*>(row) + position)
                    : sample(static_cast<const float*>(row) + position);
  }
  // Four at once, at an aligned address.
  __device__ __forceinline__ float4 samples(const float* at) const {
    const float4 x = __ldcs(reinterpret_cast<const float4*>(at));
    return make_float4(fmaf(x.x, gain, bias), fmaf(x.y, gain, bias), fmaf(x.z, gain, bias),
                       fmaf(x.w, gain, bias));
  }
  __device__ __forceinline__ float4 samples(const int16_t* at) const {
    const short4 x = __ldcs(reinterpret_cast<const short4*>(at));
    return make_float4(fmaf(x.x, gain, bias), fmaf(x.y, gain, bias), fmaf(x.z, gain, bias),
                       fmaf(x.w, gain, bias));
  }

  // Which sample lies at a position of the padded signal; -1 for a zero.
  __device__ __forceinline__ int source(int position) const {
    if (position >= 0 && position < length) return position;
    if (padding == 0) return -1;
    const int last = 2 * length - (padding == 1 ? 2 : 1);
    const int period = max(1, padding == 1 ? last : last + 1);
    position %= period;
    if (position < 0) position += period;
    return min(position, abs(last - position));
  }

  // value(n) of the sample n there, less `coefficient` times that of the one before it.
  template <typename Value>
  __device__ __forceinline__ float emphasised(int position, float coefficient,
                                              const Value& value) const {
    const int here = source(position);
    const float x = here < 0 ? 0.0f : value(here);
    if (coefficient == 0) return x;  // NaN must not reach the next sample.
    int before = here - 1;
    if (preemphasis_mode == 0) {
      before = source(position - 1);
    } else if (here == 0 && preemphasis_mode == 1) {
      before = length > 1 ? 1 : 0;
    }
    return before < 0 ? x : fmaf(-coefficient, value(before), x);
  }
};

// tile[i] = samples[i] less `coefficient` times the one before it, for i from `begin` to `end`,
// rounded once: an offset of the samples mostly cancels here. With no coefficient, NaN must not
// reach the next sample. Where addresses allow, the ends are moved in to multiples of four.
template <typename T>
__device__ __forceinline__ void fill_inside(const Signal& signal, const T* samples, int& begin,
                                            int& end, float coefficient, float* tile) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  // Many loads under way at once; those past the end are repeats of the last.
  constexpr int kBatch = 6;
  if (reinterpret_cast<uintptr_t>(samples) % (4 * sizeof(T)) == 0) {
    begin = round_up(begin, 4);
    end = max(end / 4 * 4, begin);
    for (int base = begin; base < end; base += 4 * kBatch * threads) {
      float4 x[kBatch];
      float before[kBatch];
      SPKFAST_UNROLL
      for (int n = 0; n < kBatch; ++n) {
        const int i = min(base + 4 * (n * threads + thread), end - 4);
        before[n] = signal.sample(samples + i - 1);
        x[n] = signal.samples(samples + i);
      }
      SPKFAST_UNROLL
      for (int n = 0; n < kBatch; ++n) {
        const int i = min(base + 4 * (n * threads + thread), end - 4);
        float4 out = x[n];
        if (coefficient != 0) {
          out.x = fmaf(-coefficient, before[n], x[n].x);
          out.y = fmaf(-coefficient, x[n].x, x[n].y);
          out.z = fmaf(-coefficient, x[n].y, x[n].z);
          out.w = fmaf(-coefficient, x[n].z, x[n].w);
        }
        *reinterpret_cast<float4*>(tile + i) = out;
      }
    }
    return;
  }
  for (int base = begin; base < end; base += kBatch * threads) {
    float x[kBatch], before[kBatch];
    SPKFAST_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const int i = min(base + n * threads + thread, end - 1);
      before[n] = signal.sample(samples + i - 1);
      x[n] = signal.sample(samples + i);
    }
    SPKFAST_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const int i = min(base + n * threads + thread, end - 1);
      tile[i] = coefficient == 0 ? x[n] : fmaf(-coefficient, before[n], x[n]);
    }
  }
}

// The tile of frames that begins at position `first` of the padded signal, as above, and what the
// first value of a frame, which has none before it, needs: edges[2 f] is that of frame f, and
// edges[2 f + 1] what its last one would hand on.
__device__ __forceinline__ void fill(const Plan& plan, const Signal& signal, int first, int frames,
                                     float coefficient, float* shared) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int length = plan.p.frame_length, shift = plan.p.frame_shift;
  const int count = (frames - 1) * shift + length;
  float* tile = shared + plan.tile;
  // Where neither sample needs a second look.
  int begin = min(max(1 - first, 0), count), end = max(min(signal.length - first, count), begin);
  if (signal.is_int16) {
    const auto* samples = static_cast<const int16_t*>(signal.row) + first;
    fill_inside(signal, samples, begin, end, coefficient, tile);
  } else {
    const auto* samples = static_cast<const float*>(signal.row) + first;
    fill_inside(signal, samples, begin, end, coefficient, tile);
  }
  // The rest of the tile, then the edges, by their number.
  auto visit = [&](int i, bool again, const auto& value) {
    const int edge = i - count, frame = edge / 2;
    if (edge < 0) {
      const float x = signal.emphasised(first + i, coefficient, value);
      tile[i] = again ? tile[i] + x : x;
    } else {
      const int position = first + frame * shift + (edge % 2 ? length - 1 : 0);
      const float x = signal.emphasised(position, plan.signal_preemphasis, value) *
                      (edge % 2 ? plan.frame_preemphasis : 1.0f);
      float& out = shared[plan.edges + edge];
      out = again ? out + x : x;
    }
  };
  const auto sample = [&](int n) { return signal.sample(n); };
  for (int i = thread; i < count - (end - begin) + 2 * frames; i += threads) {
    visit(i < begin ? i : i + end - begin, false, sample);
  }
  if (!plan.p.seeds) return;
  __syncthreads();
  const auto noise = [&](int n) {
    return plan.p.dither * gaussian_noise(signal.seed, static_cast<unsigned>(n));
  };
  for (int i = thread; i < count + 2 * frames; i += threads) visit(i, true, noise);
}

}  // namespace
}  // namespace spkfast
