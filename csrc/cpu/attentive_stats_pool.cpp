// CPU kernel of attentive_stats_pool: tensors checked, then handed to the engine as raw pointers.
#include "../attentive_stats_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "attentive_stats_pool_engine.h"
#include "attentive_stats_pool_tensors.h"

namespace spkfast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Gradients of this many bytes together are written past the caches: 1.1 to 1.3 times as fast on a
// machine with 2 MB of second and some of a shared third cache, and slower below.
constexpr uint64_t kStreamBytes = 32 << 20;

// Arguments that both passes have, in the layout of x.
struct Arguments {
  Tensor x;
  std::optional<Tensor> logits, lengths;
  bool shared;
  AttentiveStatsPoolBatch batch = {};

  Arguments(const Tensor& given_x, const std::optional<Tensor>& given_logits,
            const std::optional<Tensor>& given_lengths)
      : x(given_x), logits(given_logits), lengths(given_lengths) {
    check_shape("x", x, {-1, -1, -1});
    const Element element = element_of("x", x);
    const int64_t batch_size = x.size(0), channels = x.size(1), frames = x.size(2);
    if (logits) {
      check_dtype("logits", *logits, x.scalar_type());
      check_shape("logits", *logits, {batch_size, -1, frames});
      check(logits->size(1) == channels || logits->size(1) == 1, "logits must have 1 or ", channels,
            " channels, got ", logits->size(1));
    }
    shared = !logits || logits->size(1) == 1;
    x = readable(x);
    const bool last = channels_last(x);
    if (logits) logits = shared ? torch::stable::contiguous(*logits) : laid_out(*logits, last);
    lengths = checked_lengths("lengths", lengths, batch_size);
    batch.element = element;
    batch.channels_last = last;
    batch.batch = batch_size;
    batch.channels = channels;
    batch.frames = frames;
    batch.lengths = lengths ? lengths->const_data_ptr<int64_t>() : nullptr;
    batch.x = pool_tensor(x);
    batch.shared = shared;
    if (!shared) batch.logits = pool_tensor(*logits);
  }

  const void* shared_logits() const { return logits ? logits->const_data_ptr() : nullptr; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attentive_stats_pool(
    const Tensor& x, const std::optional<Tensor>& logits, const std::optional<Tensor>& lengths) {
  Arguments arguments(x, logits, lengths);
  AttentiveStatsPoolBatch& batch = arguments.batch;
  const auto empty = [&](int64_t channels) {
    return torch::stable::new_empty(x, {batch.batch, channels}, ScalarType::Float);
  };
  const int64_t of_logits = arguments.shared ? 1 : batch.channels;
  Tensor mean = empty(batch.channels), var = empty(batch.channels);
  Tensor highest = empty(of_logits), total = empty(of_logits);
  batch.mean = mean.mutable_data_ptr<float>();
  batch.var = var.mutable_data_ptr<float>();
  SharedLogits shared = {arguments.shared_logits(), highest.mutable_data_ptr<float>(),
                         total.mutable_data_ptr<float>()};
  if (!arguments.shared) {
    batch.highest = shared.highest;
    batch.total = shared.total;
  }
  run_attentive_stats_pool(batch, arguments.shared ? &shared : nullptr, level(), kParallelFor);
  return {mean, var, highest, total};
}

std::tuple<Tensor, Tensor> attentive_stats_pool_backward(
    const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x,
    const std::optional<Tensor>& logits, const std::optional<Tensor>& lengths, const Tensor& mean,
    const Tensor& var, const Tensor& highest, const Tensor& total) {
  Arguments arguments(x, logits, lengths);
  AttentiveStatsPoolBatch& batch = arguments.batch;
  const int64_t of_logits = arguments.shared ? 1 : batch.channels;
  const auto floats = [&](const char* name, const Tensor& tensor, int64_t channels) {
    check_dtype(name, tensor, ScalarType::Float);
    check_shape(name, tensor, {batch.batch, channels});
    return torch::stable::contiguous(tensor);
  };
  const Tensor of_mean = floats("grad_mean", grad_mean, batch.channels),
               of_var = floats("grad_var", grad_var, batch.channels),
               means = floats("mean", mean, batch.channels),
               vars = floats("var", var, batch.channels),
               tops = floats("highest", highest, of_logits),
               totals = floats("total", total, of_logits);
  Tensor grad_x = empty_gradient(x);
  // That of shared logits is (B, 1, T), side by side.
  Tensor grad_logits = !logits ? torch::stable::new_empty(x, {0})
                       : logits->size(1) == batch.channels
                           ? empty_gradient(x)
                           : torch::stable::new_empty(x, {batch.batch, 1, batch.frames});
  use_huge_pages(grad_x);
  use_huge_pages(grad_logits);
  const uint64_t gradients = (arguments.shared ? 1 : 2) * grad_x.numel();
  batch.stream = gradients * grad_x.element_size() >= kStreamBytes;
  batch.mean = means.mutable_data_ptr<float>();
  batch.var = vars.mutable_data_ptr<float>();
  batch.grad_mean = of_mean.const_data_ptr<float>();
  batch.grad_var = of_var.const_data_ptr<float>();
  batch.grad_x = pool_tensor(grad_x);
  SharedLogits shared = {arguments.shared_logits(), tops.mutable_data_ptr<float>(),
                         totals.mutable_data_ptr<float>()};
  if (!arguments.shared) {
    batch.highest = shared.highest;
    batch.total = shared.total;
    batch.grad_logits = pool_tensor(grad_logits);
  }
  run_attentive_stats_pool_backward(batch, arguments.shared ? &shared : nullptr,
                                    grad_logits.mutable_data_ptr(), level(), kParallelFor);
  return {grad_x, grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spkfast, CPU, m) {
  m.impl("attentive_stats_pool", TORCH_BOX(&attentive_stats_pool));
  m.impl("attentive_stats_pool_backward", TORCH_BOX(&attentive_stats_pool_backward));
}

}  // namespace spkfast::cpu
