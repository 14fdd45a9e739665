// A convolution over time with what follows it, for GPUs where no tensor core is asked for: a block
// takes 64 frames of a row to 64 channels.
#include <cmath>

#include "common/lengths.cuh"
#include "common/product_tile.cuh"
#include "tdnn_layer.cuh"

namespace spkfast {
namespace {

constexpr int kLayerThreads = 128;
using LayerTile = ProductTile<kLayerThreads>;

template <typename T>
__device__ __forceinline__ void store_frames(const TdnnLayerParams& p, int64_t b, int first,
                                             int channel, int width, const ProductSums& sums) {
  T* out = static_cast<T*>(p.out) + b * p.frames * p.channels;
  SPKFAST_UNROLL
  for (int t = 0; t < kOwnFrames; ++t) {
    const int64_t frame = first + own_frame() + t;
    if (frame >= p.frames) return;
    store_row(out + frame * p.channels, channel + own_channel(), static_cast<int>(p.channels),
              width, sums[t]);
  }
}

template <typename O>
__global__ void __launch_bounds__(kLayerThreads, 6)
    tdnn_layer_kernel(const __grid_constant__ TdnnLayerParams p, const unsigned frame_tiles,
                      const unsigned channel_tiles, const int width) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  auto& tile = *reinterpret_cast<LayerTile*>(shared);
  // Blocks that run side by side share frames.
  const unsigned piece = blockIdx.x / channel_tiles;
  const int64_t b = piece / frame_tiles;
  const int first = static_cast<int>(piece % frame_tiles) * LayerTile::kFrames;
  const int channel = static_cast<int>(blockIdx.x % channel_tiles) * kTileChannels;
  const int channels = static_cast<int>(p.channels);
  const int length = clamped_length(p.lengths, b, p.frames);

  ProductSums sums = {};
  if (first < length) {
    const O* weight = static_cast<const O*>(p.weight);
    SPKFAST_NO_UNROLL
    for (int i = 0; i < p.num_inputs; ++i) {
      const TdnnLayerInput& in = p.inputs[i];
      const int inputs = static_cast<int>(in.channels);
      const auto stage = [&](int depth) {
        const auto from = [&](auto* values) {
          stage_frames<O>(tile, values + b * in.row_stride, in.frame_stride, depth, inputs);
        };
        if (p.type == FloatType::kFloat) {
          from(static_cast<const float*>(in.values));
        } else if (p.type == FloatType::kHalf) {
          from(static_cast<const __half*>(in.values));
        } else {
          from(static_cast<const __nv_bfloat16*>(in.values));
        }
      };
      SPKFAST_NO_UNROLL
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        find_sources(tile, first, length, (tap - p.taps / 2) * p.dilation, length, p.reflect);
        multiply(tile, inputs, weight, channels, channel, stage, sums);
        weight += in.channels * p.channels;
      }
    }
    const float* offset = p.offset ? p.offset + b * p.channels : nullptr;
    finish({p.vectors, offset, p.relu, p.affine, p.tanh}, channels, channel, sums);
    SPKFAST_UNROLL
    for (int t = 0; t < kOwnFrames; ++t) {
      SPKFAST_UNROLL
      for (int n = 0; n < kOwnChannels; ++n) {
        if (first + own_frame() + t >= length) sums[t][n] = 0;
      }
    }
  }
  if (p.out_type == FloatType::kFloat) {
    store_frames<float>(p, b, first, channel, width, sums);
  } else if (p.out_type == FloatType::kHalf) {
    store_frames<__half>(p, b, first, channel, width, sums);
  } else {
    store_frames<__nv_bfloat16>(p, b, first, channel, width, sums);
  }
}

}  // namespace

cudaError_t launch_tdnn_layer(const TdnnLayerParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.channels == 0 || p.frames == 0) return cudaSuccess;
  const int64_t most = 0x7fffffff;
  const int64_t frame_tiles = (p.frames + LayerTile::kFrames - 1) / LayerTile::kFrames;
  const int64_t channel_tiles = (p.channels + kTileChannels - 1) / kTileChannels;
  for (int i = 0; i < p.num_inputs && i < kMaxTdnnInputs; ++i) {
    if (p.inputs[i].channels > most / 2) return cudaErrorInvalidValue;
  }
  if (p.batch > most || p.frames > most / 2 || p.channels > most / 2 || p.taps > most ||
      p.dilation > most || p.num_inputs > kMaxTdnnInputs ||
      channel_tiles > most / p.batch / frame_tiles) {
    return cudaErrorInvalidValue;
  }
  const int width = pack_width(p.out, p.frames * p.channels, p.channels, p.channels,
                               p.out_type == FloatType::kFloat ? sizeof(float) : sizeof(__half));
  const auto kernel = p.multiplied == FloatType::kFloat  ? tdnn_layer_kernel<float>
                      : p.multiplied == FloatType::kHalf ? tdnn_layer_kernel<__half>
                                                         : tdnn_layer_kernel<__nv_bfloat16>;
  const auto rows = static_cast<unsigned>(frame_tiles);
  const auto columns = static_cast<unsigned>(channel_tiles);
  SPKFAST_LAUNCH(kernel, static_cast<unsigned>(p.batch * frame_tiles * channel_tiles),
                 kLayerThreads, sizeof(LayerTile), stream, p, rows, columns, width);
  return cudaGetLastError();
}

}  // namespace spkfast
