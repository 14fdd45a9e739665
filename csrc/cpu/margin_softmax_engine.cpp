#include "margin_softmax_engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "product_engine.h"
#include "weight_gradient_kernel.h"

namespace spkfast::cpu {
namespace {

// Parts of the classes that have sums of their own, and how many rows of the weight are worth one.
constexpr int64_t kParts = 16, kPartRows = 512;
// Rows of a tile of the widest kernel.
constexpr int64_t kTileRows = 6;
// Rows of a batch that are worth a second thread when parts are merged.
constexpr int64_t kMergedRows = 16;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Kernels {
  const ProductKernel& product;
  const WeightGradientKernel& over_rows;
  const MarginSoftmaxKernel& margin;
};
Kernels kernels_of(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512bf16)
    return {product_avx512bf16(), weight_gradient_avx512bf16(), margin_softmax_avx512bf16()};
  if (level == Level::avx512)
    return {product_avx512(), weight_gradient_avx512(), margin_softmax_avx512()};
  if (level == Level::avx2) return {product_avx2(), weight_gradient_avx2(), margin_softmax_avx2()};
#else
  (void)level;
#endif
  return {product_scalar(), weight_gradient_scalar(), margin_softmax_scalar()};
}

int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }

template <typename T>
T* array_of(Buffer& buffer, int64_t size) {
  return reinterpret_cast<T*>(buffer.of(size * sizeof(T)));
}
template <typename T>
T* filled(Buffer& buffer, int64_t size, T value) {
  T* array = array_of<T>(buffer, size);
  std::fill(array, array + size, value);
  return array;
}
char* bytes(const float* p) { return reinterpret_cast<char*>(const_cast<float*>(p)); }

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
};

// A class, and a row of the batch for which it is no ordinary one.
using Exception = std::pair<int64_t, int64_t>;

// The classes of a call in blocks, and these in parts.
class Classes {
 public:
  explicit Classes(const MarginSoftmax& call) : classes_(call.classes) {
    in_block_ = std::max(kBlockRows / call.subcenters, int64_t{1});
    // Whole tiles, where blocks are not much smaller then.
    for (int64_t n = in_block_; n > 0 && n > in_block_ - kTileRows; --n) {
      if (n * call.subcenters % kTileRows) continue;
      in_block_ = n;
      break;
    }
    blocks_ = parts_of(classes_, in_block_);
    parts_ = std::min({kParts, blocks_, parts_of(classes_ * call.subcenters, kPartRows)});
  }
  int64_t parts() const { return parts_; }
  int64_t in_block() const { return in_block_; }
  Range part(int64_t i) const {
    return {std::min(classes_, blocks_ * i / parts_ * in_block_),
            std::min(classes_, blocks_ * (i + 1) / parts_ * in_block_)};
  }
  // Calls body(block, classes after it in the part), one after the other.
  template <typename Body>
  void each_block(Range part, Body body) const {
    for (int64_t n = part.first; n < part.last; n += in_block_) {
      const int64_t end = std::min(part.last, n + in_block_);
      body(Range{n, end}, Range{end, std::min(part.last, end + in_block_)});
    }
  }

 private:
  int64_t classes_, in_block_, blocks_, parts_;
};

// Products of blocks of classes with all rows of the batch.
class Products {
 public:
  // What a thread needs.
  struct Memory {
    Buffer products, operands, inverse, factors;
  };

  Products(const MarginSoftmax& call, const Kernels& kernels, const ParallelFor& parallel_for)
      : call_(call), kernel_(kernels.product), margin_(kernels.margin) {
    thread_local struct {
      Buffer packed, zeros;
    } memory;
    lanes_ = parts_of(call.batch, kLanes) * kLanes;
    const Weight form = {call.operand, call.batch, 1, {call.features}};
    packed_ = memory.packed.of(form.packed_bytes());
    pack(form, call.x, {call.features, 1, 0}, packed_, parallel_for);
    zeros_ = filled(memory.zeros, std::max(lanes_, call.features), 0.0F);
  }
  int64_t lanes() const { return lanes_; }
  const float* zeros() const { return zeros_; }  // for all rows of the batch, or features
  int64_t row_bytes() const { return call_.features * static_cast<int64_t>(sizeof(float)); }
  const float* row(int64_t n) const { return call_.weight + n * call_.subcenters * call_.features; }

  // Of a block, for which those after it are asked for; and 1 / length of its rows, 0 of what is
  // not scaled or has no direction.
  struct Block {
    MarginBlock products;
    const float* inverse;
  };
  Block make(Range classes, Range next, Memory& memory) const {
    const int64_t rows = classes.size() * call_.subcenters;
    // Rows of one vector of the batch would else share a few places of the first cache.
    const int64_t stride = lanes_ + kLanes;
    float* products = array_of<float>(memory.products, rows * stride);
    float* inverse = filled(memory.inverse, rows, 0.0F);
    float* factors = filled(memory.factors, rows, 1.0F);
    const float* weight = row(classes.first);
    if (call_.normalise) {
      margin_.inverse_lengths(weight, call_.features, rows, inverse);
      for (int64_t i = 0; i < rows; ++i) factors[i] = inverse[i] == 0.0F ? 1.0F : inverse[i];
    }
    const Source source = operands({bytes(weight), row_bytes()}, call_.features, rows, memory);
    multiply(source, rows, packed_, lanes_, {bytes(products), stride * kBytes});
    const MarginBlock block = {.products = products,
                               .stride = stride,
                               .lanes = lanes_,
                               .classes = classes.size(),
                               .subcenters = call_.subcenters,
                               .first_row = classes.first * call_.subcenters,
                               .factors = factors,
                               .bias = call_.bias ? call_.bias + classes.first : nullptr,
                               .next = bytes(row(next.first)),
                               .next_bytes = next.size() * call_.subcenters * row_bytes()};
    clear_short(block, inverse);
    return {block, inverse};
  }
  // Rows that have no direction have cosines and gradients of 0.
  void clear_short(const MarginBlock& block, const float* inverse) const {
    if (!call_.normalise) return;
    for (int64_t i = 0; i < block.classes * block.subcenters; ++i) {
      if (inverse[i] == 0.0F) std::fill_n(block.products + i * block.stride, block.lanes, 0.0F);
    }
  }
  // The cosine of a class without bias, and which of its rows has it.
  static std::pair<float, int64_t> largest(const MarginBlock& block, int64_t n, int64_t lane) {
    std::pair<float, int64_t> found = {-kInfinity, n * block.subcenters};
    for (int64_t row = n * block.subcenters; row < (n + 1) * block.subcenters; ++row) {
      const float cosine = block.products[row * block.stride + lane] * block.factors[row];
      if (cosine > found.first) found = {cosine, row};
    }
    return found;
  }
  static void leave_out(const MarginBlock& block, int64_t n, int64_t lane) {
    for (int64_t row = n * block.subcenters; row < (n + 1) * block.subcenters; ++row)
      block.products[row * block.stride + lane] = -kInfinity;
  }

  // Values as operands, in memory of their own where they are not.
  Source operands(Frames values, int64_t channels, int64_t rows, Memory& memory) const {
    const int64_t steps = steps_of(call_.operand, channels);
    if (is_operand(Element::float32, call_.operand, channels))
      return {values.data, values.stride, steps, 0};
    const int64_t size = steps * kStepBytes;
    const Frames to = {memory.operands.of(rows * size), size};
    kernel_.convert(values, Element::float32, channels, to, call_.operand, {}, 0, rows);
    return {to.data, to.stride, steps, 0};
  }
  void multiply(const Source& source, int64_t rows, const char* weight, int64_t channels,
                Frames out) const {
    Product product = {};
    product.operand = call_.operand;
    product.sources = &source;
    product.num_sources = 1;
    product.frames = rows;
    product.weight = weight;
    product.channels = channels;
    product.bias = zeros_;
    product.out = out;
    kernel_.run(product, 0, rows, 0, panels_of(channels));
  }

  static constexpr int64_t kBytes = sizeof(float);

 private:
  const MarginSoftmax& call_;
  const ProductKernel& kernel_;
  const MarginSoftmaxKernel& margin_;
  char* packed_;
  const float* zeros_;
  int64_t lanes_;
};

// Calls body(exception) for those of a block; they are sorted.
template <typename Body>
void each_exception(const std::vector<Exception>& sorted, Range classes, Body body) {
  auto it = std::lower_bound(sorted.begin(), sorted.end(), Exception{classes.first, 0});
  for (; it != sorted.end() && it->first < classes.last; ++it) body(*it);
}

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// The loss of a binary classifier of a class that is not the target.
double binary_loss(const MarginSum& sum, double cosine) {
  double outer = 0;
  if (sum.summed == Summed::binary_c) {
    outer = sum.margin;
  } else {
    const double sine = std::sqrt(std::max(1 - cosine * cosine, 1e-12));
    cosine = cosine * sum.cosine + sine * sum.sine;
  }
  const double curve = 2 * std::pow((cosine + 1) / 2, sum.power) - 1;
  return softplus(sum.scale * (curve + outer) + sum.bias);
}

// What parts know.
struct States {
  int64_t parts, lanes, topk;
  float* highest;
  double *sum, *total;
  float* values;
  int32_t* rows;

  MarginState of(int64_t part) const {
    return {highest + part * lanes,       sum + part * lanes,        total + part * lanes, topk,
            values + part * topk * lanes, rows + part * topk * lanes};
  }
};

struct Candidate {
  float value;
  int64_t row;
};

// The outputs for row b of the batch.
void merge(const MarginSoftmax& call, const States& states, int64_t b, const MarginSoftmaxSums& out,
           std::vector<Candidate>& candidates) {
  candidates.clear();
  double highest = kLowest;
  for (int64_t part = 0; part < states.parts; ++part) {
    const MarginState state = states.of(part);
    highest = std::max(highest, static_cast<double>(state.highest[b]));
    for (int64_t i = 0; i < call.topk; ++i) {
      const int64_t at = i * states.lanes + b;
      if (state.rows[at] >= 0) candidates.push_back({state.values[at], state.rows[at]});
    }
  }
  // Of equal ones the first class wins.
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.value > b.value; });
  const int64_t found = static_cast<int64_t>(candidates.size());
  const int64_t taken = std::min(call.topk, found);
  const bool logarithm = call.sum.summed == Summed::log_sum;
  // The parts left these out; together they do not.
  if (taken < found) highest = std::max(highest, static_cast<double>(candidates[taken].value));
  double sum = 0, total = 0;
  for (int64_t part = 0; part < states.parts; ++part) {
    const MarginState state = states.of(part);
    const double below = state.highest[b] - highest;
    sum += state.sum[b] * (logarithm ? std::exp(below * call.sum.scale) : 1);
    total += state.total[b];
  }
  for (int64_t i = taken; i < found; ++i) {
    const double cosine = candidates[i].value;
    sum +=
        logarithm ? std::exp((cosine - highest) * call.sum.scale) : binary_loss(call.sum, cosine);
    if (logarithm) total += cosine;
  }
  out.sums[b] = static_cast<float>(logarithm ? std::log(sum) + highest * call.sum.scale : sum);
  out.total[b] = static_cast<float>(total);
  out.best[b] = taken                ? candidates[0].value
                : highest == kLowest ? -kInfinity
                                     : static_cast<float>(highest);
  int64_t* rows = out.rows + b * (1 + call.topk);
  for (int64_t i = 0; i < call.topk; ++i) rows[1 + i] = i < taken ? candidates[i].row : -1;
  for (int64_t i = 0; i <= call.topk; ++i) {
    float* chosen = out.chosen + (b * (1 + call.topk) + i) * call.features;
    if (rows[i] < 0) {
      std::fill_n(chosen, call.features, 0.0F);
    } else {
      std::copy_n(call.weight + rows[i] * call.features, call.features, chosen);
    }
  }
}

}  // namespace

void run_margin_softmax(const MarginSoftmax& call, const int64_t* target,
                        const MarginSoftmaxSums& out, Level level,
                        const ParallelFor& parallel_for) {
  thread_local struct {
    Buffer highest, sum, total, values, rows;
  } memory;
  const Kernels kernels = kernels_of(level);
  const Classes classes(call);
  const Products products(call, kernels, parallel_for);
  std::vector<Exception> targets;
  for (int64_t b = 0; b < call.batch; ++b) {
    out.own[b] = -kInfinity;
    out.rows[b * (1 + call.topk)] = -1;
    if (target[b] >= 0 && target[b] < call.classes) targets.push_back({target[b], b});
  }
  std::sort(targets.begin(), targets.end());

  const int64_t parts = classes.parts(), lanes = products.lanes(), each = parts * lanes;
  const States states = {.parts = parts,
                         .lanes = lanes,
                         .topk = call.topk,
                         .highest = filled(memory.highest, each, kLowest),
                         .sum = filled(memory.sum, each, 0.0),
                         .total = filled(memory.total, each, 0.0),
                         .values = filled(memory.values, each * call.topk, -kInfinity),
                         .rows = filled(memory.rows, each * call.topk, int32_t{-1})};
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    thread_local Products::Memory memory;
    for (int64_t part = begin; part < end; ++part) {
      classes.each_block(classes.part(part), [&](Range here, Range next) {
        const MarginBlock block = products.make(here, next, memory).products;
        each_exception(targets, here, [&](Exception exception) {
          const auto [n, b] = exception;
          const auto [cosine, row] = Products::largest(block, n - here.first, b);
          out.own[b] = call.bias ? cosine + call.bias[n] : cosine;
          out.rows[b * (1 + call.topk)] = block.first_row + row;
          Products::leave_out(block, n - here.first, b);
        });
        kernels.margin.add(block, call.sum, states.of(part));
      });
    }
  });
  parallel_for(0, call.batch, kMergedRows, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t b = begin; b < end; ++b) merge(call, states, b, out, candidates);
  });
}

void run_margin_softmax_backward(const MarginSoftmax& call, const MarginSoftmaxGradients& gradients,
                                 Level level, const ParallelFor& parallel_for) {
  thread_local struct {
    Buffer packed, slopes, of_bias, of_x;
  } memory;
  const Kernels kernels = kernels_of(level);
  const Classes classes(call);
  const Products products(call, kernels, parallel_for);
  const int64_t parts = classes.parts(), lanes = products.lanes(), chosen = 1 + call.topk;
  const bool logarithm = call.sum.summed == Summed::log_sum;

  std::vector<Exception> exceptions, all_chosen;  // by class, and by row of the weight
  for (int64_t i = 0; i < call.batch * chosen; ++i) {
    if (gradients.rows[i] < 0) continue;
    exceptions.push_back({gradients.rows[i] / call.subcenters, i / chosen});
    all_chosen.push_back({gradients.rows[i], i});
  }
  std::sort(exceptions.begin(), exceptions.end());
  std::sort(all_chosen.begin(), all_chosen.end());

  float* slopes = filled(memory.slopes, 3 * lanes, 0.0F);
  // An infinite sum is that of lanes without a row, and of rows without ordinary classes.
  std::fill_n(slopes, lanes, kInfinity);
  for (int64_t b = 0; b < call.batch; ++b) {
    if (!logarithm || gradients.sums[b] != -kInfinity) slopes[b] = gradients.sums[b];
    slopes[lanes + b] = gradients.of_sums[b] * (logarithm ? call.sum.scale : 1.0F);
    slopes[2 * lanes + b] = gradients.of_total[b];
  }
  double* of_bias = filled(memory.of_bias, parts * lanes, 0.0);

  // The batch for the product that gives the gradient of the weight.
  const Weight form = {call.operand, call.features, 1, {call.batch}};
  char* packed = memory.packed.of(form.packed_bytes());
  pack(form, call.x, {1, call.features, 0}, packed, parallel_for);
  const int64_t panels = panels_of(call.batch), panel_size = call.features * kPanel;
  float* of_x = filled(memory.of_x, parts * panels * panel_size, 0.0F);

  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    thread_local struct {
      Products::Memory products;
      Buffer of_rows, of_classes, left, right;
    } memory;
    for (int64_t part = begin; part < end; ++part) {
      const Range all = classes.part(part);
      classes.each_block(all, [&](Range here, Range next) {
        const auto [block, inverse] = products.make(here, next, memory.products);
        each_exception(exceptions, here, [&](Exception exception) {
          Products::leave_out(block, exception.first - here.first, exception.second);
        });
        const bool by_class = logarithm && gradients.of_bias;
        float* of_classes =
            by_class ? filled(memory.of_classes, here.size() * kLanes, 0.0F) : nullptr;
        kernels.margin.gradients(block, call.sum,
                                 {.sums = slopes,
                                  .of_sums = slopes + lanes,
                                  .of_total = slopes + 2 * lanes,
                                  .of_bias = of_bias + part * lanes,
                                  .of_class_bias = of_classes});
        for (int64_t n = 0; by_class && n < here.size(); ++n) {
          float sum = 0;
          for (int64_t lane = 0; lane < kLanes; ++lane) sum += of_classes[n * kLanes + lane];
          gradients.of_bias[here.first + n] = sum;
        }
        const int64_t rows = block.classes * block.subcenters;
        products.clear_short(block, inverse);

        const Frames grads = {bytes(block.products), block.stride * Products::kBytes};
        const Frames weight = {bytes(products.row(here.first)), products.row_bytes()};
        float* of_rows = array_of<float>(memory.of_rows, rows * call.features);
        products.multiply(products.operands(grads, call.batch, rows, memory.products), rows, packed,
                          call.features, {bytes(of_rows), products.row_bytes()});
        kernels.margin.project(of_rows, products.row(here.first), inverse, call.features, rows,
                               gradients.of_weight + block.first_row * call.features);

        // Sums over rows of the weight: these are frames here.
        const int64_t steps = steps_of(call.operand, rows), turned = steps * kStepBytes;
        Product over_rows = {};
        over_rows.operand = call.operand;
        over_rows.frames = rows;
        over_rows.beyond = bytes(products.zeros());
        char* right = memory.right.of(panels * kPanel * turned);
        char* left = memory.left.of(call.features * turned);
        kernels.over_rows.pack(over_rows, {grads.data, grads.stride, steps, 0}, call.batch,
                               {right, kPanel * turned});
        kernels.over_rows.turn(over_rows, {weight.data, weight.stride, steps, 0}, call.features,
                               {left, turned});
        const Source source = {left, turned, steps, 0};
        over_rows.sources = &source;
        over_rows.num_sources = 1;
        over_rows.frames = call.features;
        for (int64_t panel = 0; panel < panels; ++panel) {
          over_rows.weight = right + panel * kPanel * turned;
          over_rows.channels = std::min(kPanel, call.batch - panel * kPanel);
          over_rows.out = {bytes(of_x + (part * panels + panel) * panel_size),
                           kPanel * Products::kBytes};
          kernels.over_rows.run(over_rows, true);
        }
      });
      each_exception(all_chosen, {all.first * call.subcenters, all.last * call.subcenters},
                     [&](Exception exception) {
                       const auto [row, i] = exception;
                       float* to = gradients.of_weight + row * call.features;
                       const float* from = gradients.of_chosen + i * call.features;
                       for (int64_t e = 0; e < call.features; ++e) to[e] += from[e];
                     });
    }
  });
  parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel;
      kernels.over_rows.finish(of_x + panel * panel_size, parts, panels * panel_size, 0,
                               call.features, std::min(kPanel, call.batch - first),
                               gradients.of_x + first * call.features, call.features);
    }
  });
  if (logarithm || gradients.of_bias == nullptr) return;
  double sum = 0;
  for (int64_t i = 0; i < parts * lanes; ++i) sum += of_bias[i];
  gradients.of_bias[0] = static_cast<float>(sum);
}

}  // namespace spkfast::cpu
