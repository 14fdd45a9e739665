#include "augmentation_engine.h"

#include <algorithm>
#include <cmath>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>

namespace spkfast::cpu {
namespace {

const AugmentationKernel& kernel_for(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512) return augmentation_avx512();
  if (level == Level::avx2) return augmentation_avx2();
#endif
  return augmentation_scalar();
}

// A row of a batch of so many samples each.
Samples row_of(const Samples& x, int64_t row, int64_t samples) {
  return {x.floats ? x.floats + row * samples : nullptr,
          x.shorts ? x.shorts + row * samples : nullptr};
}

// Tables of a change of speed in the order in which a kernel reads them.
class Speed {
 public:
  Speed(const SpeedFilter& filter, int64_t lanes) : half_(filter.half) {
    // As many periods together as fill vectors.
    const int64_t together = lanes / std::gcd(filter.q, lanes);
    const int64_t p = filter.p * together, q = filter.q * together, taps = 2 * filter.half + 1;
    std::vector<int64_t> places;
    for (int64_t first = 0; first < q; first += lanes) {
      const int64_t count = std::min(lanes, q - first), start = first * p / q;
      const int64_t reach = (first + count - 1) * p / q - start;
      places.push_back(static_cast<int64_t>(weights_.size()));
      tiles_.push_back({first, count, start, taps + reach, nullptr});
      weights_.resize(weights_.size() + (taps + reach) * lanes);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t skipped = (first + j) * p / q - start;
        for (int64_t k = 0; k < taps; ++k) {
          weights_[places.back() + (skipped + k) * lanes + j] =
              filter.weights[(first + j) % filter.q * taps + k];
        }
      }
    }
    for (size_t t = 0; t < tiles_.size(); ++t) tiles_[t].weights = weights_.data() + places[t];
    plan_ = {p, q, static_cast<int64_t>(tiles_.size()), tiles_.data()};
  }
  const SpeedPlan& plan() const { return plan_; }
  int64_t half() const { return half_; }
  // Inputs that so many periods read, from `half` before the first one on.
  int64_t reach(int64_t periods) const {
    return (periods - 1) * plan_.p + (plan_.q - 1) * plan_.p / plan_.q + 2 * half_ + 1;
  }

 private:
  int64_t half_;
  std::vector<float> weights_;
  std::vector<SpeedTile> tiles_;
  SpeedPlan plan_;
};

void change_speed_of_row(const AugmentationKernel& kernel, const SpeedBatch& batch,
                         const Speed& speed, int64_t row, std::vector<float>& in,
                         std::vector<float>& made) {
  const SpeedPlan& plan = speed.plan();
  const Samples x = row_of(batch.x, row, batch.samples);
  float* out = batch.out + row * batch.outputs;
  const int64_t length = std::clamp(batch.lengths[row], int64_t{0}, batch.samples - batch.context);
  if (length == 0) return std::fill(out, out + batch.outputs, 0.0F);
  const int64_t available = (length - 1) * plan.q / plan.p + 1;
  const int64_t outputs = std::min(available, batch.outputs);
  if (plan.p == plan.q) {
    kernel.to_floats(x, batch.context, outputs, out);
  } else {
    const int64_t periods = (outputs + plan.q - 1) / plan.q, needed = speed.reach(periods);
    in.assign(needed, 0.0F);
    made.resize(periods * plan.q);
    const int64_t origin = batch.context - speed.half();
    const int64_t first = std::max(origin, int64_t{0});
    const int64_t last = std::min(origin + needed, batch.context + length);
    if (last > first) kernel.to_floats(x, first, last - first, in.data() + (first - origin));
    kernel.change_speed(plan, in.data(), periods, made.data());
    std::copy_n(made.data(), outputs, out);
  }
  for (int64_t n = outputs; n < batch.outputs; n += outputs) {
    std::copy_n(out, std::min(outputs, batch.outputs - n), out + n);
  }
}

// Tables of one size of convolution.
class Convolution {
 public:
  Convolution(int64_t points, int64_t lanes) : lanes_(lanes), cosines_(points), sines_(points) {
    const double turn = std::acos(-1.0) / 2 / static_cast<double>(points);
    for (int64_t n = 0; n < points; ++n) {
      cosines_[n] = static_cast<float>(std::cos(turn * static_cast<double>(n)));
      sines_[n] = static_cast<float>(std::sin(turn * static_cast<double>(n)));
    }
    int64_t block = points;
    for (const int64_t radix : radices(points / lanes)) {
      const int64_t stride = block / radix;
      auto& table = twiddles_.emplace_back(2 * (radix - 1) * stride);
      const double step = -2 * std::acos(-1.0) / static_cast<double>(block);
      for (int64_t r = 1; r < radix; ++r) {
        for (int64_t j = 0; j < stride; ++j) {
          const double phase = step * static_cast<double>(r * j);
          table[2 * (r - 1) * stride + j] = static_cast<float>(std::cos(phase));
          table[(2 * r - 1) * stride + j] = static_cast<float>(std::sin(phase));
        }
      }
      passes_.push_back({radix, stride, table.data()});
      block = stride;
    }
    plan_ = {points, cosines_.data(), sines_.data(), passes_.data(),
             static_cast<int64_t>(passes_.size())};
  }
  const ConvolutionPlan& plan() const { return plan_; }
  bool is_for(int64_t points, int64_t lanes) const {
    return plan_.points == points && lanes_ == lanes;
  }

 private:
  static std::vector<int64_t> radices(int64_t points) {
    std::vector<int64_t> found;
    for (const int64_t radix : {5, 3}) {
      for (; points % radix == 0; points /= radix) found.push_back(radix);
    }
    for (; points % 8 == 0 && points != 16; points /= 8) found.push_back(8);
    for (; points % 4 == 0; points /= 4) found.push_back(4);
    if (points == 2) found.push_back(2);
    return found;
  }

  int64_t lanes_;
  std::vector<float> cosines_, sines_;
  std::list<std::vector<float>> twiddles_;
  std::vector<RealFftPass> passes_;
  ConvolutionPlan plan_;
};

// The smallest number of complex points that hold a convolution of so many samples: 256 times twos,
// threes and fives, as every kernel takes them.
int64_t points_for(int64_t samples) {
  const int64_t least = (samples + 511) / 512;
  int64_t best = 1;
  while (best < least) best *= 2;
  for (int64_t five = 1; five < best; five *= 5) {
    for (int64_t three = five; three < best; three *= 3) {
      int64_t two = three;
      while (two < least) two *= 2;
      best = std::min(best, two);
    }
  }
  return 256 * best;
}

// The last few stay: making one costs as much as a few convolutions.
std::shared_ptr<const Convolution> cached(int64_t points, int64_t lanes) {
  constexpr size_t kKept = 8;
  static std::mutex mutex;
  static std::list<std::shared_ptr<const Convolution>> kept;
  const std::lock_guard lock(mutex);
  for (auto at = kept.begin(); at != kept.end(); ++at) {
    if (!(*at)->is_for(points, lanes)) continue;
    kept.splice(kept.begin(), kept, at);
    return kept.front();
  }
  kept.push_front(std::make_shared<const Convolution>(points, lanes));
  if (kept.size() > kKept) kept.pop_back();
  return kept.front();
}

// Calls body(first sample in the recordings, first in the row, count) for the parts of a recording
// that repeats from its offset on.
template <typename Body>
void each_part(int64_t begin, int64_t size, int64_t offset, int64_t samples, Body body) {
  for (int64_t n = 0; n < samples;) {
    const int64_t count = std::min(size - offset, samples - n);
    body(begin + offset, n, count);
    n += count;
    offset = 0;
  }
}

}  // namespace

void run_change_speed(const SpeedBatch& batch, const std::vector<SpeedFilter>& filters, Level level,
                      const ParallelFor& parallel_for) {
  const AugmentationKernel& kernel = kernel_for(level);
  std::vector<Speed> speeds;
  speeds.reserve(filters.size());  // they point into themselves
  for (const SpeedFilter& filter : filters) speeds.emplace_back(filter, kernel.lanes);
  parallel_for(0, batch.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> in, made;
    for (int64_t row = begin; row < end; ++row) {
      change_speed_of_row(kernel, batch, speeds[batch.which[row]], row, in, made);
    }
  });
}

void run_reverberate(const ReverberationBatch& batch, Level level,
                     const ParallelFor& parallel_for) {
  const AugmentationKernel& kernel = kernel_for(level);
  const int64_t samples = batch.samples, longest = std::min(batch.longest, samples);
  // Nothing past the row is wanted, but what comes round again must not fall into it.
  const auto convolution = cached(points_for(samples + longest - 1), kernel.lanes);
  const ConvolutionPlan& plan = convolution->plan();
  parallel_for(0, batch.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> work(4 * plan.points);
    float *re = work.data(), *im = re + plan.points;
    float *other_re = im + plan.points, *other_im = other_re + plan.points;
    for (int64_t row = begin; row < end; ++row) {
      const Samples x = row_of(batch.x, row, samples);
      float* out = batch.out + row * samples;
      const int64_t size = std::min(batch.responses.sizes[row], longest);
      if (size <= 0) {
        if (out != x.floats) kernel.to_floats(x, 0, samples, out);
        continue;
      }
      kernel.spectrum(plan, x, 0, samples, re, im);
      kernel.spectrum(plan, batch.responses.samples, batch.responses.begins[row], size, other_re,
                      other_im);
      kernel.convolved(plan, re, im, other_re, other_im, batch.gains[row], samples, out);
    }
  });
}

void run_add_noise(const NoiseBatch& batch, Level level, const ParallelFor& parallel_for) {
  const AugmentationKernel& kernel = kernel_for(level);
  const int64_t samples = batch.samples;
  parallel_for(0, batch.batch, 1, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const Samples x = row_of(batch.x, row, samples);
      float* out = batch.out + row * samples;
      if (out != x.floats) kernel.to_floats(x, 0, samples, out);
      const int64_t* sizes = batch.noises.sizes + row * batch.each;
      if (std::all_of(sizes, sizes + batch.each, [](int64_t size) { return size <= 0; })) continue;
      const double power = kernel.energy(x, 0, samples) / static_cast<double>(samples);
      for (int64_t k = row * batch.each; k < (row + 1) * batch.each; ++k) {
        const int64_t begin = batch.noises.begins[k], size = batch.noises.sizes[k];
        if (size <= 0) continue;
        double energy = 0;
        each_part(begin, size, batch.offsets[k], samples,
                  [&](int64_t from, int64_t, int64_t count) {
                    energy += kernel.energy(batch.noises.samples, from, count);
                  });
        if (energy == 0) continue;
        const double of_noise = energy / static_cast<double>(samples);
        const double ratio = (power + batch.power_floor) / (of_noise + batch.power_floor);
        const auto gain =
            static_cast<float>(std::sqrt(ratio) * std::pow(10, batch.snr_db[k] / -20));
        each_part(begin, size, batch.offsets[k], samples,
                  [&](int64_t from, int64_t n, int64_t count) {
                    kernel.add(batch.noises.samples, from, count, gain, out + n);
                  });
      }
    }
  });
}

}  // namespace spkfast::cpu
