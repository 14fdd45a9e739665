// Products of a batch on the CPU, over raw pointers: free of torch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu_level.h"
#include "parallel_for.h"
#include "product_kernel.h"

namespace spkfast::cpu {

const ProductKernel& product_kernel(Level level);

// A weight (channels, inputs, taps), whose inputs lie in several parts.
struct Weight {
  Operand operand;
  int64_t channels, taps;
  std::vector<int64_t> parts;  // inputs of each

  int64_t steps() const;
  int64_t packed_bytes() const { return panels_of(channels) * kPanel * kStepBytes * steps(); }
};
// Where the values of a weight lie: distances, in floats, of channels, inputs and taps.
struct Strides {
  int64_t channel, input, tap;
};
// Values for bytes are whole numbers already.
void pack(const Weight& weight, const float* values, const Strides& strides, char* packed,
          const ParallelFor& parallel_for);

// A product with what follows it: arrays of float32 by output channel, null where there is none.
struct Layer {
  Weight form;
  const char* weight;
  const float *unit, *bias, *scale, *shift;
  Quantiser quantiser;  // of what it reads
  bool relu, tanh;
};

// The real frames of a batch: the first ones of each row.
struct RealFrames {
  int64_t batch, frames;
  const int64_t* lengths;  // or null: all

  int64_t of(int64_t row) const {
    if (!lengths) return frames;
    return lengths[row] < 0 ? 0 : lengths[row] > frames ? frames : lengths[row];
  }
};

// Frames of the longest of rows [begin, end): what a buffer needs for each.
inline int64_t longest(const RealFrames& real, int64_t begin, int64_t end) {
  int64_t frames = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (real.of(row) > frames) frames = real.of(row);
  }
  return frames;
}

// Values of a batch, a frame's channels side by side. Strides in bytes.
struct Batch {
  char* data;
  int64_t row_stride, frame_stride;

  Frames row(int64_t b) const { return {data + b * row_stride, frame_stride}; }
};

// Memory that only grows, and whose content nobody relies on from call to call.
class Buffer {
 public:
  char* of(int64_t bytes);

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

int64_t value_bytes(Element element);
// Whether values are operands as they are.
bool is_operand(Element element, Operand operand, int64_t channels);

// Calls body(begin, end, parallel_for) for rows [begin, end) of a batch: each row on one thread
// where there are several for each, which then never wait for one another; else as many rows at a
// time as keep all threads busy and their frames in the caches.
void each_wave(const RealFrames& real, int64_t threads, const ParallelFor& parallel_for,
               const std::function<void(int64_t begin, int64_t end, const ParallelFor&)>& body);

// Calls body(row, first, last) for pieces of the real frames of rows [begin, end), on several
// threads. `work` is the number of multiplications of a frame.
void each_frames(const RealFrames& real, int64_t begin, int64_t end, int64_t work,
                 const ParallelFor& parallel_for,
                 const std::function<void(int64_t row, int64_t first, int64_t last)>& body);

// What a layer reads of one utterance: its taps in each of its parts.
std::vector<Source> sources_of(const Layer& layer, const std::vector<Frames>& parts,
                               int64_t dilation);

// Has a product read sources, which have to stay.
inline void read(Product& product, const std::vector<Source>& sources) {
  product.sources = sources.data();
  product.num_sources = static_cast<int64_t>(sources.size());
}

// The product of a layer for one utterance of `frames` frames, without sources and outputs.
Product product_of(const Layer& layer, Element element, int64_t frames, bool reflect,
                   const char* beyond);

// tdnn_layer: the outputs of all rows, 0 in the padding.
struct TdnnLayer {
  Layer layer;
  Element element;  // of the inputs
  Element out_element;
  std::vector<Batch> inputs;
  const float* offset;  // (batch, channels), added to the bias, or null
  int64_t dilation;
  bool reflect;
  Batch out;
  float *mean, *var;  // (batch, channels), of the outputs over the real frames of each row; or null
};
void run_tdnn_layer(const TdnnLayer& call, const RealFrames& real, Level level, int64_t threads,
                    const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
