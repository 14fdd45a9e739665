// The block of ECAPA-TDNN: two layers of one tap around a chain of convolutions, and gates on
// channels.
//
// The chain is one kernel. A block of it keeps the slice that runs through the convolutions in
// shared memory, in the type of the products, for all frames of a row or, where they do not fit,
// for a piece of them with so many more at each side as the convolutions will read. What is between
// the products is float.
#include <cmath>

#include "common/device.cuh"
#include "common/lengths.cuh"
#include "common/product_tile.cuh"
#include "common/reduce.cuh"
#include "se_res2net_block.cuh"
#include "tdnn_layer.cuh"

namespace spkfast {
namespace {

constexpr int kChainThreads = 256;
using ChainTile = ProductTile<kChainThreads>;
constexpr int kMeanThreads = 256;
constexpr int kGateThreads = 1024;
constexpr int kGateParts = 8;  // of a sum over inputs, which as many warps take
constexpr int kSumThreads = 256;
constexpr int kSumFrames = 8;

// What the kernels hand on, in the workspace.
struct BlockBuffers {
  float* hidden;    // (B, T, C)
  float* chained;   // (B, T, C - C / G)
  float* excited;   // (B, T, C)
  float* shortcut;  // (B, T, C), or null
  float* means;     // (B, C)
  float* squeezed;  // (B, units)
  float* gates;     // (B, C)
  void* slices;     // two of each row, of the type of the products; or null: in shared memory
};

struct ChainPlan {
  int own;         // frames that a block makes
  int held;        // frames of a slice
  unsigned tiles;  // blocks of a row
  bool in_shared;
};

template <typename O>
__global__ void __launch_bounds__(kChainThreads, 2)
    se_res2net_block_chain_kernel(const __grid_constant__ SERes2NetBlockParams p,
                                  const BlockBuffers buffers, const ChainPlan plan) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  auto& tile = *reinterpret_cast<ChainTile*>(shared);
  const int64_t b = blockIdx.x / plan.tiles;
  const int length = clamped_length(p.padded, b, p.frames);
  const int begin = static_cast<int>(blockIdx.x % plan.tiles) * plan.own;
  const int end = min(begin + plan.own, length);
  if (begin >= end) return;
  const int width = static_cast<int>(p.channels) / (p.convolutions + 1);
  const int made = width * p.convolutions;
  const int64_t reach = p.taps / 2 * p.dilation;
  // What is still needed where `left` convolutions follow.
  const auto first_of = [&](int left) {
    return static_cast<int>(max(begin - left * reach, int64_t{0}));
  };
  const auto last_of = [&](int left) {
    return static_cast<int>(min(end + left * reach, int64_t{length}));
  };
  const int origin = first_of(p.convolutions);
  O* from = plan.in_shared ? reinterpret_cast<O*>(&tile + 1)
                           : static_cast<O*>(buffers.slices) + b * 2 * plan.held * width;
  O* to = from + int64_t{plan.held} * width;
  const float* group = buffers.hidden + b * p.frames * p.channels + (p.first_passes ? width : 0);
  float* out = buffers.chained + b * p.frames * made;

  const int thread = static_cast<int>(threadIdx.x);
  for (int t = origin + thread / kWarpSize; t < last_of(p.convolutions);
       t += kChainThreads / kWarpSize) {
    for (int c = thread % kWarpSize; c < width; c += kWarpSize) {
      from[int64_t{t - origin} * width + c] = from_float<O>(group[t * p.channels + c]);
    }
  }
  // No barrier is needed but those of multiply: it has one between the writes of a slice and the
  // first read, and one between the last read and the next writes.
  SPKFAST_NO_UNROLL
  for (int j = 0; j < p.convolutions; ++j) {
    const int left = p.convolutions - 1 - j, last = last_of(left);
    group += width;
    const auto stage = [&](int depth) { stage_frames<O>(tile, from, width, depth, width); };
    SPKFAST_NO_UNROLL
    for (int start = first_of(left); start < last; start += ChainTile::kFrames) {
      SPKFAST_NO_UNROLL
      for (int channel = 0; channel < width; channel += kTileChannels) {
        ProductSums sums = {};
        const O* weight = static_cast<const O*>(p.res[j].weight);
        SPKFAST_NO_UNROLL
        for (int64_t tap = 0; tap < p.taps; ++tap) {
          const int64_t shift = (tap - p.taps / 2) * p.dilation;
          find_sources(tile, start, last, shift, length, p.reflect, origin);
          multiply(tile, width, weight, width, channel, stage, sums);
          weight += int64_t{width} * width;
        }
        finish({p.res[j].vectors, nullptr, true, true, false}, width, channel, sums);
        const int own = start + own_frame(), c = channel + own_channel();
        const float* addend = group + own * p.channels + c;
        float* result = out + int64_t{own} * made + j * width + c;
        O* next = to + int64_t{own - origin} * width + c;
        SPKFAST_UNROLL
        for (int i = 0; i < kOwnFrames; ++i) {
          if (own + i >= last) break;
          const bool is_own = own + i >= begin && own + i < end;
          SPKFAST_UNROLL
          for (int n = 0; n < kOwnChannels; ++n) {
            if (c + n >= width) continue;
            if (is_own) result[n] = sums[i][n];
            if (left > 0) next[n] = from_float<O>(sums[i][n] + addend[n]);
          }
          addend += p.channels;
          result += made;
          next += width;
        }
      }
    }
    O* const read = from;
    from = to;
    to = read;
  }
}

// A block takes 32 channels of a row through its frames.
__global__ void __launch_bounds__(kMeanThreads, 8)
    se_res2net_block_means_kernel(const __grid_constant__ SERes2NetBlockParams p,
                                  const BlockBuffers buffers, const unsigned channel_tiles) {
  SPKFAST_DYNAMIC_SHARED(float, parts);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x / channel_tiles;
  const int64_t c = int64_t{blockIdx.x % channel_tiles} * kWarpSize + thread % kWarpSize;
  const int length = clamped_length(p.excited, b, p.frames);
  const float* values = buffers.excited + b * p.frames * p.channels + c;
  float sum = 0;
  if (c < p.channels) {
    SPKFAST_UNROLL_4
    for (int t = thread / kWarpSize; t < length; t += kMeanThreads / kWarpSize) {
      sum += values[t * p.channels];
    }
  }
  parts[thread] = sum;
  __syncthreads();
  if (thread >= kWarpSize || c >= p.channels) return;
  for (int n = 1; n < kMeanThreads / kWarpSize; ++n) sum += parts[n * kWarpSize + thread];
  buffers.means[b * p.channels + c] = sum / static_cast<float>(max(length, 1));
}

// out[n] = after(x's product with column n of the weight + bias). The block's threads see all of it
// afterwards.
template <typename After>
__device__ __forceinline__ void dense(const float* x, int64_t inputs, const SERes2NetLayer& layer,
                                      int64_t outputs, float* parts, float* out,
                                      const After& after) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  const int part = thread / kWarpSize % kGateParts;
  constexpr int kOutputs = kGateThreads / kGateParts;
  const float* weight = static_cast<const float*>(layer.weight);
  for (int64_t first = 0; first < outputs; first += kOutputs) {
    const int64_t n = first + thread / (kWarpSize * kGateParts) * kWarpSize + lane;
    float sum = 0;
    if (n < outputs) {
      SPKFAST_UNROLL_4
      for (int64_t k = part; k < inputs; k += kGateParts) {
        sum = fmaf(x[k], weight[k * outputs + n], sum);
      }
    }
    parts[thread] = sum;
    __syncthreads();
    if (part == 0 && n < outputs) {
      for (int i = 1; i < kGateParts; ++i) sum += parts[thread + i * kWarpSize];
      out[n] = after(sum + layer.vectors[n]);
    }
    __syncthreads();
  }
}

// A block makes the gates of a row.
__global__ void __launch_bounds__(kGateThreads)
    se_res2net_block_gates_kernel(const __grid_constant__ SERes2NetBlockParams p,
                                  const BlockBuffers buffers) {
  SPKFAST_DYNAMIC_SHARED(float, parts);
  const int64_t b = blockIdx.x;
  float* squeezed = buffers.squeezed + b * p.units;
  dense(buffers.means + b * p.channels, p.channels, p.squeeze, p.units, parts, squeezed,
        [](float value) { return value < 0 ? 0.0f : value; });
  dense(squeezed, p.units, p.excite, p.channels, parts, buffers.gates + b * p.channels,
        [](float value) { return 1.0f / (1.0f + expf(-value)); });
}

// y = excited * gate + what is added. A block takes kSumFrames frames of a row.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    se_res2net_block_sum_kernel(const __grid_constant__ SERes2NetBlockParams p,
                                const BlockBuffers buffers, const unsigned frame_tiles) {
  const int64_t b = blockIdx.x / frame_tiles;
  const int first = static_cast<int>(blockIdx.x % frame_tiles) * kSumFrames;
  const int length = clamped_length(p.padded, b, p.frames);
  const T* x = static_cast<const T*>(p.x) + b * p.row_stride;
  for (int64_t c = threadIdx.x; c < p.channels; c += kSumThreads) {
    const float gate = buffers.gates[b * p.channels + c];
    SPKFAST_UNROLL
    for (int i = 0; i < kSumFrames; ++i) {
      const int64_t t = first + i, at = (b * p.frames + t) * p.channels + c;
      if (t >= p.frames) break;
      float value = 0;
      if (t < length) {
        const float rest =
            buffers.shortcut ? buffers.shortcut[at] : to_float(x[t * p.frame_stride + c]);
        value = fmaf(buffers.excited[at], gate, rest);
      }
      static_cast<T*>(p.y)[at] = from_float<T>(value);
    }
  }
}

int64_t bytes_of(FloatType type) { return type == FloatType::kFloat ? 4 : 2; }

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

ChainPlan make_plan(const SERes2NetBlockParams& p, const Device& device) {
  const int64_t width = p.channels / (p.convolutions + 1);
  const int64_t halo = 2 * p.convolutions * (p.taps / 2 * p.dilation);
  // A piece shorter than its halo would make more for others to read than for itself.
  const int64_t least = max(halo, int64_t{ChainTile::kFrames});
  for (int blocks : {2, 1}) {  // that a processor runs at once: while one waits another computes
    const int64_t bytes =
        min(device.shared_per_block, device.shared_per_processor / blocks - kReservedBytes) -
        static_cast<int64_t>(sizeof(ChainTile));
    const int64_t held = bytes / (2 * width * bytes_of(p.multiplied));
    int64_t own = held >= p.frames ? p.frames : held - halo;
    if (own < p.frames && own < least) continue;
    // More pieces than memory asks for where processors would have nothing to do.
    const int64_t tiles =
        max(pieces(p.frames, own), min(device.processors / p.batch, p.frames / least));
    own = pieces(p.frames, tiles);
    return {static_cast<int>(own), static_cast<int>(min(p.frames, own + halo)),
            static_cast<unsigned>(pieces(p.frames, own)), true};
  }
  return {static_cast<int>(p.frames), static_cast<int>(p.frames), 1, false};
}

// Places what the kernels hand on; returns the floats that this takes.
size_t lay_out_buffers(const SERes2NetBlockParams& p, const ChainPlan& plan,
                       BlockBuffers& buffers) {
  size_t size = 0;
  const auto take = [&](int64_t floats) {
    float* start = p.workspace ? p.workspace + size : nullptr;
    size += static_cast<size_t>(pieces(floats, 4)) * 4;
    return start;
  };
  const int64_t width = p.channels / (p.convolutions + 1), values = p.batch * p.frames * p.channels;
  buffers.hidden = take(values);
  buffers.chained = take(p.batch * p.frames * (p.channels - width));
  buffers.excited = take(values);
  buffers.shortcut = p.shortcut.vectors ? take(values) : nullptr;
  buffers.means = take(p.batch * p.channels);
  buffers.squeezed = take(p.batch * p.units);
  buffers.gates = take(p.batch * p.channels);
  const int64_t bytes = p.batch * 2 * plan.held * width * bytes_of(p.multiplied);
  buffers.slices = plan.in_shared ? nullptr : take(pieces(bytes, sizeof(float)));
  return size;
}

bool is_empty(const SERes2NetBlockParams& p) {
  return p.batch == 0 || p.channels == 0 || p.frames == 0;
}

cudaError_t check_sizes(const SERes2NetBlockParams& p) {
  const int64_t most = 0x7fffffff;
  const bool fit = p.convolutions >= 0 && p.convolutions <= kMaxRes2Convolutions &&
                   p.channels % (p.convolutions + 1) == 0 && p.taps <= most && p.dilation <= most &&
                   p.frames <= most / 2 && p.channels <= most / 2 && p.frames <= most / p.batch &&
                   pieces(p.channels, kWarpSize) <= most / p.batch;
  return fit ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t launch_chain(const SERes2NetBlockParams& p, const BlockBuffers& buffers,
                         const ChainPlan& plan, cudaStream_t stream) {
  const auto kernel = p.multiplied == FloatType::kFloat ? se_res2net_block_chain_kernel<float>
                      : p.multiplied == FloatType::kHalf
                          ? se_res2net_block_chain_kernel<__half>
                          : se_res2net_block_chain_kernel<__nv_bfloat16>;
  const int64_t width = p.channels / (p.convolutions + 1);
  const int64_t slices = plan.in_shared ? 2 * plan.held * width * bytes_of(p.multiplied) : 0;
  const int64_t bytes = static_cast<int64_t>(sizeof(ChainTile)) + slices;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  SPKFAST_LAUNCH(kernel, static_cast<unsigned>(p.batch * plan.tiles), kChainThreads,
                 static_cast<size_t>(bytes), stream, p, buffers, plan);
  return cudaGetLastError();
}

cudaError_t launch_gates(const SERes2NetBlockParams& p, const BlockBuffers& buffers,
                         cudaStream_t stream) {
  const auto channel_tiles = static_cast<unsigned>(pieces(p.channels, kWarpSize));
  const auto frame_tiles = static_cast<unsigned>(pieces(p.frames, kSumFrames));
  const auto batch = static_cast<unsigned>(p.batch);
  SPKFAST_LAUNCH(se_res2net_block_means_kernel, batch * channel_tiles, kMeanThreads,
                 kMeanThreads * sizeof(float), stream, p, buffers, channel_tiles);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  SPKFAST_LAUNCH(se_res2net_block_gates_kernel, batch, kGateThreads, kGateThreads * sizeof(float),
                 stream, p, buffers);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const auto sum = p.type == FloatType::kFloat  ? se_res2net_block_sum_kernel<float>
                   : p.type == FloatType::kHalf ? se_res2net_block_sum_kernel<__half>
                                                : se_res2net_block_sum_kernel<__nv_bfloat16>;
  SPKFAST_LAUNCH(sum, batch * frame_tiles, kSumThreads, size_t{0}, stream, p, buffers, frame_tiles);
  return cudaGetLastError();
}

cudaError_t plan_block(const SERes2NetBlockParams& p, ChainPlan& plan) {
  Device device = {};
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = check_sizes(p);
  if (error == cudaSuccess) plan = make_plan(p, device);
  return error;
}

}  // namespace

cudaError_t se_res2net_block_workspace(const SERes2NetBlockParams& p, size_t& floats) {
  floats = 0;
  if (is_empty(p)) return cudaSuccess;
  ChainPlan plan;
  const cudaError_t error = plan_block(p, plan);
  if (error != cudaSuccess) return error;
  BlockBuffers buffers;
  floats = lay_out_buffers(p, plan, buffers);
  return cudaSuccess;
}

cudaError_t launch_se_res2net_block(const SERes2NetBlockParams& p, cudaStream_t stream) {
  if (is_empty(p)) return cudaSuccess;
  ChainPlan plan;
  cudaError_t error = plan_block(p, plan);
  if (error != cudaSuccess) return error;
  BlockBuffers buffers;
  lay_out_buffers(p, plan, buffers);

  const auto layer = [&](const SERes2NetLayer& weights, float* out, bool follows) {
    TdnnLayerParams made = {};
    made.weight = weights.weight;
    made.vectors = weights.vectors;
    made.lengths = p.padded;
    made.out = out;
    made.batch = p.batch;
    made.channels = p.channels;
    made.frames = p.frames;
    made.taps = 1;
    made.dilation = 1;
    made.num_inputs = 1;
    made.inputs[0] = {p.x, p.row_stride, p.frame_stride, p.inputs};
    made.type = p.type;
    made.multiplied = p.multiplied;
    made.out_type = FloatType::kFloat;
    made.relu = made.affine = follows;
    return made;
  };
  error = launch_tdnn_layer(layer(p.in, buffers.hidden, true), stream);
  if (error != cudaSuccess) return error;
  if (p.shortcut.vectors) {
    error = launch_tdnn_layer(layer(p.shortcut, buffers.shortcut, false), stream);
    if (error != cudaSuccess) return error;
  }
  if (p.convolutions > 0) {
    error = launch_chain(p, buffers, plan, stream);
    if (error != cudaSuccess) return error;
  }
  // The group that passes, and the others: read where they are.
  const int64_t width = p.channels / (p.convolutions + 1), made = p.channels - width;
  const float* passing = buffers.hidden + (p.first_passes ? 0 : made);
  const TdnnLayerInput passes = {passing, p.frames * p.channels, p.channels, width};
  const TdnnLayerInput chained = {buffers.chained, p.frames * made, made, made};
  TdnnLayerParams last = layer(p.out, buffers.excited, true);
  last.num_inputs = 2;
  last.inputs[0] = p.first_passes ? passes : chained;
  last.inputs[1] = p.first_passes ? chained : passes;
  last.type = FloatType::kFloat;
  error = launch_tdnn_layer(last, stream);
  return error == cudaSuccess ? launch_gates(p, buffers, stream) : error;
}

}  // namespace spkfast
