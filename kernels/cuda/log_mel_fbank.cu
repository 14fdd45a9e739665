// Acoustic features: a block takes tiles of frames through shared memory, from samples to features.
//
// The samples of a tile are read once; then each warp transforms frames in its registers (see
// Unrolled), the power spectra of the tile meet in shared memory with one column per frame, and
// each thread applies filters to frames of its own: no bank conflicts there, whatever the filters.
// What needs a whole utterance follows in a second kernel, from sums that the first one leaves.
#include <cmath>

#include "common/device.cuh"
#include "common/reduce.cuh"
#include "log_mel_fbank.cuh"
#include "log_mel_fbank_plan.cuh"
#include "log_mel_fbank_signal.cuh"
#include "log_mel_fbank_transform.cuh"

namespace spkfast {
namespace {

constexpr size_t kSharedBytes = 99 * 1024;  // What every GPU since sm_80 grants a block at least.
constexpr int kMaxWeights = 5120;
constexpr int kNormThreads = 512;
constexpr int kNormWarps = kNormThreads / kWarpSize;
constexpr int kMaxSegments = 32;
constexpr int kWaveformThreads = 1024;

// Window, roots of unity, and the filters without their zeros. Finding these takes each block one
// look at `mel`, but no launch before this one and nothing kept between launches.
template <typename Transform>
__device__ __forceinline__ void make_tables(const Plan& plan, float* shared) {
  constexpr int kThreads = Transform::kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int mels = plan.p.num_mels, bins = plan.bins;
  auto* bands = reinterpret_cast<Band*>(shared + plan.bands);
  for (int m = thread; m < mels; m += kThreads) bands[m] = {bins, 0, 0, 0};
  // The halves take the factors out of the split of even and odd samples.
  for (int n = thread; n < plan.p.frame_length; n += kThreads) {
    shared[plan.window + n] = 0.5f * plan.p.window[n];
  }
  Transform::make_tables(plan, shared);
  // Filters go in steps of four bins, past the last of which are weights of zero.
  for (int i = thread; i < 3 * plan.power_stride; i += kThreads) {
    shared[plan.power + bins * plan.power_stride + i] = 0;
  }
  __syncthreads();

  // A band may come out wider where one row ends and the next begins within four weights.
  const int total = mels * bins;
  auto visit = [&](int begin, int end) {  // the first and the last that is not zero
    const auto row_of = [&](int i) { return static_cast<int>(i * plan.bins_inverse >> 32); };
    const int first = row_of(begin), last = row_of(end);
    for (int row = first; row <= last; ++row) {
      atomicMin(&bands[row].first, row == first ? begin - row * bins : 0);
      atomicMax(&bands[row].end, row == last ? end - row * bins + 1 : bins);
    }
  };
  const bool aligned = reinterpret_cast<uintptr_t>(plan.p.mel) % sizeof(float4) == 0;
  const int fours = aligned ? total / 4 : 0;
  constexpr int kBatch = 5;  // loads under way at once
  for (int base = 0; base < fours; base += kBatch * kThreads) {
    float4 four[kBatch];
    SPKFAST_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const int i = min(base + n * kThreads + thread, fours - 1);
      four[n] = reinterpret_cast<const float4*>(plan.p.mel)[i];
    }
    SPKFAST_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const int i = min(base + n * kThreads + thread, fours - 1);
      const int found = (four[n].x != 0 ? 1 : 0) | (four[n].y != 0 ? 2 : 0) |
                        (four[n].z != 0 ? 4 : 0) | (four[n].w != 0 ? 8 : 0);
      if (found) visit(4 * i + __ffs(found) - 1, 4 * i + 31 - __clz(found));
    }
  }
  for (int i = 4 * fours + thread; i < total; i += kThreads) {
    if (plan.p.mel[i] != 0) visit(i, i);
  }
  __syncthreads();

  if (warp == 0) {
    int base = 0;
    for (int begin = 0; begin < mels; begin += kWarpSize) {
      const int m = begin + lane;
      const int width = m < mels ? round_up(max(bands[m].end - bands[m].first, 0), 4) : 0;
      int sum = width;
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int below = __shfl_up_sync(kFullMask, sum, distance);
        if (lane >= distance) sum += below;
      }
      if (m < mels) bands[m].offset = base + sum - width;
      base += __shfl_sync(kFullMask, sum, kWarpSize - 1);
    }
    if (lane == 0) bands[mels].offset = base;
  }
  __syncthreads();

  if (bands[mels].offset > plan.weight_capacity) return;  // They are read where they are.
  for (int m = warp; m < mels; m += kThreads / kWarpSize) {
    const Band band = bands[m];
    for (int k = band.first + lane; k < round_up(band.end - band.first, 4) + band.first;
         k += kWarpSize) {
      shared[plan.weights + band.offset + k - band.first] =
          k < band.end ? plan.p.mel[m * bins + k] : 0.0f;
    }
  }
}

// To about a unit in the last place, in half the instructions of logf.
__device__ __forceinline__ float natural_log(float x) {
  if (!(x >= 0x1p-126f && x < INFINITY)) return logf(x);
  const int bits = __float_as_int(x);
  const int exponent = (bits - 0x3f3504f3) & ~0x7fffff;  // of x over a mantissa around 1, in place
  const float power = static_cast<float>(exponent >> 23);
  const float rest = approximate_log2(__int_as_float(bits - exponent));
  // ln 2 in two parts, of which the first is exact in products.
  return fmaf(power, 0x1.62e4p-1f, fmaf(rest, 0x1.62e43p-1f, power * 0x1.7f7d1cp-20f));
}

__device__ __forceinline__ float compress(const Plan& plan, float x) {
  x = at_most(at_least(x, plan.energy_low), plan.energy_high);
  return plan.p.log_scale == 0 ? x : natural_log(x + plan.p.log_offset) * plan.p.log_scale;
}

// What filter m gives for the frames of a thread, from `frame` on.
template <typename Transform>
__device__ __forceinline__ void apply_filter(const Plan& plan, const float* shared, int m,
                                             bool packed, int frame,
                                             float (&sums)[Transform::kPair]) {
  const Band band = reinterpret_cast<const Band*>(shared + plan.bands)[m];
  const int stride = Transform::power_stride(plan);
  const float* power = shared + plan.power + band.first * stride + frame;
  SPKFAST_UNROLL
  for (float& sum : sums) sum = 0;
  auto accumulate = [&](float weight, const float* x) {
    if constexpr (Transform::kPair == 2) {
      const float2 pair = *reinterpret_cast<const float2*>(x);
      sums[0] += weight * pair.x;
      sums[1] += weight * pair.y;
    } else {
      sums[0] += weight * *x;
    }
  };
  if (packed) {
    const auto* weights = reinterpret_cast<const float4*>(shared + plan.weights + band.offset);
    SPKFAST_NO_UNROLL
    for (int k = band.first; k < band.end; k += 4, ++weights, power += 4 * stride) {
      const float4 four = *weights;
      accumulate(four.x, power);
      accumulate(four.y, power + stride);
      accumulate(four.z, power + 2 * stride);
      accumulate(four.w, power + 3 * stride);
    }
  } else {
    const float* weights = plan.p.mel + m * plan.bins;
    SPKFAST_NO_UNROLL
    for (int k = band.first; k < band.end; ++k, power += stride) accumulate(weights[k], power);
  }
}

// Log energy of each frame of the tile before pre-emphasis and window, one warp per frame.
__device__ __forceinline__ void raw_energies(const Plan& plan, float* shared, int frames) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize, length = plan.p.frame_length;
  for (int frame = static_cast<int>(threadIdx.x) / kWarpSize; frame < frames; frame += warps) {
    const float* samples = shared + plan.tile + frame * plan.p.frame_shift;
    float mean = 0;
    if (plan.p.remove_dc) {
      float sum = 0;
      for (int n = lane; n < length; n += kWarpSize) sum += samples[n];
      mean = warp_sum(sum) / static_cast<float>(length);
    }
    float energy = 0;
    for (int n = lane; n < length; n += kWarpSize) {
      energy += (samples[n] - mean) * (samples[n] - mean);
    }
    energy = warp_sum(energy);
    if (lane == 0) shared[plan.energies + frame] = energy;
  }
}

__device__ __forceinline__ bool is_masked(const LogMelFbankParams& p, int64_t utterance,
                                          int64_t frame, int column) {
  for (int64_t n = 0; n < p.num_masks; ++n) {
    const int64_t* mask = p.masks + (utterance * p.num_masks + n) * 4;
    if (frame >= mask[0] && frame < mask[1] && column >= mask[2] && column < mask[3]) return true;
  }
  return false;
}

// Per column of the tile, over each `stat_frames` frames: what the second kernel needs. Few enough
// frames that a plain sum is as good as any.
__device__ __forceinline__ void write_stats(const Plan& plan, const float* features,
                                            int64_t utterance, int first, int frames) {
  const int threads = static_cast<int>(blockDim.x), columns = plan.columns;
  const int rows = (frames + plan.stat_frames - 1) / plan.stat_frames;
  for (int row = 0; row < rows; ++row) {
    const int begin = row * plan.stat_frames, end = min(begin + plan.stat_frames, frames);
    const int64_t index = utterance * plan.stat_rows + first / plan.stat_frames + row;
    float* out = plan.stats + index * plan.stat_planes * columns;
    for (int column = static_cast<int>(threadIdx.x); column < columns; column += threads) {
      const float* x = features + column;
      if (plan.limits) {
        float highest = x[begin * plan.column_stride];
        for (int f = begin + 1; f < end; ++f) highest = larger(highest, x[f * plan.column_stride]);
        out[column] = highest;
        continue;
      }
      float sum = 0;
      for (int f = begin; f < end; ++f) sum += x[f * plan.column_stride];
      out[column] = sum;
      if (plan.stat_planes == 1) continue;
      const float mean = sum / static_cast<float>(end - begin);
      float squares = 0;
      for (int f = begin; f < end; ++f) {
        const float centred = x[f * plan.column_stride] - mean;
        squares += centred * centred;
      }
      out[columns + column] = squares;
    }
  }
}

template <typename Transform>
__global__ void __launch_bounds__(Transform::kThreads, Transform::kBlocks)
    log_mel_fbank_kernel(const __grid_constant__ Plan plan) {
  SPKFAST_DYNAMIC_SHARED(float, shared);
  constexpr int kThreads = Transform::kThreads;
  const LogMelFbankParams& p = plan.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int columns = plan.columns;
  // Over samples and buffers, once the spectra are there.
  float* log_mel = shared + plan.tile;  // [tile_frames][mel_stride]
  float* features = p.cosines ? log_mel + plan.tile_frames * plan.mel_stride : log_mel;
  const int before = p.energy && !p.energy_last ? 1 : 0;  // columns of energy to the left
  make_tables<Transform>(plan, shared);
  const Band* bands = reinterpret_cast<const Band*>(shared + plan.bands);
  const bool packed = bands[p.num_mels].offset <= plan.weight_capacity;

  const unsigned tiles = static_cast<unsigned>(plan.tiles);
  for (unsigned t = blockIdx.x; t < static_cast<unsigned>(p.batch) * tiles; t += gridDim.x) {
    const int64_t utterance = t / tiles;
    const int first = static_cast<int>(t % tiles) * plan.tile_frames;
    const int length = clamped_length(p, utterance), total = count_frames(p, length);
    const int frames = min(max(total - first, 0), plan.tile_frames);
    if (first == 0 && thread == 0) p.frame_lengths[utterance] = total;
    __syncthreads();  // The features of the tile before have left, and the tables are there.

    if (frames > 0) {
      const Signal signal(plan, utterance, length);
      const int start = p.offset + first * p.frame_shift;
      // Twice where the energy is that of the samples as they are.
      SPKFAST_NO_UNROLL
      for (bool raw = p.energy == 1;; raw = false) {
        fill(plan, signal, start, frames, raw ? plan.signal_preemphasis : p.preemphasis, shared);
        __syncthreads();
        if (!raw) break;
        raw_energies(plan, shared, frames);
        __syncthreads();
      }
      Transform::transform(plan, shared, frames);
      __syncthreads();

      // From here on threads go over frames, then over bins or columns.
      const int frame = thread & (plan.tile_frames - 1), slot = thread >> plan.tile_bits;
      const int slots = kThreads >> plan.tile_bits;
      if (plan.shapes_spectrum) {
        for (int k = slot; k < plan.bins && frame < frames; k += slots) {
          float& power = shared[plan.power + k * Transform::power_stride(plan) + frame];
          const float x = p.magnitude ? sqrtf(power) : power;
          power = at_most(at_least(x, p.spectrum_low), p.spectrum_high);
        }
        __syncthreads();
      }
      const int pair = Transform::kPair * (thread & (plan.tile_frames / Transform::kPair - 1));
      const int row_stride = p.cosines ? plan.mel_stride : plan.column_stride;
      float* out = p.cosines ? log_mel : features + before;
      const int pair_slots = slots * Transform::kPair;
      for (int m = thread * Transform::kPair >> plan.tile_bits; m < p.num_mels; m += pair_slots) {
        if (pair >= frames) break;
        float sums[Transform::kPair];
        apply_filter<Transform>(plan, shared, m, packed, pair, sums);
        SPKFAST_UNROLL
        for (int i = 0; i < Transform::kPair; ++i) {
          out[(pair + i) * row_stride + m] = compress(plan, sums[i]);
        }
      }
      if (p.energy && thread < frames) {
        features[thread * plan.column_stride + (p.energy_last ? columns - 1 : 0)] =
            logf(at_least(shared[plan.energies + thread], p.energy_floor));
      }
      __syncthreads();
      if (p.cosines) {
        for (int c = slot; c < p.num_cosines && frame < frames; c += slots) {
          const float* cosines = p.cosines + c * p.num_mels;
          const float* x = log_mel + frame * plan.mel_stride;
          float sum = 0;
          for (int m = 0; m < p.num_mels; ++m) sum += cosines[m] * x[m];
          features[frame * plan.column_stride + before + c] = sum;
        }
        __syncthreads();
      }
      if (plan.stat_planes) write_stats(plan, features, utterance, first, frames);
    }

    const int rows = static_cast<int>(min(p.num_frames - first, int64_t{plan.tile_frames}));
    const int64_t index = (utterance * p.num_frames + first) * columns;
    const bool plain = plan.normalizes || (p.type == FloatType::kFloat && p.num_masks == 0);
    for (int d = lane; plain && d < columns; d += kWarpSize) {
      SPKFAST_UNROLL_4
      for (int f = warp; f < frames; f += kThreads / kWarpSize) {
        plan.raw[index + f * columns + d] = features[f * plan.column_stride + d];
      }
    }
    for (int f = (plain ? frames : 0) + warp; f < rows; f += kThreads / kWarpSize) {
      for (int d = lane; d < columns; d += kWarpSize) {
        const bool zero = f >= frames || is_masked(p, utterance, first + f, d);
        store_as(p.type, p.features, index + f * columns + d,
                 zero ? 0.0f : features[f * plan.column_stride + d]);
      }
    }
  }
}

// Floor, mean and variance over the frames of an utterance. A block takes 32 columns, one per lane,
// and a segment of the frames; every segment finds the same statistics for itself.
__global__ void __launch_bounds__(kNormThreads, 2)
    log_mel_fbank_norm_kernel(const __grid_constant__ Plan plan) {
  SPKFAST_DYNAMIC_SHARED(float, scratch);  // [kNormWarps][kWarpSize]
  const LogMelFbankParams& p = plan.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const unsigned groups = static_cast<unsigned>(plan.groups);
  const unsigned segments = static_cast<unsigned>(plan.segments);
  const int64_t utterance = blockIdx.x / (groups * segments);
  const int segment = static_cast<int>(blockIdx.x / groups % segments);
  const int column = static_cast<int>(blockIdx.x % groups) * kWarpSize + lane;
  const int columns = plan.columns;
  const bool inside = column < columns;
  const int frames = count_frames(p, clamped_length(p, utterance));
  if (frames == 0) return;
  const float count = static_cast<float>(frames);
  const int rows = (frames + plan.stat_frames - 1) / plan.stat_frames;
  const float* stats = plan.stats + utterance * plan.stat_rows * plan.stat_planes * columns;
  const float* raw = plan.raw + utterance * p.num_frames * columns + column;

  // Over the warps, for the column of this lane.
  auto total = [&](float value) {
    scratch[thread] = value;
    __syncthreads();
    float sum = 0;
    SPKFAST_UNROLL
    for (int w = 0; w < kNormWarps; ++w) sum += scratch[w * kWarpSize + lane];
    __syncthreads();
    return sum;
  };
  float floor = -INFINITY;
  if (plan.limits) {
    float highest = -INFINITY;
    for (int64_t i = thread; i < int64_t{rows} * columns; i += kNormThreads) {
      highest = larger(highest, stats[i]);
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      highest = larger(highest, __shfl_xor_sync(kFullMask, highest, distance));
    }
    if (lane == 0) scratch[warp] = highest;
    __syncthreads();
    for (int w = 0; w < kNormWarps; ++w) highest = larger(highest, scratch[w]);
    floor = highest - p.top_db;
    __syncthreads();
  }
  auto feature = [&](int64_t t) {
    const float x = raw[t * columns];
    return plan.limits ? larger(x, floor) : x;
  };

  float mean = 0, divisor = 1;
  if (p.mean_norm || p.std_norm) {
    float sum = 0;
    if (inside && plan.limits) {
      SPKFAST_UNROLL_4
      for (int t = warp; t < frames; t += kNormWarps) sum += feature(t);
    } else if (inside) {
      SPKFAST_UNROLL_4
      for (int r = warp; r < rows; r += kNormWarps) {
        sum += stats[static_cast<int64_t>(r) * plan.stat_planes * columns + column];
      }
    }
    mean = total(sum) / count;
  }
  if (p.std_norm) {
    float squares = 0;
    if (inside && plan.limits) {
      SPKFAST_UNROLL_4
      for (int t = warp; t < frames; t += kNormWarps) {
        const float centred = feature(t) - mean;
        squares += centred * centred;
      }
    } else if (inside) {
      for (int r = warp; r < rows; r += kNormWarps) {  // Chan et al., 1979
        const float* row = stats + static_cast<int64_t>(r) * 2 * columns + column;
        const float part = static_cast<float>(min(plan.stat_frames, frames - r * plan.stat_frames));
        const float shift = row[0] / part - mean;
        squares += row[columns] + part * shift * shift;
      }
    }
    const int freedom = max(frames - (p.std_unbiased ? 1 : 0), 1);
    const float variance = total(squares) / static_cast<float>(freedom) + p.var_eps;
    divisor = sqrtf(at_least(variance, 1e-20f)) + p.std_eps;
  }
  if (!inside) return;
  const float shift = p.mean_norm ? mean : 0.0f;
  const int size = (frames + plan.segments - 1) / plan.segments;
  const int end = min(frames, (segment + 1) * size);
  const int64_t base = utterance * p.num_frames * columns + column;
  SPKFAST_UNROLL_4
  for (int64_t t = segment * size + warp; t < end; t += kNormWarps) {
    float x = feature(t) - shift;
    if (p.std_norm) x /= divisor;
    if (is_masked(p, utterance, t, column)) x = 0;
    store_as(p.type, p.features, base + t * columns, x);
  }
}

// One block per utterance: the factor and the offset that normalise and scale its samples.
__global__ void __launch_bounds__(kWaveformThreads, 1)
    log_mel_fbank_waveform_kernel(const __grid_constant__ Plan plan) {
  SPKFAST_DYNAMIC_SHARED(float, scratch);  // [kWaveformThreads / kWarpSize]
  const LogMelFbankParams& p = plan.p;
  const int64_t utterance = blockIdx.x;
  const int length = clamped_length(p, utterance);
  const float count = static_cast<float>(max(length, 1));
  auto sample = [&](int n) {
    const int64_t index = utterance * p.num_samples + n;
    return p.is_int16 ? static_cast<const int16_t*>(p.waveforms)[index] * 0x1p-15f
                      : static_cast<const float*>(p.waveforms)[index];
  };
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  SPKFAST_UNROLL_4
  for (int n = thread; n < length; n += kWaveformThreads) sum += sample(n);
  const float mean = block_sum(sum, scratch) / count;
  float squares = 0;
  SPKFAST_UNROLL_4
  for (int n = thread; n < length; n += kWaveformThreads) {
    squares += (sample(n) - mean) * (sample(n) - mean);
  }
  const float variance = block_sum(squares, scratch) / count;
  const float deviation =
      p.waveform_norm == 1 ? sqrtf(at_least(variance, 1e-20f)) + 1e-8f : sqrtf(variance + 1e-4f);
  const float gain = p.sample_scale / deviation;
  if (thread == 0) plan.waveform_stats[utterance] = make_float2(gain, -mean * gain);
}

// Lays out shared memory for `frames` per tile.
void lay_out(Plan& plan, int frames, int buffer_floats, int order_floats, int power_stride) {
  const LogMelFbankParams& p = plan.p;
  plan.tile_frames = frames;
  plan.tile_bits = 0;
  while (1 << plan.tile_bits < frames) ++plan.tile_bits;
  plan.power_stride = power_stride;
  int size = 0;
  const auto take = [&](int floats) {
    const int start = size;
    size += round_up(floats, 4);
    return start;
  };
  plan.window = take(p.frame_length);
  plan.twiddles = take(2 * plan.half);
  plan.split = take(2 * (plan.half / 2 + 1));
  plan.order = take(order_floats);
  plan.bands = take(static_cast<int>(sizeof(Band) / sizeof(float)) * (p.num_mels + 1));
  plan.weights = take(plan.weight_capacity);
  plan.edges = take(2 * frames);
  plan.energies = take(frames);
  plan.power = take((plan.bins + 3) * power_stride);
  plan.tile = take((frames - 1) * p.frame_shift + p.frame_length);
  plan.buffers = take(buffer_floats);
  const int features = frames * ((p.cosines ? plan.mel_stride : 0) + plan.column_stride);
  plan.size = size > plan.tile + features ? size : plan.tile + features;
}

size_t shared_bytes(const Plan& plan) { return plan.size * sizeof(float); }

// The transforms that are compiled for their sizes.
using Points512 = Unrolled<16, 16, 400, 256>;
using Points400 = Unrolled<10, 20, 400, 192>;
using Points256 = Unrolled<8, 16, 200, 256>;

template <typename Transform>
bool lay_out_unrolled(Plan& plan, const Device& device) {
  const LogMelFbankParams& p = plan.p;
  // Pairs of samples are read as one.
  if (p.fft_size != Transform::kSize || p.frame_length != Transform::kWindow || p.frame_shift % 2) {
    return false;
  }
  // A short input takes less time in smaller tiles, as long as each has a processor to itself.
  const int64_t small =
      p.batch * ((p.num_frames + Transform::kSmallTile - 1) / Transform::kSmallTile);
  const int frames = small <= device.processors ? Transform::kSmallTile : Transform::kTile;
  const int buffers = Transform::kThreads / kWarpSize * Transform::kBufferFloats;
  lay_out(plan, frames, buffers, 0, Transform::kPowerStride);
  plan.stat_frames = Transform::kSmallTile;
  return shared_bytes(plan) <= static_cast<size_t>(device.shared_per_block);
}

enum class Kind { kPoints512, kPoints400, kPoints256, kGeneral, kNone };

// Everything but pointers into the workspace.
Kind make_plan(const LogMelFbankParams& p, const Device& device, Plan& plan) {
  plan = {};
  plan.p = p;
  const int64_t most = 0x7fffffff;
  if (!log_mel_fbank_takes(p.fft_size, p.frame_shift, p.num_mels, p.cosines ? p.num_cosines : 0) ||
      p.frame_length < 1 || p.frame_length > p.fft_size || p.num_samples > kMaxLogMelFbankSamples ||
      p.num_frames > most / 2) {
    return Kind::kNone;
  }
  plan.half = p.fft_size / 2;
  plan.bins = plan.half + 1;
  plan.bins_inverse = (1ull << 32) / plan.bins + 1;
  plan.columns = (p.cosines ? p.num_cosines : p.num_mels) + (p.energy ? 1 : 0);
  plan.mel_stride = p.num_mels | 1;
  plan.column_stride = plan.columns | 1;
  const int weights = 3 * p.num_mels + 2 * plan.bins;  // Enough for triangles, rounded up to fours.
  plan.weight_capacity = weights < kMaxWeights ? weights : kMaxWeights;
  plan.shapes_spectrum = p.magnitude || p.spectrum_low > 0 || p.spectrum_high < INFINITY;
  plan.limits = p.top_db < INFINITY;
  plan.normalizes = plan.limits || p.mean_norm || p.std_norm;
  plan.stat_planes = plan.limits || !p.std_norm ? plan.normalizes : 2;
  plan.frame_preemphasis = p.preemphasis_mode == 0 ? p.preemphasis : 0;
  plan.signal_preemphasis = p.preemphasis_mode == 0 ? 0 : p.preemphasis;
  const bool floors = p.log_scale != 0;
  plan.energy_low = floors && p.log_floor > p.spectrum_low ? p.log_floor : p.spectrum_low;
  plan.energy_high = floors && p.log_floor > p.spectrum_high ? p.log_floor : p.spectrum_high;

  Kind kind = Kind::kNone;
  if (lay_out_unrolled<Points512>(plan, device)) {
    kind = Kind::kPoints512;
  } else if (lay_out_unrolled<Points400>(plan, device)) {
    kind = Kind::kPoints400;
  } else if (lay_out_unrolled<Points256>(plan, device)) {
    kind = Kind::kPoints256;
  } else {
    int passes = 0, rest = plan.half;
    for (int radix : {8, 4, 2, 3, 5}) {
      for (; rest % radix == 0; rest /= radix, ++passes) {
        plan.digits |= static_cast<unsigned long long>(radix) << (4 * passes);
      }
    }
    for (int frames = General::kTile; frames > 0 && kind == Kind::kNone; frames /= 2) {
      lay_out(plan, frames, 2 * frames * plan.half, plan.half / 2 + 1, frames + 1);
      plan.stat_frames = frames;
      if (shared_bytes(plan) <= kSharedBytes) kind = Kind::kGeneral;
    }
    if (kind == Kind::kNone) return kind;
  }
  const int64_t tiles = (p.num_frames + plan.tile_frames - 1) / plan.tile_frames;
  plan.tiles = tiles > 0 ? static_cast<int>(tiles) : 1;  // One that counts frames at least.
  plan.stat_rows = static_cast<int>((p.num_frames + plan.stat_frames - 1) / plan.stat_frames);
  plan.groups = (plan.columns + kWarpSize - 1) / kWarpSize;
  // Enough blocks to fill the machine; but the sums behind a floor are taken by one.
  const int64_t wanted =
      8 * device.processors / (p.batch * plan.groups > 0 ? p.batch * plan.groups : 1);
  plan.segments = static_cast<int>(wanted < 1 ? 1 : wanted > kMaxSegments ? kMaxSegments : wanted);
  if (plan.segments > plan.stat_rows) plan.segments = plan.stat_rows > 0 ? plan.stat_rows : 1;
  if (plan.limits && (p.mean_norm || p.std_norm)) plan.segments = 1;
  if (p.batch * plan.tiles > most || p.batch * plan.groups * plan.segments > most) {
    return Kind::kNone;
  }
  return kind;
}

// Places what the kernels hand on; returns the floats that this takes.
size_t lay_out_workspace(Plan& plan) {
  const LogMelFbankParams& p = plan.p;
  size_t size = 0;
  const auto take = [&](int64_t floats) {
    float* start = p.workspace ? p.workspace + size : nullptr;
    size += (static_cast<size_t>(floats) + 3) / 4 * 4;
    return start;
  };
  if (p.waveform_norm) plan.waveform_stats = reinterpret_cast<float2*>(take(2 * p.batch));
  plan.stats = take(p.batch * plan.stat_rows * plan.stat_planes * plan.columns);
  plan.raw = static_cast<float*>(p.features);
  if (plan.normalizes && p.type != FloatType::kFloat) {
    plan.raw = take(p.batch * p.num_frames * plan.columns);
  }
  return size;
}

template <typename Transform>
cudaError_t launch_main(const Plan& plan, const Device& device, cudaStream_t stream) {
  const size_t bytes = shared_bytes(plan);
  const auto kernel = log_mel_fbank_kernel<Transform>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  // As many blocks as run at once; each goes on to further tiles with the tables it has.
  const int64_t fitting =
      device.shared_per_processor / static_cast<int64_t>(bytes + kReservedBytes);
  const int64_t resident = fitting < 1                    ? 1
                           : fitting < Transform::kBlocks ? fitting
                                                          : Transform::kBlocks;
  const int64_t tiles = plan.p.batch * plan.tiles, blocks = device.processors * resident;
  SPKFAST_LAUNCH(kernel, static_cast<unsigned>(tiles < blocks ? tiles : blocks),
                 Transform::kThreads, bytes, stream, plan);
  return cudaGetLastError();
}

}  // namespace

cudaError_t log_mel_fbank_workspace(const LogMelFbankParams& p, size_t& floats) {
  Device device = {};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Plan plan;
  if (make_plan(p, device, plan) == Kind::kNone) return cudaErrorInvalidValue;
  floats = lay_out_workspace(plan);
  return cudaSuccess;
}

cudaError_t log_mel_fbank_budget(const LogMelFbankParams& p, LogMelFbankBudget& budget) {
  Device device = {};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Plan plan;
  const Kind kind = make_plan(p, device, plan);
  budget = {shared_bytes(plan), plan.tile_frames, kind == Kind::kGeneral};
  return kind == Kind::kNone ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t launch_log_mel_fbank(const LogMelFbankParams& p, cudaStream_t stream) {
  Device device = {};
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  Plan plan;
  const Kind kind = make_plan(p, device, plan);
  if (kind == Kind::kNone) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  lay_out_workspace(plan);

  if (p.waveform_norm && p.num_frames > 0) {
    SPKFAST_LAUNCH(log_mel_fbank_waveform_kernel, static_cast<unsigned>(p.batch), kWaveformThreads,
                   kWaveformThreads / kWarpSize * sizeof(float), stream, plan);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (kind == Kind::kPoints512) {
    error = launch_main<Points512>(plan, device, stream);
  } else if (kind == Kind::kPoints400) {
    error = launch_main<Points400>(plan, device, stream);
  } else if (kind == Kind::kPoints256) {
    error = launch_main<Points256>(plan, device, stream);
  } else {
    error = launch_main<General>(plan, device, stream);
  }
  if (error != cudaSuccess || !plan.normalizes || p.num_frames == 0) return error;
  SPKFAST_LAUNCH(log_mel_fbank_norm_kernel,
                 static_cast<unsigned>(p.batch * plan.groups * plan.segments), kNormThreads,
                 kNormThreads * sizeof(float), stream, plan);
  return cudaGetLastError();
}

}  // namespace spkfast
