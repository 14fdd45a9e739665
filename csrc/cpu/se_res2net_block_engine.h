// SE-Res2Net block of a batch on the CPU, over raw pointers: free of torch.
#pragma once

#include <vector>

#include "product_engine.h"

namespace spkfast::cpu {

// What is read at a row's ends lies at the ends of its `padded` frames; the squeeze-and-excitation
// takes its mean over `excited` frames.
struct SERes2NetBlock {
  Element element;  // of input and output
  Layer in, out;
  std::vector<Layer> res;
  Layer squeeze, excite;  // of float32
  const Layer* shortcut;  // or null: the input itself
  int64_t width, dilation;
  bool reflect, first_passes;
  Batch x, y;
};
void run_se_res2net_block(const SERes2NetBlock& block, const RealFrames& padded,
                          const RealFrames& excited, Level level, int64_t threads,
                          const ParallelFor& parallel_for);

}  // namespace spkfast::cpu
