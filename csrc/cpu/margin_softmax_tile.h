// The passes of margin_softmax_loss over vectors of one instruction set, whose header the including
// unit names before.
#pragma once

#include "margin_softmax_kernel.h"
#include "simd/each.h"

namespace {

using spkfast::cpu::kBlockRows;
using spkfast::cpu::kLanes;
using spkfast::cpu::MarginBlock;
using spkfast::cpu::MarginSlopes;
using spkfast::cpu::MarginState;
using spkfast::cpu::MarginSum;
using spkfast::cpu::Summed;

static_assert(kLanes % W == 0);
constexpr float kInfinity = __builtin_inff();

[[gnu::always_inline]] inline bool any(I comparison) {
  using Small [[gnu::vector_size(W)]] = int8_t;
  const Small bytes = __builtin_convertvector(comparison, Small);
  uint64_t words[2] = {};
  __builtin_memcpy(words, &bytes, W);
  return (words[0] | words[1]) != 0;
}

[[gnu::always_inline]] inline V magnitude(V v) { return larger(v, -v); }

// log(1 + x) of x from 0 to 1: twice the area tangent of x / (2 + x), as a series.
[[gnu::always_inline]] inline V logarithm_1p(V x) {
  const V s = x / (x + 2.0F), q = s * s;
  V y = madd(q, all(2.0F / 15), all(2.0F / 13));
  y = madd(y, q, all(2.0F / 11));
  y = madd(y, q, all(2.0F / 9));
  y = madd(y, q, all(2.0F / 7));
  y = madd(y, q, all(2.0F / 5));
  y = madd(y, q, all(2.0F / 3));
  return madd(y * q, s, s + s);
}

[[gnu::always_inline]] inline V power_of(V v, int64_t power) {
  V out = all(1.0F);
  for (; power; power >>= 1, v = v * v) {
    if (power & 1) out = out * v;
  }
  return out;
}

struct Logit {
  V value, slope;
};
// What a binary classifier makes of the cosine of a class that is not the target, and the
// derivative.
template <Summed kSummed>
[[gnu::always_inline]] inline Logit logit_of(V cosine, const MarginSum& sum) {
  V inner = cosine, slope = all(1.0F), outer = {};
  if constexpr (kSummed == Summed::binary_a) {
    // So near to 1 the cosine's rounding decides the derivative of the sine, as large as it is
    // there.
    constexpr float kUnknown = 0x1p-22F;
    const V square = nmadd(cosine, cosine, all(1.0F));
    const V sine = root(larger(square, all(1e-12F)));
    inner = madd(sine, all(sum.sine), cosine * sum.cosine);
    slope = square < kUnknown ? V{} : cosine / sine;
    slope = nmadd(slope, all(sum.sine), all(sum.cosine));
  } else {
    outer = all(sum.margin);
  }
  const V half = madd(inner, all(0.5F), all(0.5F)), power = power_of(half, sum.power - 1);
  const V curve = madd(half * power, all(2.0F), all(-1.0F));
  return {madd(curve + outer, all(sum.scale), all(sum.bias)),
          slope * power * (sum.scale * static_cast<float>(sum.power))};
}

// Asks for memory that is needed next, a part in each of some steps: it comes while others compute.
class Ahead {
 public:
  Ahead(const MarginBlock& block, int64_t steps)
      : next_(block.next),
        left_(block.next_bytes),
        // A batch without rows has no steps.
        part_(steps ? (left_ / steps + kLine) / kLine * kLine : 0) {}
  [[gnu::always_inline]] void fetch() {
    const char* end = next_ + smaller(part_, left_);
    left_ -= smaller(part_, left_);
    for (; next_ < end; next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  int64_t left_, part_;
};

struct Column {
  const MarginBlock& block;
  int64_t lane;

  [[gnu::always_inline]] float* at(int64_t row) const {
    return block.products + row * block.stride + lane;
  }
  [[gnu::always_inline]] V cosine(int64_t row) const { return load(at(row)) * block.factors[row]; }
  // The largest cosine of a class, without its bias.
  template <bool kSingle>
  [[gnu::always_inline]] V largest_cosine(int64_t n) const {
    if constexpr (kSingle) return cosine(n);
    const int64_t row = n * block.subcenters;
    V found = cosine(row);
    for (int64_t k = 1; k < block.subcenters; ++k) found = larger(cosine(row + k), found);
    return found;
  }
};

// Class n enters the hardest ones of those lanes where it is larger than the last of them, which
// comes back in its place. Among equal ones it is the last.
[[gnu::noinline]] inline V exchange(const Column& column, const MarginState& state, int64_t n,
                                    V cosine) {
  const MarginBlock& block = column.block;
  const int64_t first = n * block.subcenters;
  I row = I{} + static_cast<int32_t>(block.first_row + first);
  V best = column.cosine(first);
  for (int64_t k = 1; k < block.subcenters; ++k) {
    const V other = column.cosine(first + k);
    row = other > best ? I{} + static_cast<int32_t>(block.first_row + first + k) : row;
    best = larger(other, best);
  }
  I enters = {};
  for (int64_t i = 0; i < state.topk; ++i) {
    float* values = state.values + i * block.lanes + column.lane;
    int32_t* rows = state.rows + i * block.lanes + column.lane;
    const V value = load(values);
    I value_row;
    __builtin_memcpy(&value_row, rows, sizeof(I));
    // What has been driven from its place goes to the next one.
    enters |= cosine > value;
    const I moved = enters ? row : value_row;
    __builtin_memcpy(rows, &moved, sizeof(I));
    store(values, enters ? cosine : value);
    row = enters ? value_row : row;
    cosine = enters ? value : cosine;
  }
  return cosine;
}

template <Summed kSummed, bool kSingle>
void add_as(const MarginBlock& block, const MarginSum& form, const MarginState& state) {
  alignas(64) float cosines[kBlockRows * W];
  alignas(64) float partial[3][W];
  Ahead ahead(block, block.lanes / W * block.classes);
  for (int64_t lane = 0; lane < block.lanes; lane += W) {
    const Column column = {block, lane};
    const float* last = state.topk ? state.values + (state.topk - 1) * block.lanes + lane : nullptr;
    V least = last ? load(last) : V{};
    const V before = load(state.highest + lane);
    V highest = before;
    for (int64_t n = 0; n < block.classes; ++n) {
      V cosine = column.template largest_cosine<kSingle>(n);
      if (block.bias) cosine = cosine + block.bias[n];
      if (last && any(cosine > least)) [[unlikely]] {
        cosine = exchange(column, state, n, cosine);
        least = load(last);
      }
      store(cosines + n * W, cosine);
      highest = larger(cosine, highest);
    }
    V sum = {}, total = {}, factor = all(1.0F);
    for (int64_t n = 0; n < block.classes; ++n) {
      ahead.fetch();
      const V cosine = load(cosines + n * W);
      const I left_out = cosine == -kInfinity;
      if constexpr (kSummed == Summed::log_sum) {
        sum = sum + exponential((cosine - highest) * form.scale);
        total = total + (left_out ? V{} : cosine);
      } else {
        const V logit = logit_of<kSummed>(cosine, form).value;
        const V loss = larger(V{}, logit) + logarithm_1p(exponential(-magnitude(logit)));
        sum = sum + (left_out ? V{} : loss);
      }
    }
    if constexpr (kSummed == Summed::log_sum) factor = exponential((before - highest) * form.scale);
    store(state.highest + lane, highest);
    store(partial[0], sum);
    store(partial[1], total);
    store(partial[2], factor);
    for (int64_t w = 0; w < W; ++w) {
      double& so_far = state.sum[lane + w];
      so_far = so_far * static_cast<double>(partial[2][w]) + static_cast<double>(partial[0][w]);
      state.total[lane + w] += static_cast<double>(partial[1][w]);
    }
  }
}

template <Summed kSummed, bool kSingle>
void gradients_as(const MarginBlock& block, const MarginSum& form, const MarginSlopes& slopes) {
  Ahead ahead(block, block.lanes / W * block.classes);
  for (int64_t lane = 0; lane < block.lanes; lane += W) {
    const Column column = {block, lane};
    const V sums = load(slopes.sums + lane), of_sums = load(slopes.of_sums + lane);
    const V of_total = load(slopes.of_total + lane);
    V of_bias = {};
    for (int64_t n = 0; n < block.classes; ++n) {
      ahead.fetch();
      const V largest = column.template largest_cosine<kSingle>(n);
      const V cosine = block.bias ? largest + block.bias[n] : largest;
      const I left_out = cosine == -kInfinity;
      V grad;
      if constexpr (kSummed == Summed::log_sum) {
        grad = madd(of_sums, exponential(madd(cosine, all(form.scale), -sums)), of_total);
        grad = left_out ? V{} : grad;
        if (slopes.of_class_bias) {
          float* p = slopes.of_class_bias + n * kLanes;
          store(p, load(p) + grad);
        }
      } else {
        const Logit logit = logit_of<kSummed>(cosine, form);
        const V e = exponential(-magnitude(logit.value));
        const V sigmoid = (logit.value < 0.0F ? e : all(1.0F)) / (1.0F + e);
        grad = left_out ? V{} : of_sums * sigmoid;
        of_bias = of_bias + grad;
        grad = left_out ? V{} : grad * logit.slope;
      }
      if constexpr (kSingle) {
        store(column.at(n), grad * block.factors[n]);
      } else {
        I found = {};
        for (int64_t k = 0; k < block.subcenters; ++k) {
          const int64_t row = n * block.subcenters + k;
          const I chosen = (column.cosine(row) == largest) & ~found;
          store(column.at(row), chosen ? grad * block.factors[row] : V{});
          found |= chosen;
        }
      }
    }
    alignas(64) float partial[W];
    store(partial, of_bias);
    for (int64_t w = 0; w < W; ++w) slopes.of_bias[lane + w] += static_cast<double>(partial[w]);
  }
}

template <Summed kSummed>
struct SummedIs {
  static constexpr Summed value = kSummed;
};
// Calls f with what is summed as a type, and whether a class has one row.
template <typename F>
[[gnu::always_inline]] inline void by_form(Summed summed, int64_t subcenters, F&& f) {
  const auto of = [&](auto is) {
    if (subcenters == 1) return f(is, Constant<1>{});
    f(is, Constant<0>{});
  };
  switch (summed) {
    case Summed::log_sum:
      return of(SummedIs<Summed::log_sum>{});
    case Summed::binary_c:
      return of(SummedIs<Summed::binary_c>{});
    case Summed::binary_a:
      return of(SummedIs<Summed::binary_a>{});
  }
}

void add(const MarginBlock& block, const MarginSum& sum, const MarginState& state) {
  by_form(sum.summed, block.subcenters,
          [&](auto is, auto single) { add_as<decltype(is)::value, single>(block, sum, state); });
}

void gradients(const MarginBlock& block, const MarginSum& sum, const MarginSlopes& slopes) {
  by_form(sum.summed, block.subcenters, [&](auto is, auto single) {
    gradients_as<decltype(is)::value, single>(block, sum, slopes);
  });
}

void inverse_lengths(const float* rows, int64_t features, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, rows += features) {
    V squares = {};
    extent_of(features).each([&](int64_t v, auto width) __attribute__((always_inline)) {
      const V value = width.read(rows + v * W, V{});
      squares = madd(value, value, squares);
    });
    const float length = root(all(sum(squares)))[0];
    out[i] = length < 1e-12F ? 0.0F : 1.0F / length;
  }
}

void project(const float* grads, const float* rows, const float* inverse_lengths, int64_t features,
             int64_t count, float* out) {
  const Extent extent = extent_of(features);
  const bool streams =
      kStreams && reinterpret_cast<uintptr_t>(out) % (W * sizeof(float)) == 0 && extent.rest == 0;
  for (int64_t i = 0; i < count; ++i, grads += features, rows += features, out += features) {
    V product = {};
    extent.each([&](int64_t v, auto width) __attribute__((always_inline)) {
      product = madd(width.read(grads + v * W, V{}), width.read(rows + v * W, V{}), product);
    });
    const V share = all(sum(product) * inverse_lengths[i] * inverse_lengths[i]);
    extent.each([&](int64_t v, auto width) __attribute__((always_inline)) {
      const V value = nmadd(share, width.read(rows + v * W, V{}), width.read(grads + v * W, V{}));
      if (streams) {
        stream(out + v * W, value);
      } else {
        width.write(out + v * W, value);
      }
    });
  }
  if (streams) end_stream();
}

}  // namespace
