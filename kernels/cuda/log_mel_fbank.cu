// Log-mel filterbank features: one block per frame, with the FFT in shared memory.
#include "common/reduce.cuh"
#include "log_mel_fbank.cuh"

namespace spkfast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMeanWarps = 16;

// Frames of an utterance. A length past S would read out of bounds and is taken as S.
__device__ __forceinline__ int64_t count_frames(int64_t utterance, const LogMelFbankParams& p) {
  const int64_t samples = min(p.lengths[utterance], p.num_samples);
  return samples < p.frame_length ? 0 : (samples - p.frame_length) / p.frame_shift + 1;
}

__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
  return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

// One warp per block. Block i finds where filter i is nonzero and counts the frames of utterance i.
__global__ void log_mel_fbank_prepare_kernel(LogMelFbankParams p) {
  const int64_t i = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  if (i < p.num_mels) {
    const int bins = p.fft_size / 2 + 1;
    int first = bins, end = 0;
    for (int k = lane; k < bins; k += kWarpSize) {
      if (p.mel[i * bins + k] != 0) {
        first = min(first, k);
        end = k + 1;
      }
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      first = min(first, __shfl_xor_sync(kFullMask, first, distance));
      end = max(end, __shfl_xor_sync(kFullMask, end, distance));
    }
    if (lane == 0) {
      p.mel_ranges[2 * i] = min(first, end);
      p.mel_ranges[2 * i + 1] = end;
    }
  }
  if (i < p.batch && lane == 0) p.frame_lengths[i] = count_frames(i, p);
}

// One block per frame. The N real samples go through a complex FFT of half the size as even + i
// odd.
__global__ void __launch_bounds__(kThreads) log_mel_fbank_kernel(LogMelFbankParams p) {
  SPKFAST_DYNAMIC_SHARED(float2, shared);
  const int half = p.fft_size / 2;
  float2* spectrum = shared;                                 // [half]
  float2* twiddles = spectrum + half;                        // [half] exp(-2 pi i k / N)
  float* power = reinterpret_cast<float*>(twiddles + half);  // [half + 1]
  float* scratch = power + half + 1;                         // [kWarps]

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t utterance = blockIdx.x / p.num_frames;
  const int64_t frame = blockIdx.x % p.num_frames;
  float* out = p.features + static_cast<int64_t>(blockIdx.x) * p.num_mels;
  if (frame >= count_frames(utterance, p)) {
    for (int m = thread; m < p.num_mels; m += kThreads) out[m] = 0;
    return;
  }
  const float* samples = p.waveforms + utterance * p.num_samples + frame * p.frame_shift;

  float mean = 0;
  if (p.remove_dc) {
    float sum = 0;
    for (int n = thread; n < p.frame_length; n += kThreads) sum += samples[n] * p.sample_scale;
    mean = block_sum(sum, scratch) / static_cast<float>(p.frame_length);
  }
  auto windowed = [&](int n) {
    if (n >= p.frame_length) return 0.0f;
    const float current = samples[n] * p.sample_scale - mean;
    const float previous = samples[max(n - 1, 0)] * p.sample_scale - mean;
    return (current - p.preemphasis * previous) * p.window[n];
  };

  const int levels = __ffs(half) - 1;
  for (int n = thread; n < half; n += kThreads) {
    // sincospif needs no slow path for large arguments, unlike sincosf: no stack.
    float sine, cosine;
    sincospif(-static_cast<float>(n) / static_cast<float>(half), &sine, &cosine);
    twiddles[n] = make_float2(cosine, sine);
    const unsigned reversed = levels ? __brev(static_cast<unsigned>(n)) >> (32 - levels) : 0;
    spectrum[reversed] = make_float2(windowed(2 * n), windowed(2 * n + 1));
  }
  __syncthreads();

  for (int width = 1; width < half; width *= 2) {
    for (int n = thread; n < half / 2; n += kThreads) {
      const int offset = n & (width - 1);
      const int low = 2 * (n - offset) + offset;
      const float2 a = spectrum[low];
      const float2 b = multiply(spectrum[low + width], twiddles[offset * (half / width)]);
      spectrum[low] = make_float2(a.x + b.x, a.y + b.y);
      spectrum[low + width] = make_float2(a.x - b.x, a.y - b.y);
    }
    __syncthreads();
  }

  for (int k = thread; k <= half; k += kThreads) {
    const float2 a = spectrum[k & (half - 1)];
    const float2 b = spectrum[(half - k) & (half - 1)];
    const float2 even = make_float2(0.5f * (a.x + b.x), 0.5f * (a.y - b.y));
    const float2 odd = make_float2(0.5f * (a.y + b.y), 0.5f * (b.x - a.x));
    const float2 turned = multiply(odd, k < half ? twiddles[k] : make_float2(-1, 0));
    const float real = even.x + turned.x, imaginary = even.y + turned.y;
    power[k] = real * real + imaginary * imaginary;
  }
  __syncthreads();

  const int lane = thread % kWarpSize;
  for (int m = thread / kWarpSize; m < p.num_mels; m += kWarps) {
    const float* weights = p.mel + static_cast<int64_t>(m) * (half + 1);
    float energy = 0;
    for (int k = p.mel_ranges[2 * m] + lane; k < p.mel_ranges[2 * m + 1]; k += kWarpSize) {
      energy += weights[k] * power[k];
    }
    energy = warp_sum(energy);
    // Not fmaxf, which would turn NaN into the floor.
    if (lane == 0) out[m] = logf(energy < p.log_floor ? p.log_floor : energy);
  }
}

// One block per utterance and 32 mel bins: lanes go over bins, warps over frames.
__global__ void log_mel_fbank_mean_kernel(LogMelFbankParams p) {
  SPKFAST_DYNAMIC_SHARED(float, sums);  // [kMeanWarps][kWarpSize]
  const int64_t blocks = (p.num_mels + kWarpSize - 1) / kWarpSize;
  const int64_t utterance = blockIdx.x / blocks;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t m = (blockIdx.x % blocks) * kWarpSize + lane;
  const int64_t frames = count_frames(utterance, p);
  float* column = p.features + utterance * p.num_frames * p.num_mels + m;

  float sum = 0;
  if (m < p.num_mels) {
    for (int64_t t = warp; t < frames; t += kMeanWarps) sum += column[t * p.num_mels];
  }
  sums[warp * kWarpSize + lane] = sum;
  __syncthreads();
  if (m >= p.num_mels || frames == 0) return;
  float mean = 0;
  for (int w = 0; w < kMeanWarps; ++w) mean += sums[w * kWarpSize + lane];
  mean /= static_cast<float>(frames);
  for (int64_t t = warp; t < frames; t += kMeanWarps) column[t * p.num_mels] -= mean;
}

}  // namespace

cudaError_t launch_log_mel_fbank(const LogMelFbankParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const int64_t frames = p.batch * p.num_frames;
  const int64_t preparations = p.batch > p.num_mels ? p.batch : p.num_mels;
  const int64_t means = p.batch * ((p.num_mels + kWarpSize - 1) / kWarpSize);
  const bool power_of_two = p.fft_size >= 2 && (p.fft_size & (p.fft_size - 1)) == 0;
  if (!power_of_two || p.fft_size > kMaxLogMelFbankFftSize || p.fft_size < p.frame_length ||
      p.frame_length < 1 || p.frame_shift < 1 || p.num_mels < 1 || frames > kMaxBlocks ||
      preparations > kMaxBlocks || means > kMaxBlocks) {
    return cudaErrorInvalidValue;
  }
  if (p.batch == 0) return cudaSuccess;
  SPKFAST_LAUNCH(log_mel_fbank_prepare_kernel, static_cast<unsigned>(preparations), kWarpSize, 0,
                 stream, p);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || frames == 0) return error;

  const int half = p.fft_size / 2;
  const size_t shared_bytes = 2 * half * sizeof(float2) + (half + 1 + kWarps) * sizeof(float);
  SPKFAST_LAUNCH(log_mel_fbank_kernel, static_cast<unsigned>(frames), kThreads, shared_bytes,
                 stream, p);
  error = cudaGetLastError();
  if (error != cudaSuccess || !p.mean_norm) return error;
  SPKFAST_LAUNCH(log_mel_fbank_mean_kernel, static_cast<unsigned>(means), kMeanWarps * kWarpSize,
                 kMeanWarps * kWarpSize * sizeof(float), stream, p);
  return cudaGetLastError();
}

}  // namespace spkfast
