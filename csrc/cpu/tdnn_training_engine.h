// A training step's passes over a batch on the CPU, over raw pointers: free of torch.
#pragma once

#include "channel_kernel.h"
#include "product_engine.h"

namespace spkfast::cpu {

const ChannelKernel& channel_kernel(Level level);

// The sizes of a batch, each of whose rows has the same frames.
struct BatchSize {
  int64_t rows, channels, frames;
};

// Calls body(row, first, last) for all rows and parts of their channels, on several threads.
void each_row(const BatchSize& size, int64_t threads, const ParallelFor& parallel_for,
              const std::function<void(int64_t row, int64_t first, int64_t last)>& body);

// Where in an array of one value a channel, of all rows together or of each, a row's begins.
struct Vectors {
  const float* data;
  int64_t row_stride;

  const float* row(int64_t b) const { return data + b * row_stride; }
};

}  // namespace spkfast::cpu
