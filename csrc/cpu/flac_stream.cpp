#include "flac_stream.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace spkfast::cpu {

namespace {

using Part = FlacBytes::Part;

constexpr int kBits = 16;
constexpr int kMostOrder = 32;
constexpr int64_t kMostBlock = 65535;
constexpr int64_t kMostHeader = 16;  // bytes of a frame's header
constexpr int64_t kLeastFrame = 10;  // bytes
// Bytes of a frame, of which no encoder makes as many.
constexpr int64_t kMostFrame = 1 << 20;
// Bytes that are read at a time.
constexpr int64_t kChunk = 1 << 16;

std::runtime_error damaged(int64_t sample) {
  return std::runtime_error("damaged frame at sample " + std::to_string(sample));
}

std::runtime_error cut_off(int64_t sample) {
  return std::runtime_error("cut off, or damaged, in the frame at sample " +
                            std::to_string(sample));
}

// Of a check sum of `Value`, table n is of a byte that n others follow.
template <typename Value, int kTables, unsigned kPolynomial>
constexpr auto crc_tables() {
  std::array<std::array<Value, 256>, kTables> tables{};
  constexpr int kShift = 8 * (sizeof(Value) - 1);
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned crc = byte << kShift;
    for (int bit = 0; bit < 8; ++bit)
      crc = (crc << 1) ^ ((crc >> (kShift + 7) & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = static_cast<Value>(crc);
  }
  for (int n = 1; n < kTables; ++n)
    for (int byte = 0; byte < 256; ++byte) {
      const unsigned crc = tables[n - 1][byte];
      tables[n][byte] = static_cast<Value>((crc << 8) ^ tables[0][crc >> kShift]);
    }
  return tables;
}
constexpr auto kCrc8 = crc_tables<uint8_t, 1, 0x07>();
constexpr auto kCrc16 = crc_tables<uint16_t, 16, 0x8005>();

uint8_t crc8(const uint8_t* begin, const uint8_t* end) {
  uint8_t crc = 0;
  while (begin < end) crc = kCrc8[0][crc ^ *begin++];
  return crc;
}

uint16_t crc16(const uint8_t* begin, const uint8_t* end) {
  unsigned crc = 0;
  for (; end - begin >= 16; begin += 16) {
    crc = kCrc16[15][begin[0] ^ (crc >> 8)] ^ kCrc16[14][begin[1] ^ (crc & 255)];
    for (int n = 2; n < 16; ++n) crc ^= kCrc16[15 - n][begin[n]];
  }
  while (begin < end) crc = (crc << 8 & 0xFFFF) ^ kCrc16[0][(crc >> 8) ^ *begin++];
  return static_cast<uint16_t>(crc);
}

uint64_t load_big_endian(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  if constexpr (std::endian::native == std::endian::little) word = __builtin_bswap64(word);
  return word;
}

// Bits from the highest of each byte on. Where they run out, `over` and zeros.
class Bits {
 public:
  explicit Bits(Part part) : next_(part.begin), end_(part.end) {}

  bool over() const { return over_; }
  // The first byte of which no bit was taken.
  const uint8_t* byte() const { return next_ - count_ / 8; }

  uint32_t take(int count) {  // at most 32
    if (count_ < count) fill();
    if (count_ < count) return run_out();
    const uint64_t value = ahead_ >> 1 >> (63 - count);
    drop(count);
    return static_cast<uint32_t>(value);
  }

  int32_t take_signed(int count) {
    const uint32_t value = take(count);
    return count == 0 ? 0 : static_cast<int32_t>(value << (32 - count)) >> (32 - count);
  }

  // Zeros up to the next one.
  uint32_t take_unary() {
    uint32_t zeros = 0;
    for (;;) {
      fill();
      const int found = std::min(std::countl_zero(ahead_), count_);
      zeros += found;
      if (found < count_) {
        drop(found + 1);
        return zeros;
      }
      drop(found);
      if (next_ == end_) return run_out();
    }
  }

  // A number in Rice's code, its sign in the lowest bit.
  uint32_t take_rice(int parameter) {
    const uint32_t high = take_unary();
    // Nothing in a file is greater; what is left of this one does not matter.
    if (uint64_t{high} << parameter > UINT32_MAX) return run_out();
    return high << parameter | take(parameter);
  }

  // Two of them at once, where they are short; else nothing is taken.
  [[gnu::always_inline]] bool take_two_rice(int parameter, uint32_t* first, uint32_t* second) {
    fill();
    const int zeros = std::countl_zero(ahead_), length = zeros + 1 + parameter;
    const uint64_t rest = ahead_ << (length & 63);
    const int zeros2 = std::countl_zero(rest), length2 = zeros2 + 1 + parameter;
    if (length + length2 > std::min(count_, 63)) return false;
    *first =
        ((zeros - 1U) << parameter) + static_cast<uint32_t>(ahead_ << zeros >> (63 - parameter));
    *second =
        ((zeros2 - 1U) << parameter) + static_cast<uint32_t>(rest << zeros2 >> (63 - parameter));
    ahead_ = rest << length2;
    count_ -= length + length2;
    return true;
  }

 private:
  // At least 56 bits, if there are as many.
  [[gnu::always_inline]] void fill() {
    if (end_ - next_ >= 8) [[likely]] {
      ahead_ |= load_big_endian(next_) >> count_;
      next_ += (63 - count_) >> 3;
      count_ |= 56;
      return;
    }
    for (; count_ <= 56 && next_ < end_; count_ += 8)
      ahead_ |= static_cast<uint64_t>(*next_++) << (56 - count_);
  }

  void drop(int count) {  // at most count_
    ahead_ = count < 64 ? ahead_ << count : 0;
    count_ -= count;
  }

  uint32_t run_out() {
    over_ = true;
    return 0;
  }

  const uint8_t* next_;
  const uint8_t* end_;
  uint64_t ahead_ = 0;  // from the highest bit on
  int count_ = 0;       // of them; what follows is zero or what follows in the file
  bool over_ = false;
};

int32_t unfold(uint32_t value) { return static_cast<int32_t>(value >> 1 ^ -(value & 1)); }

int32_t plus(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

// Section 9.2.5: what a prediction has left of all samples of a block but the first `order`.
bool take_residuals(Bits* bits, int32_t* samples, int64_t block, int order) {
  const uint32_t method = bits->take(2);
  const int parameter_bits = method == 0 ? 4 : 5, escape = (1 << parameter_bits) - 1;
  const int partition_order = bits->take(4);
  const int64_t size = block >> partition_order;
  if (method > 1 || size << partition_order != block || size < order) return false;
  int32_t* sample = samples + order;
  for (int64_t partition = 0; partition < block / size && !bits->over(); ++partition) {
    const int32_t* const end = samples + (partition + 1) * size;
    const int parameter = bits->take(parameter_bits);
    if (parameter == escape) {
      const int width = bits->take(5);
      while (sample < end) *sample++ = bits->take_signed(width);
    }
    while (sample < end && !bits->over()) {
      Bits ahead = *bits;  // a copy, which stays in registers
      uint32_t first, second;
      for (; end - sample >= 2 && ahead.take_two_rice(parameter, &first, &second); sample += 2) {
        sample[0] = unfold(first);
        sample[1] = unfold(second);
      }
      *bits = ahead;
      if (sample < end) *sample++ = unfold(bits->take_rice(parameter));
    }
  }
  return true;
}

// Adds what is predicted from the samples before, of which those in `weights` come latest first.
// Sums wrap around: where a sample is outside its range, the block is refused as a whole.
template <int kOrder>
void restore(int32_t* begin, const int32_t* end, const int32_t* from, int shift) {
  std::array<int32_t, kOrder> weights;
  std::copy(from, from + kOrder, weights.begin());
  for (int32_t* sample = begin; sample < end; ++sample) {
    uint32_t sum = 0;
    // The latest last: all others can be summed before it is known.
#pragma GCC unroll 32
    for (int n = kOrder; n > 0; --n)
      sum += static_cast<uint32_t>(weights[n - 1]) * static_cast<uint32_t>(sample[-n]);
    *sample = plus(*sample, static_cast<int32_t>(sum) >> shift);
  }
}

void restore_wide(int32_t* begin, const int32_t* end, const int32_t* weights, int order,
                  int shift) {
  for (int32_t* sample = begin; sample < end; ++sample) {
    int64_t sum = 0;
    for (int n = order; n > 0; --n) sum += static_cast<int64_t>(weights[n - 1]) * sample[-n];
    *sample = plus(*sample, static_cast<int32_t>(sum >> shift));
  }
}

void restore_any(int32_t* begin, const int32_t* end, const int32_t* weights, int order, int shift) {
  int64_t most = 0;
  for (int n = 0; n < order; ++n) most += std::abs(weights[n]);
  // Where 32 bits do not hold every sum.
  if (most >= int64_t{1} << (32 - kBits)) return restore_wide(begin, end, weights, order, shift);
  // An order takes the next higher one of these: the weights that it lacks are zero, and before a
  // block there are zeros.
  constexpr std::pair<int, decltype(&restore<2>)> kRestore[] = {
      {0, [](int32_t*, const int32_t*, const int32_t*, int) {}},
      {2, restore<2>},
      {4, restore<4>},
      {6, restore<6>},
      {8, restore<8>},
      {10, restore<10>},
      {12, restore<12>},
      {16, restore<16>},
      {24, restore<24>},
      {kMostOrder, restore<kMostOrder>},
  };
  for (const auto& [orders, function] : kRestore)
    if (order <= orders) return function(begin, end, weights, shift);
}

// The samples of a block, before the bits that all of them lack are put back. False where it is
// none.
bool take_subframe(Bits* bits, int32_t* samples, int64_t block, int* wasted) {
  if (bits->take(1) != 0) return false;
  const int type = bits->take(6);
  *wasted =
      bits->take(1) != 0 ? static_cast<int>(std::min<uint32_t>(bits->take_unary(), kBits)) + 1 : 0;
  const int width = kBits - *wasted;
  if (width < 1) return false;
  if (type == 0) {
    std::fill(samples, samples + block, bits->take_signed(width));
    return true;
  }
  if (type == 1) {
    for (int64_t n = 0; n < block; ++n) samples[n] = bits->take_signed(width);
    return true;
  }
  static constexpr int32_t kFixed[5][4] = {{}, {1}, {2, -1}, {3, -3, 1}, {4, -6, 4, -1}};
  const bool fixed = type >= 8 && type <= 12;
  if (!fixed && type < 32) return false;
  const int order = fixed ? type - 8 : type - 31;
  if (order > block) return false;
  for (int n = 0; n < order; ++n) samples[n] = bits->take_signed(width);
  std::array<int32_t, kMostOrder> weights{};
  int shift = 0;
  if (fixed) {
    std::copy(kFixed[order], kFixed[order] + order, weights.begin());
  } else {
    const int precision = bits->take(4) + 1;
    shift = bits->take_signed(5);
    if (precision == 16 || shift < 0) return false;
    for (int n = 0; n < order; ++n) weights[n] = bits->take_signed(precision);
  }
  if (!take_residuals(bits, samples, block, order)) return false;
  restore_any(samples + order, samples + block, weights.data(), order, shift);
  return true;
}

}  // namespace

Part FlacBytes::at(int64_t offset, int64_t count) {
  offset = std::min(offset, size_);
  if (data_ != nullptr) return {data_ + offset, data_ + size_};
  count = std::min(count, size_ - offset);
  if (offset < first_ || offset + count > first_ + held_) {
    const int64_t wanted = std::min(std::max(count, chunk_), size_ - offset);
    chunk_ = kChunk;
    if (room_ < wanted) {
      const int64_t room = std::max(wanted, kChunk);
      buffer_ = std::make_unique_for_overwrite<uint8_t[]>(room);
      room_ = room;
    }
    first_ = offset;
    for (held_ = 0; held_ < wanted;) {
      const ssize_t got =
          pread(descriptor_, buffer_.get() + held_, wanted - held_, file_offset_ + first_ + held_);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0)
        throw std::runtime_error("cannot be read: " + std::generic_category().message(errno));
      if (got == 0) throw std::runtime_error("cut off while it was read");
      held_ += got;
    }
  }
  return {buffer_.get() + (offset - first_), buffer_.get() + held_};
}

FlacStream::FlacStream(FlacBytes bytes) : bytes_(std::move(bytes)) {
  read_metadata();
  if (!unsupported_.empty()) return;
  const Part part = bytes_.at(first_frame_, kMostHeader);
  variable_ = part.size() > 1 && (part.begin[1] & 1) != 0;
  Frame frame;
  if (!parse(part, first_frame_, &frame) || !fits(frame) || frame.start != 0) throw damaged(0);
}

// Section 8: what the file says of itself.
void FlacStream::read_metadata() {
  constexpr int64_t kStreamInfo = 34, kBegin = 4 + 4;
  const Part head = bytes_.at(0, kBegin + kStreamInfo);
  if (head.size() < 4 || std::memcmp(head.begin, "fLaC", 4) != 0) {
    unsupported_ = "it does not begin as a FLAC file";
    return;
  }
  if (head.size() < kBegin + kStreamInfo) throw std::runtime_error("cut off in its header");
  const uint64_t first = load_big_endian(head.begin + 4), rate = load_big_endian(head.begin + 18);
  if ((first >> 32 & 0x7FFFFFFF) != kStreamInfo) throw std::runtime_error("damaged header");
  const int64_t least = first >> 16 & 0xFFFF, most = first & 0xFFFF;
  sample_rate_ = rate >> 44;
  const int64_t channels = (rate >> 41 & 7) + 1, bits = (rate >> 36 & 31) + 1;
  samples_ = rate & 0xFFFFFFFFF;
  block_ = most;
  if (channels != 1 || bits != kBits)
    unsupported_ = std::to_string(channels) + " channels of " + std::to_string(bits) + " bits";
  else if (samples_ == 0)
    unsupported_ = "it does not say how long it is";
  if (!unsupported_.empty()) return;
  first_frame_ = 4;
  for (bool last = false; !last;) {
    const Part part = bytes_.at(first_frame_, 4);
    if (part.size() < 4) throw std::runtime_error("cut off in its header");
    last = (part.begin[0] & 0x80) != 0;
    first_frame_ += 4 + (part.begin[1] << 16 | part.begin[2] << 8 | part.begin[3]);
  }
  const Part part = bytes_.at(first_frame_, 2);
  // Where all blocks are of one size, frames give their place among the frames in place of their
  // first sample.
  if (part.size() >= 2 && (part.begin[1] & 1) == 0 && least != most)
    unsupported_ = "its blocks should be of one size, and are of several";
  // No frame is shorter: what is wrong by far shall not make a caller ask for memory.
  if (samples_ / kMostBlock > bytes_.size() / kLeastFrame)
    throw std::runtime_error("cut off, or its header is damaged");
}

// Section 9.1: the header of a frame of this file.
bool FlacStream::parse(Part part, int64_t offset, Frame* frame) const {
  const uint8_t* byte = part.begin;
  if (part.size() < 6 || byte[0] != 0xFF || byte[1] != (variable_ ? 0xF9 : 0xF8)) return false;
  const int block = byte[2] >> 4, rate = byte[2] & 15, channels = byte[3] >> 4, bits = byte[3] & 15;
  if (block == 0 || rate == 15 || channels != 0 || (bits != 0 && bits != 8)) return false;
  byte += 4;

  const int length = std::max(std::countl_one(*byte), 1);  // of the number, in bytes
  const int block_bytes = block == 6 ? 1 : block == 7 ? 2 : 0;
  const int rate_bytes = rate == 12 ? 1 : rate > 12 ? 2 : 0;
  if ((length == 1 && *byte >= 0x80) || length > (variable_ ? 7 : 6)) return false;
  if (part.end - byte < length + block_bytes + rate_bytes + 1) return false;
  int64_t number = length == 1 ? *byte : *byte & (0x7F >> length);
  for (int n = 1; n < length; ++n) {
    if (byte[n] >> 6 != 2) return false;
    number = number << 6 | (byte[n] & 0x3F);
  }
  byte += length;
  const auto take = [&](int count) {
    int64_t value = 0;
    while (count-- > 0) value = value << 8 | *byte++;
    return value;
  };

  frame->block = block_bytes > 0 ? take(block_bytes) + 1
                 : block == 1    ? 192
                 : block < 6     ? 144 << block
                                 : 1 << block;
  constexpr int64_t kRates[] = {0,     88200, 176400, 192000, 8000,  16000,
                                22050, 24000, 32000,  44100,  48000, 96000};
  const int64_t hertz = rate < 12    ? kRates[rate]
                        : rate == 12 ? take(1) * 1000
                                     : take(2) * (rate == 14 ? 10 : 1);
  if (rate != 0 && hertz != sample_rate_) return false;
  frame->offset = offset;
  frame->start = variable_ ? number : number * block_;
  frame->header = byte + 1 - part.begin;
  return crc8(part.begin, byte) == *byte;
}

// Whether a frame can be where it says that it is.
bool FlacStream::fits(const Frame& frame) const {
  if (frame.end() == samples_) return frame.block <= (variable_ ? kMostBlock : block_);
  return frame.end() < samples_ && (variable_ ? frame.block <= kMostBlock : frame.block == block_);
}

// The first of the frames that begin in [offset, limit) with a sample between low and high.
bool FlacStream::find(int64_t offset, int64_t limit, int64_t low, int64_t high, Frame* frame) {
  while (offset < limit) {
    const Part part = bytes_.at(offset, kMostHeader);
    // A header at the end of what is here is looked at with the next part.
    const bool last = offset + part.size() == bytes_.size();
    const int64_t places =
        std::min(last ? part.size() : part.size() - kMostHeader + 1, limit - offset);
    const uint8_t* const end = part.begin + places;
    for (const uint8_t* place = part.begin;; ++place) {
      place = static_cast<const uint8_t*>(std::memchr(place, 0xFF, end - place));
      if (place == nullptr) break;
      if (parse({place, part.end}, offset + (place - part.begin), frame) && fits(*frame) &&
          low < frame->start && frame->start < high)
        return true;
    }
    offset += places;
  }
  return false;
}

// Where the frame begins that seems to hold a sample.
int64_t FlacStream::seek(int64_t sample) {
  Frame low = {.offset = first_frame_, .start = 0, .block = variable_ ? 0 : block_, .header = 0};
  Frame found;
  int64_t limit = bytes_.size(), high = samples_;
  for (bool halve = false; sample >= low.end(); halve = !halve) {
    // By turns in proportion to the samples, a block early, and in the middle: the former alone may
    // take many steps.
    const double density =
        static_cast<double>(limit - low.offset) / static_cast<double>(high - low.start);
    const int64_t guess =
        halve ? low.offset + (limit - low.offset) / 2
              : low.offset + static_cast<int64_t>(density * (sample - low.start - block_));
    const int64_t from = std::clamp(guess, low.offset + 1, std::max(limit - 1, low.offset + 1));
    const bool any = find(from, limit, low.start, high, &found);
    if (any && found.start <= sample) {
      low = found;
    } else {
      if (from == low.offset + 1) break;
      limit = from;
      if (any) high = found.start;
    }
  }
  return low.offset;
}

void FlacStream::read(int64_t start, int64_t count, int16_t* out) {
  if (start < 0 || count < 0 || count > samples_ - start)
    throw std::invalid_argument("start and count must lie within the file");
  const std::lock_guard lock(mutex_);
  if (count == 0) return;
  const int64_t offset = seek(start);
  if (offset != first_frame_) {
    try {
      return read_from(offset, start, count, out);
    } catch (const std::runtime_error&) {
      // Samples that look like a frame may have misled the search. From the first frame on, each
      // begins where the one before ends.
    }
  }
  read_from(first_frame_, start, count, out);
}

void FlacStream::read_from(int64_t offset, int64_t start, int64_t count, int16_t* out) {
  const bool searched = offset != first_frame_;
  int64_t expected = searched ? -1 : 0;
  do {
    const Block block = decode(offset, expected);
    const Frame& frame = block.frame;
    if (expected < 0 && (frame.start > start || frame.end() <= start)) throw damaged(start);
    const int64_t begin = std::max(start, frame.start);
    const int64_t end = std::min(start + count, frame.end());
    const int32_t* samples = block_samples_.data() + kMostOrder;
    for (int64_t n = begin; n < end; ++n)
      out[n - start] = static_cast<int16_t>(samples[n - frame.start] << block.wasted);
    // What follows tells whether a frame that was searched for is one, and whether the last one is
    // the last.
    Frame next;
    const bool last = frame.end() == samples_;
    if ((expected < 0 || last) &&
        last == (parse(bytes_.at(block.end, kMostHeader), block.end, &next) &&
                 next.start == frame.end()))
      throw last ? std::runtime_error("holds more samples than its header says")
                 : damaged(frame.end());
    offset = block.end;
    expected = frame.end();
  } while (expected < start + count);
}

// The frame that begins at a byte and, unless that is negative, with an expected sample.
FlacStream::Block FlacStream::decode(int64_t offset, int64_t expected) {
  for (int64_t size = 2 * block_ + 64;; size *= 2) {
    const Part part = bytes_.at(offset, size);
    const bool all = offset + part.size() == bytes_.size() || part.size() > kMostFrame;
    Block block;
    const Frame& frame = block.frame;
    if (!parse(part, offset, &block.frame) || !fits(frame) ||
        (expected >= 0 && frame.start != expected))
      throw part.size() < kMostHeader ? cut_off(expected) : damaged(expected);
    block_samples_.resize(kMostOrder + frame.block);
    int32_t* const samples = block_samples_.data() + kMostOrder;
    Bits bits({part.begin + frame.header, part.end});
    const bool good = take_subframe(&bits, samples, frame.block, &block.wasted);
    const uint8_t* const sum = bits.byte();
    if (bits.over() || part.end - sum < 2) {
      if (!all) continue;
      throw cut_off(frame.start);
    }
    const int width = kBits - block.wasted;
    uint32_t outside = 0;
    for (int64_t n = 0; good && n < frame.block; ++n)
      outside |= (static_cast<uint32_t>(samples[n]) + (1U << (width - 1))) >> width;
    if (!good || outside != 0 || crc16(part.begin, sum) != (sum[0] << 8 | sum[1]))
      throw damaged(frame.start);
    block.end = offset + (sum + 2 - part.begin);
    return block;
  }
}

}  // namespace spkfast::cpu
