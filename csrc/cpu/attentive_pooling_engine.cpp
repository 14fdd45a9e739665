#include "attentive_pooling_engine.h"

#include <algorithm>
#include <cmath>

namespace spkfast::cpu {
namespace {

float deviation_of(const DeviationForm& form, float var, int64_t frames) {
  if (form.unbiased)
    var *= static_cast<float>(frames) / static_cast<float>(std::max<int64_t>(frames - 1, 1));
  return std::sqrt(std::min(std::max(var + form.add, form.low), form.high)) + form.offset;
}

}  // namespace

// A few rows at a time: x is read from memory once, and then from the caches.
void run_attentive_pooling(const AttentivePooling& call, const RealFrames& real, Level level,
                           int64_t threads, const ParallelFor& parallel_for) {
  thread_local struct {
    Buffer x, hidden, ones, weight, deviations, offsets, highest;
  } memory;
  const ProductKernel& product = product_kernel(level);
  const AttentiveStatsPoolKernel& moments = attentive_stats_pool_kernel(level);
  const AttentiveStatsPoolFromHiddenKernel& pool = attentive_stats_pool_from_hidden_kernel(level);
  const int64_t channels = call.channels, frames = real.frames, value = value_bytes(call.element);
  const int64_t units = call.hidden.form.channels;
  const auto floats = [](Buffer& buffer, int64_t count) {
    return reinterpret_cast<float*>(buffer.of(count * static_cast<int64_t>(sizeof(float))));
  };

  AttentiveStatsPoolFromHiddenBatch from_hidden = {};
  from_hidden.pool.element = call.element;
  from_hidden.pool.channels_last = true;
  from_hidden.pool.channels = channels;
  from_hidden.pool.frames = frames;
  const int64_t groups = from_hidden.pool.groups(), padded = from_hidden.pool.padded_frames();
  from_hidden.units = units;
  from_hidden.weight = call.weight;
  from_hidden.weight_stride = units;
  from_hidden.bias = call.bias;
  const int64_t weight_floats = from_hidden.weight_floats();
  float* weight = floats(memory.weight, groups * weight_floats);
  parallel_for(0, groups, pool_grain(weight_floats), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      pool.pack_weight(from_hidden, group, weight + group * weight_floats);
  });

  each_wave(
      real, threads, parallel_for,
      [&](int64_t begin, int64_t end, const ParallelFor& parallel_for) {
        const int64_t rows = end - begin, frame_bytes = channels * value;
        const int64_t longest_row = longest(real, begin, end);
        Batch x = {call.x.data + begin * call.x.row_stride, call.x.row_stride, call.x.frame_stride};
        if (call.turned)
          x = {memory.x.of(rows * longest_row * frame_bytes), longest_row * frame_bytes,
               frame_bytes};
        // Of this thread: several may be here at once.
        AttentiveStatsPoolFromHiddenBatch own = from_hidden;
        AttentiveStatsPoolBatch& batch = own.pool;
        batch.batch = rows;
        batch.lengths = real.lengths ? real.lengths + begin : nullptr;
        batch.x = {x.data, x.row_stride / value, 1, x.frame_stride / value};
        batch.mean = call.mean + begin * channels;
        batch.var = call.var + begin * channels;
        batch.highest = floats(memory.highest, 2 * rows * channels);
        batch.total = batch.highest + rows * channels;
        AttentiveStatsPoolBatch plain = batch;
        plain.shared = true;
        float* ones = floats(memory.ones, rows * padded);
        for (int64_t b = 0; b < rows; ++b) {
          float* of_row = ones + b * padded;
          std::fill(std::fill_n(of_row, real.of(begin + b), 1.0F), of_row + padded, 0.0F);
        }
        plain.weights = ones;
        float* deviations = floats(memory.deviations, rows * channels);
        parallel_for(
            0, rows * groups, pool_grain(kPoolChannels * frames), [&](int64_t from, int64_t to) {
              for (int64_t i = from; i < to; ++i) {
                const int64_t b = i / groups, group = i % groups, count = real.of(begin + b);
                const int64_t first = group * kPoolChannels,
                              last = std::min(first + kPoolChannels, channels);
                if (call.turned)
                  product.turn(call.x.row(begin + b).data, call.channel_stride, call.element, count,
                               x.row(b), first, last);
                if (!call.context) continue;
                moments.forward(plain, b, group);
                for (int64_t c = b * channels + first; c < b * channels + last; ++c)
                  deviations[c] = deviation_of(call.deviation, batch.var[c], count);
              }
            });

        float* offsets = nullptr;
        if (call.context) {
          offsets = floats(memory.offsets, rows * units);
          const int64_t size = sizeof(float);
          const std::vector<Source> sources =
              sources_of(*call.context,
                         {{reinterpret_cast<char*>(batch.mean), channels * size},
                          {reinterpret_cast<char*>(deviations), channels * size}},
                         1);
          Product context = product_of(*call.context, Element::float32, rows, false, nullptr);
          read(context, sources);
          context.out = {reinterpret_cast<char*>(offsets), units * size};
          parallel_for(0, panels_of(units), 1,
                       [&](int64_t from, int64_t to) { product.run(context, 0, rows, from, to); });
        }

        const Batch hidden = {memory.hidden.of(rows * longest_row * units * value),
                              longest_row * units * value, units * value};
        const int64_t work = units * channels;
        each_frames(
            real, begin, end, work, parallel_for, [&](int64_t row, int64_t first, int64_t last) {
              const int64_t b = row - begin;
              const std::vector<Source> sources = sources_of(call.hidden, {x.row(b)}, 1);
              Product layer = product_of(call.hidden, call.element, real.of(row), false, nullptr);
              read(layer, sources);
              if (offsets) layer.bias = offsets + b * units;
              layer.out = hidden.row(b);
              product.run(layer, first, last, 0, panels_of(units));
            });

        own.hidden = hidden.data;
        own.hidden_batch_stride = longest_row * units;
        own.hidden_unit_stride = 1;
        own.hidden_frame_stride = units;
        parallel_for(0, rows * groups, pool_grain(kPoolChannels * frames * units),
                     [&](int64_t from, int64_t to) {
                       for (int64_t i = from; i < to; ++i)
                         pool.forward(own, i / groups, i % groups,
                                      weight + i % groups * weight_floats, nullptr);
                     });
      });
}

}  // namespace spkfast::cpu
