// What a unit of the gradient of a weight offers to its engine. The gradient is a product over
// time: its frames are the channels of the convolution's input, turned into rows of time, of which
// a tap takes a part; its weight is the gradient of the output, whose steps are frames.
#pragma once

#include <cstdint>

#include "product_kernel.h"

namespace spkfast::cpu {

// Frames in a step: what one word of an operand holds.
inline int64_t step_frames(Operand operand) { return step_channels(operand); }

struct WeightGradientKernel {
  // Values of `channels` channels in the frames from source.shift on, read as `form` says, whose
  // operand they become: channel c's at to.data + c * to.stride, frame after frame, source.steps
  // words.
  void (*turn)(const Product& form, const Source& source, int64_t channels, const Frames& to);
  // The same as panels of a packed weight, to.stride bytes apart.
  void (*pack)(const Product& form, const Source& source, int64_t channels, const Frames& to);
  // Sums of a panel for all frames of the product: kPanel numbers each at product.out, of which
  // those beyond product.channels may stay as they are. `add`: to what is there.
  void (*run)(const Product& product, bool add);
  // The sum of `count` arrays that are `stride` numbers apart, each `rows` times kPanel numbers:
  // number r of column c to out[c * out_stride + r] for rows [first, last).
  void (*finish)(const float* sums, int64_t count, int64_t stride, int64_t first, int64_t last,
                 int64_t columns, float* out, int64_t out_stride);
};

const WeightGradientKernel& weight_gradient_scalar();
const WeightGradientKernel& weight_gradient_avx2();
const WeightGradientKernel& weight_gradient_avx512();
const WeightGradientKernel& weight_gradient_avx512bf16();

}  // namespace spkfast::cpu
