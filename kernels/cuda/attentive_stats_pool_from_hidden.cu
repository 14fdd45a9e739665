// Pooling whose logits are a product: each tile of them lives in shared memory and is pooled there.
//
// A block takes 64 channels of a row through its frames, 64 at a time: the product in registers,
// its result into shared memory, then each thread pools eight frames at once. Tiles begin at
// multiples of a constant, so that a row gives the same bits whatever it is padded to or batched
// with.
#include <cmath>

#include "attentive_stats_pool_from_hidden.cuh"
#include "common/moments.cuh"
#include "common/rows.cuh"

namespace spkfast {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 64;           // channels, and frames
constexpr int kDepth = 16;          // units that are in shared memory at once
constexpr int kStride = kTile + 4;  // of a row there, which spreads rows over the banks
constexpr int kOwnChannels = 8;     // of a thread in the product
constexpr int kOwnFrames = 4;
constexpr int kPooled = 8;  // frames that a thread pools at once, and
constexpr int kRounds = kTile * kTile / kPooled / kThreads;  // how often it does so per tile
static_assert(kTile == kRowLanes * kPooled && kRounds * (kThreads / kRowLanes) == kTile);
constexpr int kTileFloats = kDepth * kStride;
// Threads that share a channel: with frames side by side, and with channels side by side.
template <bool kChannelsLast>
constexpr int kParts = kChannelsLast ? kThreads / kTile : kRowLanes;
template <bool kChannelsLast>
constexpr int kSharedFloats = 2 * kTileFloats + kTile * kStride + 4 * kTile * kParts<kChannelsLast>;

// `units` and `weights`: [kDepth][kStride], from unit `depth` on; zeros past the ends, and for
// padding, which may hold anything.
template <typename T>
__device__ __forceinline__ void load_tiles(const AttentiveStatsPoolFromHiddenParams& p, int64_t b,
                                           int64_t channel, int depth, int first, int length,
                                           float* units, float* weights) {
  const int thread = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>(p.units) - depth;
  // Neighbouring threads read neighbouring values.
  const bool by_frame = p.frame_stride == 1;
  const int unit = by_frame ? thread / kTile : thread % kDepth;
  const int frame = by_frame ? thread % kTile : thread / kDepth;
  const int unit_step = by_frame ? kThreads / kTile : 0;
  const int frame_step = by_frame ? 0 : kThreads / kDepth;
  const T* hidden = static_cast<const T*>(p.hidden) + b * p.hidden_row_stride +
                    (depth + unit) * p.unit_stride + (first + frame) * p.frame_stride;
  const int64_t step = unit_step * p.unit_stride + frame_step * p.frame_stride;
  SPKFAST_UNROLL_4
  for (int n = 0; n < kDepth * kTile / kThreads; ++n) {
    const int k = unit + n * unit_step, t = frame + n * frame_step;
    units[k * kStride + t] = k < count && first + t < length ? to_float(hidden[n * step]) : 0.0f;
  }
  const int k = thread % kDepth, c = thread / kDepth;
  const T* weight = static_cast<const T*>(p.weight) + (channel + c) * p.units + depth + k;
  SPKFAST_UNROLL_4
  for (int n = 0; n < kDepth * kTile / kThreads; ++n) {
    const int skipped = n * (kThreads / kDepth);
    const bool exists = k < count && channel + c + skipped < p.channels;
    weights[k * kStride + c + skipped] = exists ? to_float(weight[skipped * p.units]) : 0.0f;
  }
}

// Logits of eight frames, in two packs that are `apart` frames from each other; -inf past the end.
__device__ __forceinline__ void load_logits(const float* row, int first, int apart, int end,
                                            float (&out)[kPooled]) {
  SPKFAST_UNROLL
  for (int g = 0; g < kPooled / kPackFrames; ++g) {
    const int t = first + g * apart;
    const float4 four = *reinterpret_cast<const float4*>(row + t);
    const float values[kPackFrames] = {four.x, four.y, four.z, four.w};
    SPKFAST_UNROLL
    for (int i = 0; i < kPackFrames; ++i) {
      out[g * kPackFrames + i] = t + i < end ? values[i] : -INFINITY;
    }
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) attentive_stats_pool_from_hidden_kernel(
    const __grid_constant__ AttentiveStatsPoolFromHiddenParams p, const unsigned tiles,
    const int width) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  float* units = shared;
  float* weights = units + kTileFloats;
  float* logits = weights + kTileFloats;                              // [kTile channels][kStride]
  auto* parts = reinterpret_cast<float4*>(logits + kTile * kStride);  // [kTile][kParts]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x / tiles, channel = int64_t{blockIdx.x % tiles} * kTile;
  const int length = clamped_length(p.lengths, b, p.frames);
  const T* x = static_cast<const T*>(p.x) + b * p.x_row_stride;
  const int own_frame = thread % (kTile / kOwnFrames) * kOwnFrames;
  const int own_channel = thread / (kTile / kOwnFrames) * kOwnChannels;

  // A thread pools one channel in all rounds, or one in each; moments wait in shared memory, where
  // each thread has its own.
  const auto pooled_channel = [&](int round) {
    return kChannelsLast ? thread % kTile
                         : round * (kTile / kRounds) + thread / kParts<kChannelsLast>;
  };
  const int part = kChannelsLast ? thread / kTile : thread % kParts<kChannelsLast>;
  SPKFAST_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    parts[pooled_channel(round) * kParts<kChannelsLast> + part] = pack(no_moments());
  }

  SPKFAST_NO_UNROLL
  for (int first = 0; first < length; first += kTile) {
    float sums[kOwnChannels][kOwnFrames] = {};
    int depth = 0;
    SPKFAST_NO_UNROLL
    do {  // Once at least: with no unit at all logits are the bias.
      __syncthreads();
      load_tiles<T>(p, b, channel, depth, first, length, units, weights);
      __syncthreads();
      SPKFAST_UNROLL_4
      for (int k = 0; k < kDepth; ++k) {
        const float4 four = *reinterpret_cast<const float4*>(units + k * kStride + own_frame);
        const float frames[kOwnFrames] = {four.x, four.y, four.z, four.w};
        SPKFAST_UNROLL
        for (int half = 0; half < kOwnChannels / 4; ++half) {
          const float4 eight =
              *reinterpret_cast<const float4*>(weights + k * kStride + own_channel + 4 * half);
          const float factors[4] = {eight.x, eight.y, eight.z, eight.w};
          SPKFAST_UNROLL
          for (int c = 0; c < 4; ++c) {
            SPKFAST_UNROLL
            for (int t = 0; t < kOwnFrames; ++t) {
              sums[4 * half + c][t] = fmaf(factors[c], frames[t], sums[4 * half + c][t]);
            }
          }
        }
      }
      depth += kDepth;
    } while (depth < p.units);
    SPKFAST_UNROLL
    for (int n = 0; n < kOwnChannels; ++n) {
      const int64_t c = channel + own_channel + n;
      const float bias = c < p.channels ? to_float(static_cast<const T*>(p.bias)[c]) : 0.0f;
      *reinterpret_cast<float4*>(logits + (own_channel + n) * kStride + own_frame) =
          make_float4(sums[n][0] + bias, sums[n][1] + bias, sums[n][2] + bias, sums[n][3] + bias);
    }
    __syncthreads();

    SPKFAST_NO_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int row = pooled_channel(round);
      const int end = channel + row < p.channels ? min(length - first, kTile) : 0;
      const int begin = kChannelsLast ? (part * kRounds + round) * kPooled : part * kPackFrames;
      constexpr int kApart = kChannelsLast ? kPackFrames : kGroupFrames;
      float values[kPooled], weighing[kPooled];
      if constexpr (kChannelsLast) {
        const T* at = x + (first + begin) * p.x_stride + channel + row;
        SPKFAST_UNROLL
        for (int i = 0; i < kPooled; ++i) {
          values[i] = begin + i < end ? to_float(at[i * p.x_stride]) : 0.0f;
        }
      } else {
        Pack<T, kPackFrames> raw[kPooled / kPackFrames];
        load_row(x + (channel + row) * p.x_stride + first, begin, end, width, raw);
        SPKFAST_UNROLL
        for (int i = 0; i < kPooled; ++i) {
          const int t = begin + i / kPackFrames * kGroupFrames + i % kPackFrames;
          values[i] = t < end ? raw[i / kPackFrames].get(i % kPackFrames) : 0.0f;
        }
      }
      load_logits(logits + row * kStride, begin, kApart, end, weighing);
      float4& state = parts[row * kParts<kChannelsLast> + part];
      state = pack(merge(unpack(state), moments_of(values, weighing, OwnFrames())));
    }
  }

  __syncthreads();
  if (thread >= kTile || channel + thread >= p.channels) return;
  Moments all = no_moments();
  SPKFAST_UNROLL
  for (int n = 0; n < kParts<kChannelsLast>; ++n) {
    all = merge(all, unpack(parts[thread * kParts<kChannelsLast> + n]));
  }
  write_moments({p.mean, p.var, p.highest, p.total}, all, length, b, channel + thread, p.channels,
                false);
}

template <typename T>
cudaError_t launch(const AttentiveStatsPoolFromHiddenParams& p, unsigned tiles,
                   cudaStream_t stream) {
  const int width = pack_width(p.x, p.x_row_stride, p.x_stride, p.frames, sizeof(T));
  const auto kernel = p.channels_last ? attentive_stats_pool_from_hidden_kernel<T, true>
                                      : attentive_stats_pool_from_hidden_kernel<T, false>;
  const int floats = p.channels_last ? kSharedFloats<true> : kSharedFloats<false>;
  SPKFAST_LAUNCH(kernel, static_cast<unsigned>(p.batch * tiles), kThreads, floats * sizeof(float),
                 stream, p, tiles, width);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attentive_stats_pool_from_hidden(const AttentiveStatsPoolFromHiddenParams& p,
                                                    cudaStream_t stream) {
  if (p.batch == 0 || p.channels == 0) return cudaSuccess;
  const int64_t most = 0x7fffffff, tiles = (p.channels + kTile - 1) / kTile;
  if (p.batch > most || tiles > most || p.batch * tiles > most || p.units > most / 2 ||
      p.frames > most / 2) {
    return cudaErrorInvalidValue;
  }
  if (p.type == FloatType::kFloat) return launch<float>(p, static_cast<unsigned>(tiles), stream);
  if (p.type == FloatType::kHalf) return launch<__half>(p, static_cast<unsigned>(tiles), stream);
  return launch<__nv_bfloat16>(p, static_cast<unsigned>(tiles), stream);
}

}  // namespace spkfast
