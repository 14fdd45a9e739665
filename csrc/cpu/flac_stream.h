// Crops of FLAC files of one channel and 16 bits, over raw memory or a descriptor.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace spkfast::cpu {

// The bytes of a FLAC file: in memory, or a part of an open file that is read piece by piece. Not a
// mapped file: one that another program cuts short, or a network that fails, would end the process.
class FlacBytes {
 public:
  FlacBytes(const uint8_t* data, int64_t size) : data_(data), size_(size) {}
  FlacBytes(int descriptor, int64_t offset, int64_t size)
      : size_(size), descriptor_(descriptor), file_offset_(offset) {}

  struct Part {
    const uint8_t* begin;
    const uint8_t* end;
    int64_t size() const { return end - begin; }
  };
  // From byte `offset` on at least `count` bytes, and more where that costs nothing; fewer where
  // the file ends. Good until the next call.
  Part at(int64_t offset, int64_t count);
  int64_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;  // null: a descriptor
  int64_t size_;
  int descriptor_ = -1;
  int64_t file_offset_ = 0;
  std::unique_ptr<uint8_t[]> buffer_;
  int64_t room_ = 0;
  int64_t first_ = 0, held_ = 0;  // bytes in the buffer
  int64_t chunk_ = 1 << 12;       // to read at a time: little for the header, which is short
};

// The format is that of RFC 9639. Throws std::runtime_error where the file is damaged: the message
// says what and where.
class FlacStream {
 public:
  explicit FlacStream(FlacBytes bytes);

  // Why another decoder has to read this file; empty where this one does.
  const std::string& unsupported() const { return unsupported_; }
  int64_t samples() const { return samples_; }
  int64_t sample_rate() const { return sample_rate_; }
  // Samples [start, start + count), which must lie within the file. The check sum of every frame
  // that holds one of them is right. Threads wait for each other.
  void read(int64_t start, int64_t count, int16_t* out);

 private:
  struct Frame {
    int64_t offset;  // of its first byte
    int64_t start;   // its first sample
    int64_t block;   // samples
    int64_t header;  // bytes
    int64_t end() const { return start + block; }
  };
  struct Block {
    Frame frame;
    int64_t end;  // the byte behind it
    int wasted;   // zero bits at the end of every sample, which block_samples_ lacks
  };

  void read_metadata();
  bool parse(FlacBytes::Part part, int64_t offset, Frame* frame) const;
  bool fits(const Frame& frame) const;
  bool find(int64_t offset, int64_t limit, int64_t low, int64_t high, Frame* frame);
  int64_t seek(int64_t sample);
  void read_from(int64_t offset, int64_t start, int64_t count, int16_t* out);
  Block decode(int64_t offset, int64_t expected);

  FlacBytes bytes_;
  std::mutex mutex_;
  std::string unsupported_;
  int64_t samples_ = 0, sample_rate_ = 0, first_frame_ = 0;
  int64_t block_ = 0;                   // samples of each block, or of the greatest
  bool variable_ = false;               // blocks of several sizes
  std::vector<int32_t> block_samples_;  // behind as many zeros as a predictor looks back
};

}  // namespace spkfast::cpu
