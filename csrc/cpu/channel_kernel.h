// What a unit of the passes over frames of channels offers to the engine: what lies between the
// products of a training step. Arrays of float32 have one value a channel; what is null is absent.
#pragma once

#include "product_kernel.h"

namespace spkfast::cpu {

struct Affine {
  Frames x;
  const float *scale, *shift;
  Frames added;     // or null
  Frames y, total;  // x * scale + shift, and that plus `added`; or null
};

struct AffineGradient {
  Frames grad_y, grad_total;  // or null
  Frames x;
  const float* scale;
  Frames grad_x;
  float *grad_scale, *grad_shift;
};

// Sums over frames of a gradient, and of that times the distance of y from its mean.
struct NormSums {
  Frames grad_y, grad_total;  // or null
  Frames y;
  const float* mean;
  float *sums, *products;
};

struct ReluGradient {
  Frames grad_y, grad_total;  // or null
  const float* scale;         // of these; or null
  // Gradients of the moments, to which each frame adds its share; or all null.
  const float *grad_mean, *grad_var, *mean;
  float share;
  Frames y;
  Frames grad;
  float* grad_bias;
};

// Each takes the channels [first, last) of a row of so many frames.
struct ChannelKernel {
  void (*affine)(const Affine& row, Element element, int64_t frames, int64_t first, int64_t last);
  void (*affine_gradient)(const AffineGradient& row, Element element, int64_t frames, int64_t first,
                          int64_t last);
  void (*norm_sums)(const NormSums& row, Element element, int64_t frames, int64_t first,
                    int64_t last);
  void (*relu_gradient)(const ReluGradient& row, Element element, int64_t frames, int64_t first,
                        int64_t last);
};

const ChannelKernel& channel_scalar();
const ChannelKernel& channel_avx2();
const ChannelKernel& channel_avx512();
const ChannelKernel& channel_avx512bf16();

}  // namespace spkfast::cpu
