#include "product_engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace spkfast::cpu {
namespace {

// Frames of a tile of the widest kernel, where pieces of an utterance begin.
constexpr int64_t kPiece = 6;
// Frames of a wave for each thread.
constexpr int64_t kWaveFrames = 384;
// Rows for each thread from which on a row is one thread's.
constexpr int64_t kRowsPerThread = 4;
const ParallelFor kSerial = [](int64_t begin, int64_t end, int64_t, const auto& body) {
  if (begin < end) body(begin, end);
};
// Multiplications that are worth a second thread.
constexpr int64_t kTaskWork = 1 << 18;

uint16_t bfloat_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : rounded);
}

}  // namespace

const ProductKernel& product_kernel(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512bf16) return product_avx512bf16();
  if (level == Level::avx512) return product_avx512();
  if (level == Level::avx2) return product_avx2();
#else
  (void)level;
#endif
  return product_scalar();
}

int64_t Weight::steps() const {
  int64_t steps = 0;
  for (const int64_t part : parts) steps += steps_of(operand, part) * taps;
  return steps;
}

namespace {

// The word of a step: its numbers, the first one in the lowest bits.
uint32_t word_of(const float (&values)[1]) {
  uint32_t bits;
  std::memcpy(&bits, values, sizeof(bits));
  return bits;
}
uint32_t word_of(const float (&values)[2]) {
  return bfloat_bits(values[0]) | static_cast<uint32_t>(bfloat_bits(values[1])) << 16;
}
uint32_t word_of(const float (&values)[4]) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(values[i]))) << 8 * i;
  return word;
}

// One panel, whose channels' values begin at `values`; a step takes so many inputs.
template <int kStep>
void pack_panel(const Weight& weight, int64_t channels, const float* values, const Strides& strides,
                uint32_t* words) {
  // Inputs that a line of memory holds: each line is read once, whichever way they lie.
  constexpr int64_t kTogether = 16;
  for (const int64_t part : weight.parts) {
    for (int64_t tap = 0; tap < weight.taps; ++tap) {
      for (int64_t first = 0; first < part; first += kTogether) {
        const int64_t steps = (std::min(kTogether, part - first) + kStep - 1) / kStep;
        for (int64_t c = 0; c < channels; ++c) {
          const float* from = values + tap * strides.tap + c * strides.channel;
          for (int64_t step = 0; step < steps; ++step) {
            float inputs[kStep] = {};
            for (int i = 0; i < kStep; ++i) {
              const int64_t input = first + step * kStep + i;
              if (kStep == 1 || input < part) inputs[i] = from[input * strides.input];
            }
            words[step * kPanel + c] = word_of(inputs);
          }
        }
        for (int64_t step = 0; step < steps; ++step)
          std::fill(words + step * kPanel + channels, words + (step + 1) * kPanel, 0U);
        words += steps * kPanel;
      }
    }
    values += part * strides.input;
  }
}

}  // namespace

void pack(const Weight& weight, const float* values, const Strides& strides, char* packed,
          const ParallelFor& parallel_for) {
  const auto pack_as = weight.operand == Operand::float32    ? &pack_panel<1>
                       : weight.operand == Operand::bfloat16 ? &pack_panel<2>
                                                             : &pack_panel<4>;
  const int64_t words = kPanel * weight.steps();
  parallel_for(0, panels_of(weight.channels), 1 + kTaskWork / (words + 1),
               [&](int64_t from, int64_t to) {
                 for (int64_t panel = from; panel < to; ++panel) {
                   const int64_t first = panel * kPanel;
                   pack_as(weight, std::min(kPanel, weight.channels - first),
                           values + first * strides.channel, strides,
                           reinterpret_cast<uint32_t*>(packed) + panel * words);
                 }
               });
}

void Buffer::Free::operator()(char* p) const { std::free(p); }

char* Buffer::of(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  size_ = -1;  // memory of this size each time, so that the sanitizer sees what goes beyond
#endif
  if (bytes > size_) {
    constexpr int64_t kLine = 64;
    size_ = (bytes + kLine - 1) / kLine * kLine;
    memory_.reset();
    memory_.reset(static_cast<char*>(std::aligned_alloc(kLine, size_)));
    if (!memory_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  return memory_.get();
}

int64_t value_bytes(Element element) { return element == Element::float32 ? 4 : 2; }

bool is_operand(Element element, Operand operand, int64_t channels) {
  const bool same = (element == Element::float32 && operand == Operand::float32) ||
                    (element == Element::bfloat16 && operand == Operand::bfloat16);
  return same && channels % step_channels(operand) == 0;
}

void each_wave(const RealFrames& real, int64_t threads, const ParallelFor& parallel_for,
               const std::function<void(int64_t, int64_t, const ParallelFor&)>& body) {
  if (threads > 1 && real.batch >= kRowsPerThread * threads) {
    // Batches are often sorted by length: threads take turns.
    parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      for (int64_t thread = from; thread < to; ++thread) {
        for (int64_t row = thread; row < real.batch; row += threads) body(row, row + 1, kSerial);
      }
    });
    return;
  }
  for (int64_t begin = 0; begin < real.batch;) {
    int64_t end = begin, frames = 0;
    while (end < real.batch && (end == begin || frames + real.of(end) <= threads * kWaveFrames))
      frames += real.of(end++);
    body(begin, end, parallel_for);
    begin = end;
  }
}

void each_frames(const RealFrames& real, int64_t begin, int64_t end, int64_t work,
                 const ParallelFor& parallel_for,
                 const std::function<void(int64_t, int64_t, int64_t)>& body) {
  int64_t pieces = 0;
  for (int64_t row = begin; row < end; ++row) pieces += (real.of(row) + kPiece - 1) / kPiece;
  parallel_for(0, pieces, 1 + kTaskWork / (kPiece * work + 1), [&](int64_t from, int64_t to) {
    for (int64_t row = begin; row < end && to > 0; ++row) {
      const int64_t frames = real.of(row), here = (frames + kPiece - 1) / kPiece;
      const int64_t first = std::max<int64_t>(from, 0) * kPiece;
      const int64_t last = std::min(to * kPiece, frames);
      if (first < last) body(row, first, last);
      from -= here;
      to -= here;
    }
  });
}

std::vector<Source> sources_of(const Layer& layer, const std::vector<Frames>& parts,
                               int64_t dilation) {
  std::vector<Source> sources;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t steps = steps_of(layer.form.operand, layer.form.parts[i]);
    for (int64_t tap = 0; tap < layer.form.taps; ++tap) {
      int64_t step = 0;
      do {  // at least one, also of no channels
        sources.push_back({parts[i].data + step * kStepBytes, parts[i].stride,
                           std::min(kChunkSteps, steps - step),
                           (tap - layer.form.taps / 2) * dilation});
        step += kChunkSteps;
      } while (step < steps);
    }
  }
  return sources;
}

Product product_of(const Layer& layer, Element element, int64_t frames, bool reflect,
                   const char* beyond) {
  Product product = {};
  product.operand = layer.form.operand;
  product.frames = frames;
  product.reflect = reflect;
  product.beyond = beyond;
  product.weight = layer.weight;
  product.channels = layer.form.channels;
  product.unit = layer.unit;
  product.bias = layer.bias;
  product.scale = layer.scale;
  product.shift = layer.shift;
  product.relu = layer.relu;
  product.tanh = layer.tanh;
  product.element = element;
  return product;
}

void run_tdnn_layer(const TdnnLayer& call, const RealFrames& real, Level level, int64_t threads,
                    const ParallelFor& parallel_for) {
  thread_local struct {
    Buffer operands, beyond, bias;
  } memory;
  const ProductKernel& kernel = product_kernel(level);
  const Layer& layer = call.layer;
  const Operand operand = layer.form.operand;
  const int64_t channels = layer.form.channels, panels = panels_of(channels);
  int64_t widest = 0, bytes = 0;  // of a frame's operands
  bool converts = false;
  for (const int64_t part : layer.form.parts) {
    const int64_t size = steps_of(operand, part) * kStepBytes;
    widest = std::max(widest, size);
    bytes += size;
    converts = converts || !is_operand(call.element, operand, part);
  }
  char* beyond = memory.beyond.of(widest);
  std::memset(beyond, static_cast<int>(layer.quantiser.zero), widest);
  const int64_t work = channels * layer.form.steps() * step_channels(operand);
  each_wave(
      real, threads, parallel_for,
      [&](int64_t begin, int64_t end, const ParallelFor& parallel_for) {
        const int64_t row_bytes = longest(real, begin, end) * bytes;
        char* operands = converts ? memory.operands.of((end - begin) * row_bytes) : nullptr;
        const auto parts_of = [&](int64_t row) {
          std::vector<Frames> parts;
          char* at = operands ? operands + (row - begin) * row_bytes : nullptr;
          for (size_t i = 0; i < call.inputs.size(); ++i) {
            parts.push_back(converts ? Frames{at, bytes} : call.inputs[i].row(row));
            if (converts) at += steps_of(operand, layer.form.parts[i]) * kStepBytes;
          }
          return parts;
        };
        const auto convert = [&](int64_t row, int64_t first, int64_t last) {
          const std::vector<Frames> parts = parts_of(row);
          for (size_t i = 0; i < parts.size(); ++i)
            kernel.convert(call.inputs[i].row(row), call.element, layer.form.parts[i], parts[i],
                           operand, layer.quantiser, first, last);
        };
        // Threads share the frames, or the weights where these are the larger part of what is read.
        int64_t frames = 0;
        for (int64_t row = begin; row < end; ++row) frames += real.of(row);
        const bool by_panels = panels >= threads && frames * bytes < layer.form.packed_bytes();
        // Then, and of several taps, what one of them converts others read too.
        const bool apart = converts && (by_panels || layer.form.taps > 1);
        if (apart) each_frames(real, begin, end, bytes, parallel_for, convert);
        float* bias = nullptr;
        if (call.offset) {
          bias = reinterpret_cast<float*>(memory.bias.of((end - begin) * channels * sizeof(float)));
          for (int64_t row = begin; row < end; ++row) {
            for (int64_t c = 0; c < channels; ++c)
              bias[(row - begin) * channels + c] = layer.bias[c] + call.offset[row * channels + c];
          }
        }
        const auto multiply = [&](int64_t row, int64_t first, int64_t last, int64_t from,
                                  int64_t to) {
          if (converts && !apart) convert(row, first, last);
          const std::vector<Source> sources = sources_of(layer, parts_of(row), call.dilation);
          Product product = product_of(layer, call.out_element, real.of(row), call.reflect, beyond);
          read(product, sources);
          if (bias) product.bias = bias + (row - begin) * channels;
          product.out = call.out.row(row);
          kernel.run(product, first, last, from, to);
        };
        if (by_panels) {
          const int64_t grain = 1 + kTaskWork / (kPanel * (work / channels) * frames + 1);
          parallel_for(0, panels, grain, [&](int64_t from, int64_t to) {
            for (int64_t row = begin; row < end; ++row) multiply(row, 0, real.of(row), from, to);
          });
        } else {
          each_frames(real, begin, end, work, parallel_for,
                      [&](int64_t row, int64_t first, int64_t last) {
                        multiply(row, first, last, 0, panels);
                      });
        }
        if (call.mean == nullptr) return;
        // While the outputs are in the caches.
        parallel_for(begin * panels, end * panels, 1 + kTaskWork / (kPanel * real.frames + 1),
                     [&](int64_t from, int64_t to) {
                       for (int64_t row = from / panels; row * panels < to; ++row) {
                         const int64_t first = std::max(from - row * panels, int64_t{0}) * kPanel;
                         const int64_t last = std::min(channels, (to - row * panels) * kPanel);
                         kernel.moments(call.out.row(row), call.out_element, real.of(row),
                                        call.mean + row * channels, call.var + row * channels,
                                        first, last);
                       }
                     });
      });
  const int64_t frame_bytes = channels * value_bytes(call.out_element);
  for (int64_t row = 0; row < real.batch; ++row) {
    for (int64_t t = real.of(row); t < real.frames; ++t)
      std::memset(call.out.row(row).data + t * call.out.frame_stride, 0, frame_bytes);
  }
}

}  // namespace spkfast::cpu
