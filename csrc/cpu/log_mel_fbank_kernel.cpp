// Four frames at a time, sample-major, one in each lane of a vector: no shuffles, and a frame's
// numbers do not depend on its neighbours.
#include "log_mel_fbank_kernel.h"

#include <algorithm>
#include <cmath>

namespace spkfast::cpu {
namespace {

constexpr int64_t W = LogMelFbank::kLanes;
using Doubles [[gnu::vector_size(W * sizeof(double))]] = double;

int64_t count_frames(int64_t samples, int64_t frame_length, int64_t frame_shift) {
  return samples < frame_length ? 0 : (samples - frame_length) / frame_shift + 1;
}

}  // namespace

LogMelFbank::LogMelFbank(const LogMelFbankParams& params)
    : params_(params), tiles_per_row_((params.frames + W - 1) / W) {
  const int64_t points = params.fft_size / 2, bins = points + 1;
  for (int64_t m = 0; m < params.mels; ++m) {
    const float* weights = params.mel + m * bins;
    Filter filter{0, bins};
    while (filter.first < bins && weights[filter.first] == 0) ++filter.first;
    while (filter.last > filter.first && weights[filter.last - 1] == 0) --filter.last;
    filters_.push_back(filter);
  }
  const double step = 2 * std::acos(-1.0) / static_cast<double>(params.fft_size);
  for (int64_t k = 0; k < points; ++k) {
    cosines_.push_back(static_cast<float>(std::cos(step * static_cast<double>(k))));
    sines_.push_back(static_cast<float>(std::sin(step * static_cast<double>(k))));
  }
  reversed_.assign(points, 0);
  for (int64_t k = 1; k < points; ++k) {
    reversed_[k] = static_cast<int32_t>((reversed_[k / 2] + (k % 2) * points) / 2);
  }
  for (int64_t b = 0; b < params.batch; ++b) {
    params.frame_lengths[b] =
        count_frames(params.lengths[b], params.frame_length, params.frame_shift);
  }
}

void LogMelFbank::compute(int64_t begin, int64_t end) const {
  const int64_t points = params_.fft_size / 2;
  std::vector<Lanes> frames(params_.frame_length), re(points), im(points), energies(points + 1);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile / tiles_per_row_, frame = tile % tiles_per_row_ * W;
    const int64_t count = std::clamp<int64_t>(params_.frame_lengths[row] - frame, 0, W);
    float* padding = params_.features + (row * params_.frames + frame + count) * params_.mels;
    std::fill_n(padding, (std::min(W, params_.frames - frame) - count) * params_.mels, 0.0F);
    if (count == 0) continue;
    load(row, frame, count, frames.data());
    power(frames.data(), re.data(), im.data(), energies.data());
    write(row, frame, count, energies.data());
  }
}

// Scaled, centred, pre-emphasised and windowed frames (L,); lanes past `count` are zero.
void LogMelFbank::load(int64_t row, int64_t frame, int64_t count, Lanes* frames) const {
  const int64_t length = params_.frame_length;
  const float* samples = params_.waveforms + row * params_.samples + frame * params_.frame_shift;
  if (count < W) std::fill_n(frames, length, Lanes{});
  for (int64_t w = 0; w < count; ++w) {
    const float* own = samples + w * params_.frame_shift;
    for (int64_t n = 0; n < length; ++n) frames[n][w] = own[n] * params_.sample_scale;
  }
  Lanes mean = {};
  if (params_.remove_dc) {
    Doubles sum = {};
    for (int64_t n = 0; n < length; ++n) sum += __builtin_convertvector(frames[n], Doubles);
    mean = __builtin_convertvector(sum / static_cast<double>(length), Lanes);
  }
  Lanes previous = frames[0] - mean;
  for (int64_t n = 0; n < length; ++n) {
    const Lanes current = frames[n] - mean;
    frames[n] = (current - params_.preemphasis * previous) * params_.window[n];
    previous = current;
  }
}

// Power spectrum (fft_size / 2 + 1,). Even samples are the real and odd ones the imaginary part of
// one complex transform of half the size, whose result splits into the spectra of both.
void LogMelFbank::power(const Lanes* frames, Lanes* re, Lanes* im, Lanes* energies) const {
  const int64_t points = params_.fft_size / 2, length = params_.frame_length;
  for (int64_t k = 0; k < points; ++k) {
    const int64_t n = 2 * reversed_[k];
    re[k] = n < length ? frames[n] : Lanes{};
    im[k] = n + 1 < length ? frames[n + 1] : Lanes{};
  }
  for (int64_t half = 1; half < points; half *= 2) {
    const int64_t stride = points / half;  // of this stage in the table of fft_size-th roots
    for (int64_t start = 0; start < points; start += 2 * half) {
      for (int64_t k = 0; k < half; ++k) {
        const float c = cosines_[k * stride], s = sines_[k * stride];
        const int64_t top = start + k, low = top + half;
        const Lanes turned_re = re[low] * c + im[low] * s, turned_im = im[low] * c - re[low] * s;
        re[low] = re[top] - turned_re;
        im[low] = im[top] - turned_im;
        re[top] += turned_re;
        im[top] += turned_im;
      }
    }
  }
  const Lanes first = re[0] + im[0], last = re[0] - im[0];
  energies[0] = first * first;
  energies[points] = last * last;
  for (int64_t k = 1; k < points; ++k) {
    const float c = cosines_[k], s = sines_[k];
    const int64_t n = points - k;
    const Lanes even_re = 0.5F * (re[k] + re[n]), even_im = 0.5F * (im[k] - im[n]);
    const Lanes odd_re = 0.5F * (im[k] + im[n]), odd_im = 0.5F * (re[n] - re[k]);
    const Lanes real = even_re + c * odd_re + s * odd_im;
    const Lanes imag = even_im + c * odd_im - s * odd_re;
    energies[k] = real * real + imag * imag;
  }
}

void LogMelFbank::write(int64_t row, int64_t frame, int64_t count, const Lanes* energies) const {
  const int64_t bins = params_.fft_size / 2 + 1;
  float* out = params_.features + (row * params_.frames + frame) * params_.mels;
  for (int64_t m = 0; m < params_.mels; ++m) {
    const float* weights = params_.mel + m * bins;
    Lanes sum = {};
    for (int64_t k = filters_[m].first; k < filters_[m].last; ++k) sum += weights[k] * energies[k];
    for (int64_t w = 0; w < count; ++w) {
      out[w * params_.mels + m] = std::log(std::max(sum[w], params_.log_floor));
    }
  }
}

void LogMelFbank::normalize(int64_t begin, int64_t end) const {
  std::vector<double> sum(params_.mels);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = params_.frame_lengths[row];
    float* features = params_.features + row * params_.frames * params_.mels;
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t m = 0; m < params_.mels; ++m) sum[m] += features[t * params_.mels + m];
    }
    for (int64_t m = 0; m < params_.mels; ++m)
      sum[m] /= static_cast<double>(std::max<int64_t>(count, 1));
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t m = 0; m < params_.mels; ++m) {
        features[t * params_.mels + m] =
            static_cast<float>(features[t * params_.mels + m] - sum[m]);
      }
    }
  }
}

}  // namespace spkfast::cpu
