#include "log_mel_fbank_engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

namespace spkfast::cpu {
namespace {

const LogMelFbankKernel& kernel_for(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512) return log_mel_fbank_avx512();
  if (level == Level::avx2) return log_mel_fbank_avx2();
#endif
  return log_mel_fbank_scalar();
}

// NaN where either is.
float larger(float a, float b) { return b > a || std::isnan(b) ? b : a; }

// The kernel for single frames: that of AVX2 serves AVX-512 too.
const LogMelFbankKernel& frame_kernel_for(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx2) return log_mel_fbank_avx2();
#endif
  return log_mel_fbank_scalar();
}

// Radices of the passes over `points`, few and large ones first; a prime above 5 is a pass of its
// own.
std::vector<int64_t> radices(int64_t points) {
  std::vector<int64_t> found;
  int64_t twos = 0;
  while (points % 2 == 0) {
    points /= 2;
    ++twos;
  }
  for (; twos >= 3 && twos != 4; twos -= 3) found.push_back(8);
  for (; twos >= 2; twos -= 2) found.push_back(4);
  if (twos == 1) found.push_back(2);
  for (int64_t radix = 3; points > 1; radix += 2) {
    while (points % radix == 0) {
      found.push_back(radix);
      points /= radix;
    }
  }
  return found;
}

template <typename T>
bool equal(const std::vector<T>& own, const T* values, int64_t count) {
  return static_cast<int64_t>(own.size()) == count &&
         (count == 0 || std::memcmp(own.data(), values, count * sizeof(T)) == 0);
}

void push_root(std::vector<float>& table, int64_t turn, int64_t size) {
  const double phase =
      -2 * std::acos(-1.0) * static_cast<double>(turn % size) / static_cast<double>(size);
  table.push_back(static_cast<float>(std::cos(phase)));
  table.push_back(static_cast<float>(std::sin(phase)));
}

}  // namespace

LogMelFbank::LogMelFbank(const LogMelFbankSettings& settings, const LogMelFbankTables& tables,
                         Level level)
    : settings_(settings),
      level_(level),
      kernel_(&kernel_for(level)),
      frame_kernel_(&frame_kernel_for(level)),
      window_(tables.window, tables.window + tables.frame_length),
      mel_(tables.mel, tables.mel + tables.num_mels * (settings.fft_size / 2 + 1)),
      cosines_(tables.cosines, tables.cosines + tables.num_cosines * tables.num_mels) {
  const bool halved = settings.fft_size % 2 == 0;
  const float infinity = std::numeric_limits<float>::infinity();
  taper_ = window_;
  if (halved) {
    for (float& value : taper_) value *= 0.5F;
  }
  plan_ = {
      .frame_shift = settings.frame_shift,
      .frame_length = tables.frame_length,
      .fft_size = settings.fft_size,
      .points = halved ? settings.fft_size / 2 : settings.fft_size,
      .offset = settings.offset,
      .padding = settings.padding,
      .preemphasis_mode = settings.preemphasis_mode,
      .num_mels = tables.num_mels,
      .num_cosines = tables.num_cosines,
      .size = (tables.cosines ? tables.num_cosines : tables.num_mels) + (settings.energy != 0),
      .energy = settings.energy,
      .remove_dc = settings.remove_dc,
      .magnitude = settings.magnitude,
      .clip = settings.spectrum_low > 0 || settings.spectrum_high < infinity,
      .has_cosines = tables.cosines != nullptr,
      .energy_last = settings.energy_last,
      .mean_norm = settings.mean_norm,
      .std_norm = settings.std_norm,
      .std_unbiased = settings.std_unbiased,
      .preemphasis = static_cast<float>(settings.preemphasis),
      .dither = static_cast<float>(settings.dither),
      .spectrum_low = static_cast<float>(settings.spectrum_low),
      .spectrum_high = static_cast<float>(settings.spectrum_high),
      .energy_floor = static_cast<float>(settings.energy_floor),
      .energy_scale = settings.energy == 2 && halved ? 4.0F : 1.0F,
      .log_floor = static_cast<float>(settings.log_floor),
      .log_offset = static_cast<float>(settings.log_offset),
      .log_scale = static_cast<float>(settings.log_scale),
      .top_db = static_cast<float>(settings.top_db),
      .var_eps = settings.var_eps,
      .std_eps = settings.std_eps,
      .window = taper_.data(),
      .passes = nullptr,
      .num_passes = 0,
      .largest_radix = 0,
      .split_cosines = nullptr,
      .split_sines = nullptr,
      .positions = nullptr,
      .filters = nullptr,
      .weights = nullptr,
      .cosines = cosines_.data(),
      .frame_twiddles = nullptr,
  };
  plan_transform();
  plan_filters();
}

bool LogMelFbank::is_for(const LogMelFbankSettings& settings, const LogMelFbankTables& tables,
                         Level level) const {
  return level == level_ && settings == settings_ &&
         equal(window_, tables.window, tables.frame_length) &&
         equal(mel_, tables.mel, tables.num_mels * (settings.fft_size / 2 + 1)) &&
         equal(cosines_, tables.cosines, tables.num_cosines * tables.num_mels) &&
         plan_.has_cosines == (tables.cosines != nullptr);
}

void LogMelFbank::plan_transform() {
  const int64_t points = plan_.points;
  std::vector<size_t> starts;
  int64_t blocks = 1, length = points;
  for (const int64_t radix : radices(points)) {
    const int64_t stride = length / radix;
    starts.push_back(twiddles_.size());
    if (radix > 5 && radix != 8) {
      for (int64_t r = 0; r < radix; ++r) push_root(twiddles_, r, radix);
    }
    for (int64_t j = 0; j < stride; ++j) {
      for (int64_t r = 1; r < radix; ++r) push_root(twiddles_, j * r, length);
    }
    passes_.push_back({radix, stride, blocks, nullptr});
    plan_.largest_radix = std::max(plan_.largest_radix, radix);
    blocks *= radix;
    length = stride;
  }
  for (size_t k = 0; k < passes_.size(); ++k) passes_[k].twiddles = twiddles_.data() + starts[k];

  for (int64_t k = 0; k < points; ++k) {
    int64_t rest = k, position = 0;
    for (const FftPass& pass : passes_) {
      position += rest % pass.radix * pass.stride;
      rest /= pass.radix;
    }
    positions_.push_back(static_cast<int32_t>(position));
    if (k > points / 2) continue;
    std::vector<float> root;
    push_root(root, k, plan_.fft_size);
    split_cosines_.push_back(root[0]);
    split_sines_.push_back(-root[1]);
  }
  split_cosines_.resize(split_cosines_.size() + kFrameLanes);
  split_sines_.resize(split_sines_.size() + kFrameLanes);
  if (points > 1 && points < plan_.fft_size && passes_[0].radix == 8 && plan_.energy == 0)
    plan_frames();
  plan_.passes = passes_.data();
  plan_.num_passes = static_cast<int64_t>(passes_.size());
  plan_.split_cosines = split_cosines_.data();
  plan_.split_sines = split_sines_.data();
  plan_.positions = positions_.data();
}

void LogMelFbank::plan_frames() {
  const int64_t eighth = plan_.points / 8,
                padded = (eighth + kFrameLanes - 1) / kFrameLanes * kFrameLanes;
  frame_twiddles_.assign(7 * 2 * padded, 0.0F);
  for (int64_t r = 0; r < 7; ++r) {
    for (int64_t j = 0; j < eighth; ++j) {
      for (int64_t part = 0; part < 2; ++part)
        frame_twiddles_[(2 * r + part) * padded + j] = passes_[0].twiddles[(j * 7 + r) * 2 + part];
    }
  }
  plan_.frame_twiddles = frame_twiddles_.data();
}

int64_t LogMelFbank::workspace() const {
  const int64_t tile = kernel_->workspace(plan_);
  return goes_by_frames() ? std::max(tile, frame_kernel_->frame_workspace(plan_)) : tile;
}

bool LogMelFbank::compute(const LogMelFbankRow& row, int64_t first, int64_t count, float* out,
                          double* sums, float* highest, float* workspace) const {
  // A frame alone costs about an eighth of a tile of 16 lanes, and less than a third of one of 8.
  if (!goes_by_frames() || 8 * count > 3 * lanes())
    return kernel_->tile(plan_, row, first, count, out, sums, highest, workspace);
  bool good = true;
  for (int64_t t = 0; t < count; ++t) {
    float* features = out + t * plan_.size;
    good &= frame_kernel_->frame(plan_, row, first + t * plan_.frame_shift, lanes(), features,
                                 workspace);
    for (int64_t m = 0; m < plan_.size; ++m) {
      if (sums) sums[m] += features[m];
      if (highest) *highest = larger(*highest, features[m]);
    }
  }
  return good;
}

void LogMelFbank::plan_filters() {
  const int64_t bins = plan_.fft_size / 2 + 1;
  for (int64_t m = 0; m < plan_.num_mels; ++m) {
    const float* row = mel_.data() + m * bins;
    int64_t first = 0, last = bins;
    while (first < last && row[first] == 0) ++first;
    while (last > first && row[last - 1] == 0) --last;
    const int64_t count = (last - first + kMelUnroll - 1) / kMelUnroll * kMelUnroll;
    filters_.push_back({static_cast<int32_t>(first), static_cast<int32_t>(count),
                        static_cast<int64_t>(weights_.size())});
    weights_.insert(weights_.end(), row + first, row + last);
    weights_.resize(weights_.size() + count - (last - first), 0.0F);
  }
  plan_.filters = filters_.data();
  plan_.weights = weights_.data();
}

namespace {

// What log_mel_fbank keeps of one utterance.
struct Utterance {
  LogMelFbankRow row;
  int64_t frames, tiles, first_tile;  // first_tile: among the tiles of the batch
};

class Run {
 public:
  Run(const LogMelFbank& fbank, const LogMelFbankBatch& batch)
      : fbank_(fbank),
        plan_(fbank.plan()),
        batch_(batch),
        lanes_(fbank.lanes()),
        keep_sums_(plan_.mean_norm || plan_.std_norm),
        keep_highest_(plan_.top_db < std::numeric_limits<float>::infinity()),
        good_(batch.batch, 1) {
    for (int64_t b = 0; b < batch.batch; ++b) {
      const int64_t frames = fbank.settings().count_frames(batch.lengths[b]);
      batch.frame_lengths[b] = frames;
      const int64_t tiles = (frames + lanes_ - 1) / lanes_;
      utterances_.push_back({row(b), frames, tiles, tiles_});
      tiles_ += tiles;
    }
    if (keep_sums_) sums_.resize(tiles_ * plan_.size);
    if (keep_highest_) highest_.assign(tiles_, -std::numeric_limits<float>::infinity());
  }

  int64_t run(const ParallelFor& parallel_for) {
    // Tiles in a row, across utterances, so that threads get equal shares of a ragged batch. A
    // thread completes the utterances that lie wholly in its share while they are in its cache; the
    // few that were divided come last.
    std::vector<char> done(batch_.batch);
    parallel_for(0, tiles_, 8, [&](int64_t begin, int64_t end) {
      Scratch scratch(fbank_.workspace());
      auto next = std::upper_bound(
          utterances_.begin(), utterances_.end(), begin,
          [](int64_t tile, const Utterance& u) { return tile < u.first_tile + u.tiles; });
      for (; begin < end; ++next) {
        const int64_t b = next - utterances_.begin(), last = next->first_tile + next->tiles;
        const bool whole = begin == next->first_tile && last <= end;
        // Of a divided utterance by each of its threads: they find the same.
        const LogMelFbankRow row = normalized(next->row);
        for (; begin < std::min(end, last); ++begin)
          compute(b, row, begin - next->first_tile, scratch.data());
        if (!whole) continue;
        complete(b);
        done[b] = 1;
      }
    });
    std::vector<int64_t> divided;
    for (int64_t b = 0; b < batch_.batch; ++b) {
      if (!done[b]) divided.push_back(b);
    }
    parallel_for(0, static_cast<int64_t>(divided.size()), 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) complete(divided[begin]);
    });
    for (int64_t b = 0; b < batch_.batch; ++b) {
      if (!good_[b] || !rest_is_finite(b)) return b;
    }
    return -1;
  }

 private:
  LogMelFbankRow row(int64_t b) {
    const auto& settings = fbank_.settings();
    const int64_t length = batch_.lengths[b], start = b * batch_.samples;
    LogMelFbankRow row = {
        .floats = batch_.floats ? batch_.floats + start : nullptr,
        .shorts = batch_.shorts ? batch_.shorts + start : nullptr,
        .length = length,
        .mean = 0,
        .gain = static_cast<float>(settings.sample_scale),
        .noisy = batch_.seeds != nullptr && plan_.dither != 0,
        .seed = batch_.seeds ? static_cast<uint64_t>(batch_.seeds[b]) : 0,
    };
    row.gain *= batch_.shorts ? 1.0F / 32768 : 1.0F;
    return row;
  }

  // With the mean of its samples taken off and divided by their deviation.
  LogMelFbankRow normalized(LogMelFbankRow row) const {
    if (fbank_.settings().waveform_norm == 0) return row;
    const double unit = row.shorts ? 1.0 / 32768 : 1.0;
    double mean, variance;
    fbank_.moments(row, &mean, &variance);
    variance *= unit * unit;
    const double deviation = fbank_.settings().waveform_norm == 1
                                 ? std::sqrt(std::max(variance, 1e-20)) + 1e-8
                                 : std::sqrt(variance + 1e-4);
    row.mean = static_cast<float>(mean);
    row.gain = static_cast<float>(row.gain / deviation);
    return row;
  }

  void compute(int64_t b, const LogMelFbankRow& row, int64_t tile, float* scratch) {
    const Utterance& u = utterances_[b];
    const int64_t frame = tile * lanes_, index = u.first_tile + tile;
    const int64_t count = std::min(lanes_, u.frames - frame);
    const bool good = fbank_.compute(row, plan_.offset + frame * plan_.frame_shift, count,
                                     features(b) + frame * plan_.size,
                                     keep_sums_ ? sums_.data() + index * plan_.size : nullptr,
                                     keep_highest_ ? &highest_[index] : nullptr, scratch);
    if (!good) std::atomic_ref<char>(good_[b]).store(0, std::memory_order_relaxed);
  }

  // Everything that is of the whole utterance, and zeros behind it.
  void complete(int64_t b) {
    const Utterance& u = utterances_[b];
    float* out = features(b);
    std::vector<double> sums(plan_.size);
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t k = u.first_tile; k < u.first_tile + u.tiles; ++k) {
      for (int64_t m = 0; keep_sums_ && m < plan_.size; ++m) sums[m] += sums_[k * plan_.size + m];
      if (keep_highest_) highest = larger(highest, highest_[k]);
    }
    if (u.frames > 0) fbank_.finish(out, u.frames, sums.data(), highest);
    std::fill(out + u.frames * plan_.size, out + batch_.frames * plan_.size, 0.0F);
    for (int64_t k = 0; batch_.masks && k < batch_.num_masks; ++k) {
      const int64_t* mask = batch_.masks + (b * batch_.num_masks + k) * 4;
      const int64_t first = std::clamp<int64_t>(mask[2], 0, plan_.size);
      const int64_t last = std::clamp<int64_t>(mask[3], first, plan_.size);
      for (int64_t t = std::max<int64_t>(mask[0], 0); t < std::min(mask[1], u.frames); ++t)
        std::fill(out + t * plan_.size + first, out + t * plan_.size + last, 0.0F);
    }
  }

  // Of the samples that no frame holds.
  bool rest_is_finite(int64_t b) const {
    const LogMelFbankRow& row = utterances_[b].row;
    if (!row.floats) return true;
    const int64_t shift = plan_.frame_shift, length = plan_.frame_length;
    const int64_t end = plan_.offset + (utterances_[b].frames - 1) * shift + length;
    // Where frames leave gaps, every sample is looked at again.
    const bool gaps = shift > length || utterances_[b].frames == 0;
    for (int64_t n = gaps ? 0 : std::max<int64_t>(0, end); n < row.length; ++n) {
      if (!std::isfinite(row.floats[n])) return false;
    }
    for (int64_t n = 0; n < std::min(plan_.offset, row.length); ++n) {
      if (!std::isfinite(row.floats[n])) return false;
    }
    return true;
  }

  float* features(int64_t b) const { return batch_.features + b * batch_.frames * plan_.size; }

  const LogMelFbank& fbank_;
  const LogMelFbankPlan& plan_;
  const LogMelFbankBatch& batch_;
  const int64_t lanes_;
  const bool keep_sums_, keep_highest_;
  std::vector<char> good_;
  std::vector<Utterance> utterances_;
  int64_t tiles_ = 0;
  std::vector<double>
      sums_;  // of each tile, so that they add in one order whatever thread computed them
  std::vector<float> highest_;  // of each tile
};

}  // namespace

int64_t run_log_mel_fbank(const LogMelFbank& fbank, const LogMelFbankBatch& batch,
                          const ParallelFor& parallel_for) {
  return Run(fbank, batch).run(parallel_for);
}

}  // namespace spkfast::cpu
