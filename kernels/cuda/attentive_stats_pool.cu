// Weighted mean and variance over time, and their gradient, in two forms each by what lies side by
// side in memory: "rows" where it is the frames of a channel, "columns" where it is the channels.
//
// Forward, every value is read once and held in registers, where two passes give the variance of a
// chunk of frames; chunks begin at multiples of a constant and merge in order, so that a row gives
// the same bits whatever it is padded to or batched with. The gradient takes one pass: the inner
// sum of the softmax has a closed form (docs/ops/attentive_stats_pool.md).
#include <cmath>

#include "attentive_stats_pool.cuh"
#include "common/moments.cuh"
#include "common/rows.cuh"

namespace spkfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRows = kThreads / kRowLanes;
constexpr int kChunkGroups = 10;
constexpr int kChunkFrames = kChunkGroups * kGroupFrames;
constexpr int kColumnFrames = 8;  // that a thread holds of its channels
// Of a block, in the gradient: frames and channels of rows, and frames of columns.
constexpr int kTileFrames = kWarpSize * kPackFrames;
constexpr int kRowChannels = 4;  // of a warp
constexpr int kSegmentFrames = 8 * kWarps * kColumnFrames;

// Channels of a thread: a warp reads 128 bytes of each frame.
template <typename T>
constexpr int kColumnChannels = 4 / sizeof(T);
template <typename T>
constexpr int kColumnTile = kWarpSize * kColumnChannels<T>;

// How many of the channels of a thread, from `c` on, exist.
template <typename T>
__device__ __forceinline__ int own_channels(const AttentiveStatsPoolInputs& in, int64_t c) {
  const int64_t rest = in.channels - c;
  return rest < kColumnChannels<T> ? max(static_cast<int>(rest), 0) : kColumnChannels<T>;
}

// Some frames of the channels of a thread, of which `channels` exist; zeros elsewhere.
template <typename T, int kChannels>
__device__ __forceinline__ void load_columns(const T* at, int64_t stride, int frames, int channels,
                                             bool aligned,
                                             Pack<T, kChannels> (&out)[kColumnFrames]) {
  SPKFAST_UNROLL
  for (int f = 0; f < kColumnFrames; ++f) out[f] = {};
  if (aligned) {
    if (channels == 0) return;
    SPKFAST_UNROLL
    for (int f = 0; f < kColumnFrames; ++f) {
      if (f < frames) out[f] = *reinterpret_cast<const Pack<T, kChannels>*>(at + f * stride);
    }
    return;
  }
  SPKFAST_UNROLL
  for (int f = 0; f < kColumnFrames; ++f) {
    SPKFAST_UNROLL
    for (int v = 0; v < kChannels; ++v) {
      if (f < frames && v < channels) out[f].set(v, at[f * stride + v]);
    }
  }
}

template <typename T, int kChannels>
__device__ __forceinline__ void store_columns(T* at, int64_t stride, int frames, int channels,
                                              bool aligned,
                                              const float (&values)[kColumnFrames][kChannels]) {
  SPKFAST_UNROLL
  for (int f = 0; f < kColumnFrames; ++f) {
    if (f >= frames) continue;
    if (aligned) {
      Pack<T, kChannels> rounded = {};
      SPKFAST_UNROLL
      for (int v = 0; v < kChannels; ++v) rounded.set(v, from_float<T>(values[f][v]));
      if (channels > 0) *reinterpret_cast<Pack<T, kChannels>*>(at + f * stride) = rounded;
    } else {
      SPKFAST_UNROLL
      for (int v = 0; v < kChannels; ++v) {
        if (v < channels) at[f * stride + v] = from_float<T>(values[f][v]);
      }
    }
  }
}

// What the host finds out once for all blocks.
struct Layout {
  unsigned tiles;     // blocks over channels
  unsigned segments;  // blocks over time, in the gradient
  int team;           // how many share a row chunk by chunk, each of kRowLanes threads
  int x_width;        // values that one instruction may move
  int logits_width;
  int grad_width;  // of gradients, which begin where memory was allocated
};

// Of frames from `start` on, before `end`, of one channel.
template <typename T, int kGroups>
__device__ __forceinline__ Moments row_moments(const AttentiveStatsPoolInputs& in,
                                               const Layout& layout, int64_t b, int64_t c,
                                               int start, int end) {
  const int first = start + static_cast<int>(threadIdx.x) % kRowLanes * kPackFrames;
  Pack<T, kPackFrames> raw_x[kGroups], raw_logits[kGroups] = {};  // without logits, zeros
  const T* x = static_cast<const T*>(in.x) + b * in.x_row_stride + c * in.x_stride;
  load_row(x, first, end, layout.x_width, raw_x);
  if (in.logits) {
    const int64_t offset = b * in.logit_row_stride + (in.shared ? 0 : c * in.logit_stride);
    load_row(static_cast<const T*>(in.logits) + offset, first, end, layout.logits_width,
             raw_logits);
  }
  float values[kGroups * kPackFrames], logits[kGroups * kPackFrames];
  SPKFAST_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const bool whole = start + (g + 1) * kGroupFrames <= end;
    SPKFAST_UNROLL
    for (int i = 0; i < kPackFrames; ++i) {
      const int n = g * kPackFrames + i;
      const bool real = whole || first + g * kGroupFrames + i < end;
      values[n] = real ? raw_x[g].get(i) : 0.0f;
      logits[n] = real ? raw_logits[g].get(i) : -INFINITY;
    }
  }
  return moments_of(values, logits, SharedFrames<kRowLanes>());
}

// Eight lanes per row and channel; with more than a chunk of frames, a team of eights.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 2)
    attentive_stats_pool_rows_kernel(const __grid_constant__ AttentiveStatsPoolParams p,
                                     const __grid_constant__ Layout layout) {
  const AttentiveStatsPoolInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x), member = thread / kRowLanes;
  const int team = kGroups < kChunkGroups ? 1 : layout.team, part = member % team;
  const int64_t b = blockIdx.x / layout.tiles;
  const int64_t c = int64_t{blockIdx.x % layout.tiles} * (kRows / team) + member / team;
  const bool inside = c < in.channels;
  const int length = clamped_length(in.lengths, b, in.frames), end = inside ? length : 0;
  Moments all;
  if constexpr (kGroups < kChunkGroups) {
    all = row_moments<T, kGroups>(in, layout, b, c, 0, end);
  } else {
    SPKFAST_DYNAMIC_SHARED(float4, parts);  // [2][kRows], in turn, so that one barrier is enough
    float4* turn = parts;
    all = no_moments();
    SPKFAST_NO_UNROLL
    for (int first = 0; first < length; first += team * kChunkFrames) {
      const int start = first + part * kChunkFrames, stop = min(end, start + kChunkFrames);
      const Moments found = row_moments<T, kGroups>(in, layout, b, c, start, stop);
      if (team == 1) {
        all = merge(all, found);
        continue;
      }
      if (thread % kRowLanes == 0) turn[member] = pack(found);
      __syncthreads();
      for (int n = member - part; n < member - part + team; ++n) {
        all = merge(all, unpack(turn[n]));
      }
      turn = turn == parts ? parts + kRows : parts;
    }
  }
  if (inside && part == 0 && thread % kRowLanes == 0) {
    write_moments({p.mean, p.var, p.highest, p.total}, all, length, b, c, in.channels, in.shared);
  }
}

// Values of the channels of a thread at eight frames; those at or past `end` weigh nothing.
template <typename T>
struct Columns {
  static constexpr int kChannels = kColumnChannels<T>;
  float x[kChannels][kColumnFrames];
  float logits[kChannels][kColumnFrames];

  __device__ __forceinline__ Columns(const AttentiveStatsPoolInputs& in, const Layout& layout,
                                     int64_t b, int64_t c, int first, int end) {
    const int frames = end - first;
    const int channels = own_channels<T>(in, c);
    Pack<T, kChannels> raw_x[kColumnFrames], raw_logits[kColumnFrames];
    const T* at = static_cast<const T*>(in.x) + b * in.x_row_stride + first * in.x_stride + c;
    load_columns(at, in.x_stride, frames, channels, layout.x_width >= kChannels, raw_x);
    const T* row = static_cast<const T*>(in.logits) + b * in.logit_row_stride;
    if (!in.shared) {
      load_columns(row + first * in.logit_stride + c, in.logit_stride, frames, channels,
                   layout.logits_width >= kChannels, raw_logits);
    }
    SPKFAST_UNROLL
    for (int f = 0; f < kColumnFrames; ++f) {
      const float common = in.shared && in.logits && f < frames ? to_float(row[first + f]) : 0.0f;
      SPKFAST_UNROLL
      for (int v = 0; v < kChannels; ++v) {
        x[v][f] = raw_x[f].get(v);
        logits[v][f] = f >= frames ? -INFINITY : in.shared ? common : raw_logits[f].get(v);
      }
    }
  }
};

// A block per row and tile of channels; its warps take eight frames each in turn.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    attentive_stats_pool_columns_kernel(const __grid_constant__ AttentiveStatsPoolParams p,
                                        const __grid_constant__ Layout layout) {
  SPKFAST_DYNAMIC_SHARED(float4, parts);  // [kWarps][kColumnTile]
  constexpr int kChannels = kColumnChannels<T>, kTile = kColumnTile<T>;
  const AttentiveStatsPoolInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t b = blockIdx.x / layout.tiles;
  const int64_t tile = int64_t{blockIdx.x % layout.tiles} * kTile;
  const int length = clamped_length(in.lengths, b, in.frames);
  Moments own[kChannels];
  SPKFAST_UNROLL
  for (Moments& one : own) one = no_moments();
  SPKFAST_NO_UNROLL
  for (int first = warp * kColumnFrames; first < length; first += kWarps * kColumnFrames) {
    Columns<T> columns(in, layout, b, tile + lane * kChannels, first, length);
    SPKFAST_UNROLL
    for (int v = 0; v < kChannels; ++v) {
      own[v] = merge(own[v], moments_of(columns.x[v], columns.logits[v], OwnFrames()));
    }
  }
  SPKFAST_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    parts[warp * kTile + lane * kChannels + v] = pack(own[v]);
  }
  __syncthreads();
  if (thread >= kTile || tile + thread >= in.channels) return;
  Moments all = no_moments();
  SPKFAST_UNROLL
  for (int n = 0; n < kWarps; ++n) {
    all = merge(all, unpack(parts[n * kTile + thread]));
  }
  write_moments({p.mean, p.var, p.highest, p.total}, all, length, b, tile + thread, in.channels,
                in.shared);
}

// What the gradient needs of one channel.
struct Channel {
  float grad_mean, grad_var, mean, var, highest, inverse_total;

  // Without logits pass a logit of 0, as is their highest.
  __device__ __forceinline__ void gradient(float x, float logit, float& grad_x,
                                           float& grad_logit) const {
    const float weight = exponential(logit - highest) * inverse_total;
    const float centred = x - mean, slope = grad_var * centred;
    grad_x = weight * (grad_mean + 2 * slope);
    grad_logit = weight * fmaf(centred, grad_mean + slope, -grad_var * var);
  }
};

__device__ __forceinline__ Channel load_channel(const AttentiveStatsPoolBackwardParams& p,
                                                int64_t b, int64_t c) {
  const int64_t index = b * p.in.channels + c, weight = p.in.shared ? b : index;
  return {p.grad_mean[index], p.grad_var[index], p.mean[index],
          p.var[index],       p.highest[weight], 1.0f / p.total[weight]};
}

// A block takes 128 frames of a tile of channels, of which each warp holds four at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) attentive_stats_pool_backward_rows_kernel(
    const __grid_constant__ AttentiveStatsPoolBackwardParams p,
    const __grid_constant__ Layout layout) {
  const AttentiveStatsPoolInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int first =
      static_cast<int>(blockIdx.x % layout.segments) * kTileFrames + lane * kPackFrames;
  const unsigned index = blockIdx.x / layout.segments;  // of the row and the tile
  const int64_t b = index / layout.tiles;
  const int64_t tile = int64_t{index % layout.tiles} * (kWarps * kRowChannels);
  const int frames = static_cast<int>(in.frames);
  const int length = clamped_length(in.lengths, b, in.frames);
  const T* row = static_cast<const T*>(in.logits) + b * in.logit_row_stride;

  Pack<T, kPackFrames> x[kRowChannels][1], logits[kRowChannels][1];
  SPKFAST_UNROLL
  for (int n = 0; n < kRowChannels; ++n) {
    const int64_t c = tile + n * kWarps + warp;
    const int end = c < in.channels ? length : 0;
    const T* at = static_cast<const T*>(in.x) + b * in.x_row_stride + c * in.x_stride;
    load_row(at, first, end, layout.x_width, x[n]);
    if (in.logits) {
      const T* logit = row + (in.shared ? 0 : c * in.logit_stride);
      load_row(logit, first, end, layout.logits_width, logits[n]);
    } else {
      logits[n][0] = {};
    }
  }
  float sums[kPackFrames] = {};
  SPKFAST_UNROLL
  for (int n = 0; n < kRowChannels; ++n) {
    const int64_t c = tile + n * kWarps + warp;
    if (c >= in.channels) continue;
    const Channel channel = load_channel(p, b, c);
    float grad_x[kPackFrames], grad_logits[kPackFrames];
    SPKFAST_UNROLL
    for (int i = 0; i < kPackFrames; ++i) {
      channel.gradient(x[n][0].get(i), logits[n][0].get(i), grad_x[i], grad_logits[i]);
      if (first + i >= length) grad_x[i] = grad_logits[i] = 0;
      sums[i] += grad_logits[i];
    }
    const int64_t start = (b * in.channels + c) * in.frames;
    store_row(static_cast<T*>(p.grad_x) + start, first, frames, layout.grad_width, grad_x);
    if (in.logits && !in.shared) {
      store_row(static_cast<T*>(p.grad_logits) + start, first, frames, layout.grad_width,
                grad_logits);
    }
  }
  if (!in.logits || !in.shared) return;
  SPKFAST_DYNAMIC_SHARED(float, shared);  // [kWarps][kTileFrames]
  SPKFAST_UNROLL
  for (int i = 0; i < kPackFrames; ++i) {
    shared[warp * kTileFrames + i * kWarpSize + lane] = sums[i];
  }
  __syncthreads();
  if (thread >= kTileFrames) return;
  float sum = 0;
  SPKFAST_UNROLL
  for (int n = 0; n < kWarps; ++n) sum += shared[n * kTileFrames + thread];
  if (first + warp < frames) p.workspace[index * in.frames + first + warp] = sum;
}

// A block takes some hundred frames of a tile of channels; its warps take eight each in turn.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) attentive_stats_pool_backward_columns_kernel(
    const __grid_constant__ AttentiveStatsPoolBackwardParams p,
    const __grid_constant__ Layout layout) {
  constexpr int kChannels = kColumnChannels<T>;
  const AttentiveStatsPoolInputs& in = p.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t start = int64_t{blockIdx.x % layout.segments} * kSegmentFrames;
  const unsigned index = blockIdx.x / layout.segments;  // of the row and the tile
  const int64_t b = index / layout.tiles;
  const int64_t c = int64_t{index % layout.tiles} * kColumnTile<T> + lane * kChannels;
  const int length = clamped_length(in.lengths, b, in.frames);
  const int64_t stop = start + kSegmentFrames < in.frames ? start + kSegmentFrames : in.frames;
  const int end = static_cast<int>(stop);
  const int channels = own_channels<T>(in, c);
  const bool whole = layout.grad_width >= kChannels;
  Channel known[kChannels];
  SPKFAST_UNROLL
  for (int v = 0; v < kChannels; ++v) {
    known[v] = load_channel(p, b, c + v < in.channels ? c + v : in.channels - 1);
  }

  SPKFAST_NO_UNROLL
  for (int first = static_cast<int>(start) + warp * kColumnFrames; first < end;
       first += kWarps * kColumnFrames) {
    const Columns<T> columns(in, layout, b, c, first, min(length, end));
    float grad_x[kColumnFrames][kChannels], grad_logits[kColumnFrames][kChannels];
    SPKFAST_UNROLL
    for (int f = 0; f < kColumnFrames; ++f) {
      SPKFAST_UNROLL
      for (int v = 0; v < kChannels; ++v) {
        known[v].gradient(columns.x[v][f], columns.logits[v][f], grad_x[f][v], grad_logits[f][v]);
        if (first + f >= length) grad_x[f][v] = grad_logits[f][v] = 0;
      }
    }
    const int64_t at = (b * in.frames + first) * in.channels + c;
    store_columns(static_cast<T*>(p.grad_x) + at, in.channels, end - first, channels, whole,
                  grad_x);
    if (!in.logits) continue;
    if (!in.shared) {
      store_columns(static_cast<T*>(p.grad_logits) + at, in.channels, end - first, channels, whole,
                    grad_logits);
      continue;
    }
    SPKFAST_UNROLL
    for (int f = 0; f < kColumnFrames; ++f) {
      float sum = 0;
      SPKFAST_UNROLL
      for (int v = 0; v < kChannels; ++v) sum += v < channels ? grad_logits[f][v] : 0.0f;
      sum = warp_sum(sum);
      if (lane == f && first + f < end) p.workspace[index * in.frames + first + f] = sum;
    }
  }
}

// The gradient of shared logits, from what the tiles of channels left.
template <typename T>
__global__ void __launch_bounds__(kThreads) attentive_stats_pool_backward_sum_kernel(
    const __grid_constant__ AttentiveStatsPoolBackwardParams p,
    const __grid_constant__ Layout layout) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, frames = p.in.frames;
  if (index >= p.in.batch * frames) return;
  const int64_t b = index / frames;
  const float* at = p.workspace + b * layout.tiles * frames + index % frames;
  float sum = 0;
  SPKFAST_UNROLL_4
  for (unsigned n = 0; n < layout.tiles; ++n) sum += at[n * frames];
  static_cast<T*>(p.grad_logits)[index] = from_float<T>(sum);
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t backward_tile(const AttentiveStatsPoolInputs& in) {
  if (!in.channels_last) return kWarps * kRowChannels;
  return in.type == FloatType::kFloat ? kColumnTile<float> : kColumnTile<__half>;
}

// Blocks that a grid takes; 0 for more.
unsigned grid_size(int64_t a, int64_t b, int64_t c) {
  const int64_t most = 0x7fffffff;
  if (a > most || b > most || a * b > most || c > most || a * b * c > most) return 0;
  return static_cast<unsigned>(a * b * c);
}

template <typename T>
Layout lay_out(const AttentiveStatsPoolInputs& in, int64_t tile) {
  const int64_t side = in.channels_last ? in.channels : in.frames;
  return {
      .tiles = static_cast<unsigned>(divide_up(in.channels, tile)),
      .segments = static_cast<unsigned>(
          divide_up(in.frames, in.channels_last ? kSegmentFrames : kTileFrames)),
      .team = 1,
      .x_width = pack_width(in.x, in.x_row_stride, in.x_stride, side, sizeof(T)),
      .logits_width =
          in.shared ? pack_width(in.logits, in.logit_row_stride, 0, in.frames, sizeof(T))
                    : pack_width(in.logits, in.logit_row_stride, in.logit_stride, side, sizeof(T)),
      .grad_width = pack_width(nullptr, 0, 0, side, sizeof(T)),
  };
}

template <typename T, int kGroups>
cudaError_t launch_rows(const AttentiveStatsPoolParams& p, cudaStream_t stream) {
  int team = 1;
  while (team < kRows && team * kChunkFrames < p.in.frames) team *= 2;
  Layout layout = lay_out<T>(p.in, kRows / team);
  layout.team = team;
  const auto kernel = attentive_stats_pool_rows_kernel<T, kGroups>;
  const size_t bytes = team > 1 ? 2 * kRows * sizeof(float4) : 0;
  SPKFAST_LAUNCH(kernel, grid_size(p.in.batch, layout.tiles, 1), kThreads, bytes, stream, p,
                 layout);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const AttentiveStatsPoolParams& p, cudaStream_t stream) {
  if (p.in.channels_last) {
    const Layout layout = lay_out<T>(p.in, kColumnTile<T>);
    const auto kernel = attentive_stats_pool_columns_kernel<T>;
    SPKFAST_LAUNCH(kernel, grid_size(p.in.batch, layout.tiles, 1), kThreads,
                   kWarps * kColumnTile<T> * sizeof(float4), stream, p, layout);
    return cudaGetLastError();
  }
  // Registers for no more frames than there are: further ones would not change a bit.
  if (p.in.frames <= 4 * kGroupFrames) return launch_rows<T, 4>(p, stream);
  if (p.in.frames <= 7 * kGroupFrames) return launch_rows<T, 7>(p, stream);
  return launch_rows<T, kChunkGroups>(p, stream);
}

template <typename T>
cudaError_t launch(const AttentiveStatsPoolBackwardParams& p, cudaStream_t stream) {
  const AttentiveStatsPoolInputs& in = p.in;
  const Layout layout = lay_out<T>(in, backward_tile(in));
  const bool sums = in.logits && in.shared;
  const auto kernel = in.channels_last ? attentive_stats_pool_backward_columns_kernel<T>
                                       : attentive_stats_pool_backward_rows_kernel<T>;
  const size_t bytes = sums && !in.channels_last ? kWarps * kTileFrames * sizeof(float) : 0;
  SPKFAST_LAUNCH(kernel, grid_size(in.batch, layout.tiles, layout.segments), kThreads, bytes,
                 stream, p, layout);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || !sums) return error;
  const auto sum = attentive_stats_pool_backward_sum_kernel<T>;
  SPKFAST_LAUNCH(sum, grid_size(divide_up(in.batch * in.frames, kThreads), 1, 1), kThreads, 0,
                 stream, p, layout);
  return cudaGetLastError();
}

bool takes(const AttentiveStatsPoolInputs& in) {
  const int64_t most = int64_t{1} << 30;
  return in.batch <= most && in.channels <= most && in.frames <= most &&
         grid_size(in.batch, in.channels, in.frames / kTileFrames + 1) > 0;
}

template <typename Params>
cudaError_t launch_typed(const Params& p, cudaStream_t stream) {
  if (p.in.type == FloatType::kFloat) return launch<float>(p, stream);
  return p.in.type == FloatType::kHalf ? launch<__half>(p, stream)
                                       : launch<__nv_bfloat16>(p, stream);
}

}  // namespace

cudaError_t launch_attentive_stats_pool(const AttentiveStatsPoolParams& p, cudaStream_t stream) {
  if (p.in.batch == 0 || p.in.channels == 0) return cudaSuccess;
  return takes(p.in) ? launch_typed(p, stream) : cudaErrorInvalidValue;
}

size_t attentive_stats_pool_backward_workspace(const AttentiveStatsPoolInputs& in) {
  if (!in.logits || !in.shared) return 0;
  return static_cast<size_t>(in.batch * divide_up(in.channels, backward_tile(in)) * in.frames);
}

cudaError_t launch_attentive_stats_pool_backward(const AttentiveStatsPoolBackwardParams& p,
                                                 cudaStream_t stream) {
  if (p.in.batch == 0 || p.in.channels == 0 || p.in.frames == 0) return cudaSuccess;
  return takes(p.in) ? launch_typed(p, stream) : cudaErrorInvalidValue;
}

}  // namespace spkfast
