// What a unit of the products offers to the engines, and what it is given. A product takes frames
// of channels, side by side in memory, to frames of other channels; a convolution is one over
// several sources, its taps.
#pragma once

#include <cstdint>

#include "element.h"

namespace spkfast::cpu {

// What is multiplied. Sums are float32, of bytes exact whole numbers. One step of a sum takes 32
// bits of either operand: one float, two bfloat16 numbers, four bytes.
enum class Operand { float32, bfloat16, int8 };

constexpr int64_t kStepBytes = 4;
inline int64_t step_channels(Operand operand) {
  return operand == Operand::float32 ? 1 : operand == Operand::bfloat16 ? 2 : 4;
}
inline int64_t steps_of(Operand operand, int64_t channels) {
  return (channels + step_channels(operand) - 1) / step_channels(operand);
}

// Output channels that lie side by side in a packed weight: panel after panel, in each step after
// step of all sources, in each step one word of kStepBytes for each channel. Channels that do not
// exist are 0.
constexpr int64_t kPanel = 64;
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Bytes of unsigned numbers: value = (byte - zero) * scale.
struct Quantiser {
  float inverse_scale, zero;
};

// Steps of a chunk, of which a product takes one after the other. A source of more is a chunk
// alone: where it can be split into several, it should.
constexpr int64_t kChunkSteps = 512;

// Frames of operands.
struct Source {
  const char* data;  // of frame 0
  int64_t stride;    // bytes
  int64_t steps;
  int64_t shift;  // frames from the one that is made to the one that is read
};

// Frames of values of the activations' element type.
struct Frames {
  char* data;
  int64_t stride;  // bytes
};

struct Product {
  Operand operand;
  const Source* sources;
  int64_t num_sources;
  int64_t frames;  // of the sources; a frame beyond is mirrored into them, or is `beyond`
  bool reflect;
  const char* beyond;  // a frame of operands
  const char* weight;  // packed
  int64_t channels;    // of the output
  // By output channel: what a whole number stands for (of bytes), what is added, and after the ReLU
  // the affine map of batch norm; null where there is none.
  const float *unit, *bias, *scale, *shift;
  bool relu, tanh;
  Element element;
  Frames out;
  // Where not null, `out + next` in operands, for the next product.
  Frames sum;
  Frames next;
  Quantiser quantiser;
};

struct ProductKernel {
  // Output frames [first, last) of the panels [first_panel, last_panel).
  void (*run)(const Product& product, int64_t first, int64_t last, int64_t first_panel,
              int64_t last_panel);
  // Frames [first, last) of values to operands; what a last step lacks of channels is filled up.
  void (*convert)(const Frames& from, Element element, int64_t channels, const Frames& to,
                  Operand operand, Quantiser quantiser, int64_t first, int64_t last);
  // Channels [first, last) of `frames` frames, where the frames of a channel lie side by side and
  // channels are `stride` bytes apart, to frames of channels.
  void (*turn)(const char* from, int64_t stride, Element element, int64_t frames, const Frames& to,
               int64_t first, int64_t last);
  // means[c] of `frames` frames for channels [first, last), 0 of none.
  void (*means)(const Frames& from, Element element, int64_t frames, float* means, int64_t first,
                int64_t last);
  // The same, and their biased variances.
  void (*moments)(const Frames& from, Element element, int64_t frames, float* means, float* vars,
                  int64_t first, int64_t last);
  // out = out * sigmoid(gate[c]) + rest for frames [first, last).
  void (*gate)(const Frames& out, const Frames& rest, Element element, int64_t channels,
               const float* gate, int64_t first, int64_t last);
};

const ProductKernel& product_scalar();
const ProductKernel& product_avx2();
const ProductKernel& product_avx512();
const ProductKernel& product_avx512bf16();

}  // namespace spkfast::cpu
