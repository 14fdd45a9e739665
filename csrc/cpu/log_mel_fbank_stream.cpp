#include "log_mel_fbank_stream.h"

#include <algorithm>
#include <cstdlib>

namespace spkfast::cpu {

LogMelFbankStream::LogMelFbankStream(const LogMelFbankSettings& settings,
                                     const LogMelFbankTables& tables, Level level)
    : fbank_(settings, tables, level), scratch_(fbank_.workspace()) {}

void LogMelFbankStream::push(const float* samples, int64_t count) {
  samples_.insert(samples_.end(), samples, samples + count);
  received_ += count;
}

void LogMelFbankStream::push(const int16_t* samples, int64_t count) {
  const size_t held = samples_.size();
  samples_.resize(held + count);
  for (int64_t n = 0; n < count; ++n)
    samples_[held + n] = static_cast<float>(samples[n]) * (1.0F / 32768);
  received_ += count;
}

int64_t LogMelFbankStream::start(int64_t frame) const {
  return fbank_.plan().offset + frame * fbank_.plan().frame_shift;
}

int64_t LogMelFbankStream::ready() const {
  const LogMelFbankPlan& plan = fbank_.plan();
  const int64_t all = fbank_.settings().count_frames(received_) - taken_;
  if (ended_ || all <= 0) return std::max<int64_t>(all, 0);
  // A frame waits for its last sample, and one at the start of the signal for what is reflected
  // there.
  if (start(taken_) < 0 && plan.padding != 0 && received_ <= -plan.offset) return 0;
  if (start(taken_) <= 0 && plan.preemphasis_mode == 1 && received_ < 2) return 0;
  const int64_t room = received_ - start(taken_) - plan.frame_length;
  return room < 0 ? 0 : std::min(all, room / plan.frame_shift + 1);
}

bool LogMelFbankStream::take(float* out) {
  const LogMelFbankPlan& plan = fbank_.plan();
  const LogMelFbankRow row = {
      .floats = samples_.data(),
      .shorts = nullptr,
      .length = received_ - first_,
      .mean = 0,
      .gain = static_cast<float>(fbank_.settings().sample_scale),
      .noisy = false,
      .seed = 0,
  };
  bool good = true;
  const int64_t lanes = fbank_.lanes();
  for (int64_t rest = ready(); rest > 0;) {
    const int64_t count = std::min(rest, lanes);
    good &=
        fbank_.compute(row, start(taken_) - first_, count, out, nullptr, nullptr, scratch_.data());
    out += count * plan.size;
    taken_ += count;
    rest -= count;
  }
  if (!ended_) forget();
  return good;
}

// Drops samples that no later frame reads: neither itself, nor by pre-emphasis or a reflection at
// the end.
void LogMelFbankStream::forget() {
  const LogMelFbankPlan& plan = fbank_.plan();
  const int64_t reflected = received_ - 2 * plan.frame_length - std::abs(plan.offset);
  const int64_t keep = std::min(start(taken_), reflected) - 1;
  // In larger steps, so that what stays is not moved for each push.
  if (keep - first_ < 4 * plan.frame_length) return;
  samples_.erase(samples_.begin(), samples_.begin() + (keep - first_));
  first_ = keep;
  if (samples_.capacity() > 4 * samples_.size() + 65536) samples_.shrink_to_fit();
}

void LogMelFbankStream::reset() {
  std::vector<float>().swap(samples_);
  first_ = received_ = taken_ = 0;
  ended_ = false;
}

}  // namespace spkfast::cpu
