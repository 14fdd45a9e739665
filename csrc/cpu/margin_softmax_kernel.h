// What a unit of margin_softmax_loss offers to its engine: passes over the products of some classes
// with all rows of a batch. A vector holds rows of the batch.
#pragma once

#include <cstdint>

namespace spkfast::cpu {

// Rows of a batch are lanes, as many of them as the widest vector has, or a multiple.
constexpr int64_t kLanes = 16;
// Rows of the weight in a block, unless one class has more.
constexpr int64_t kBlockRows = 96;

enum class Summed { log_sum, binary_c, binary_a };

// What is made of a cosine before it is summed.
struct MarginSum {
  Summed summed;
  int64_t power;
  float scale, margin, cosine, sine;  // the last two are those of the margin
  float bias;                         // of binary logits
};

struct MarginBlock {
  // By row of the weight, `stride` numbers apart, then by lane. Minus infinity: left out.
  float* products;
  int64_t stride, lanes;
  int64_t classes, subcenters;
  int64_t first_row;
  const float* factors;  // from products to cosines, by row of the weight
  const float* bias;     // added to the cosines, by class; or null
  // Memory to ask for meanwhile.
  const char* next;
  int64_t next_bytes;
};

// What is known of the classes so far, by lane.
struct MarginState {
  float* highest;  // cosine of those that are summed
  double* sum;     // of exponentials, relative to that of the highest; or of binary losses
  double* total;   // of cosines
  // The hardest classes, which are not summed: (topk, lanes), hardest first.
  int64_t topk;
  float* values;
  int32_t* rows;  // of the weight
};

// Gradients of the sums, by lane, and what they add up to.
struct MarginSlopes {
  const float* sums;     // logarithms of sums
  const float* of_sums;  // of log_sum times the scale
  const float* of_total;
  double* of_bias;       // of binary logits
  float* of_class_bias;  // (classes, kLanes), to be added up; or null
};

struct MarginSoftmaxKernel {
  // 1 / length of `count` rows, 0 of one that is shorter than 1e-12.
  void (*inverse_lengths)(const float* rows, int64_t features, int64_t count, float* out);
  // Adds a block to what is known.
  void (*add)(const MarginBlock& block, const MarginSum& sum, const MarginState& state);
  // The gradients of products times factors, in place of the products.
  void (*gradients)(const MarginBlock& block, const MarginSum& sum, const MarginSlopes& slopes);
  // Gradients of `count` rows from those of rows of length 1, which have been divided by the
  // lengths; what is parallel to a row has no part in them.
  void (*project)(const float* grads, const float* rows, const float* inverse_lengths,
                  int64_t features, int64_t count, float* out);
};

const MarginSoftmaxKernel& margin_softmax_scalar();
const MarginSoftmaxKernel& margin_softmax_avx2();
const MarginSoftmaxKernel& margin_softmax_avx512();
const MarginSoftmaxKernel& margin_softmax_avx512bf16();

}  // namespace spkfast::cpu
