// log_mel_fbank of one utterance that arrives in pieces, over raw pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "log_mel_fbank_engine.h"

namespace spkfast::cpu {

// Frames are those of the whole utterance to the last bit, each as soon as its samples are there.
// The spec must have nothing that is of the whole utterance. Holds no more than the samples of a
// few frames.
class LogMelFbankStream {
 public:
  LogMelFbankStream(const LogMelFbankSettings& settings, const LogMelFbankTables& tables,
                    Level level);

  int64_t size() const { return fbank_.plan().size; }
  int64_t received() const { return received_; }
  // Takes samples; afterwards `ready` frames wait.
  void push(const float* samples, int64_t count);
  void push(const int16_t* samples, int64_t count);
  // No more samples come: all frames are ready.
  void end() { ended_ = true; }
  int64_t ready() const;
  // The ready frames into out (ready, size). False where one of their samples is NaN or infinite.
  bool take(float* out);
  // Forgets everything, for another utterance.
  void reset();

 private:
  int64_t start(int64_t frame) const;  // of a frame's window, in samples
  void forget();

  LogMelFbank fbank_;
  Scratch scratch_;
  std::vector<float> samples_;  // from sample first_ on
  int64_t first_ = 0, received_ = 0, taken_ = 0;
  bool ended_ = false;
};

}  // namespace spkfast::cpu
