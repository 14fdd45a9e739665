#include "se_res2net_block_engine.h"

#include <algorithm>
#include <cstring>

namespace spkfast::cpu {
namespace {

// Channels of a task that reads all frames of a row.
constexpr int64_t kMeanChannels = 64;

// A new batch in a buffer: rows of so many frames, of `bytes` each.
Batch batch_in(Buffer& buffer, int64_t rows, int64_t frames, int64_t bytes) {
  return {buffer.of(rows * frames * bytes), frames * bytes, bytes};
}

}  // namespace

void run_se_res2net_block(const SERes2NetBlock& block, const RealFrames& padded,
                          const RealFrames& excited, Level level, int64_t threads,
                          const ParallelFor& parallel_for) {
  thread_local struct {
    Buffer x, hidden, chain[2], concatenated, shortcut, beyond, means, squeezed, gates;
  } memory;
  const ProductKernel& kernel = product_kernel(level);
  const Element element = block.element;
  const Operand operand = block.in.form.operand;
  const int64_t frames = padded.frames, value = value_bytes(element), width = block.width;
  const int64_t channels = block.in.form.channels, inputs = block.in.form.parts[0];
  const int64_t units = block.squeeze.form.channels, convolved = block.res.size();
  const int64_t chain_bytes = steps_of(operand, width) * kStepBytes;
  const int64_t beyond_bytes = std::max<int64_t>(chain_bytes, kStepBytes);
  // The frames beyond the ends, of each step of the chain: its zero is its own.
  char* beyond = memory.beyond.of(std::max<int64_t>(convolved, 1) * beyond_bytes);
  for (int64_t j = 0; j < convolved; ++j)
    std::memset(beyond + j * beyond_bytes, static_cast<int>(block.res[j].quantiser.zero),
                beyond_bytes);
  const auto work_of = [](const Layer& layer) {
    return layer.form.channels * layer.form.steps() * step_channels(layer.form.operand);
  };

  each_wave(
      padded, threads, parallel_for,
      [&](int64_t begin, int64_t end, const ParallelFor& parallel_for) {
        const int64_t rows = end - begin, longest_row = longest(padded, begin, end);
        const Batch hidden = batch_in(memory.hidden, rows, longest_row, channels * value);
        // Operands of x and of the chain's outputs; the values themselves where they are operands.
        const auto operands = [&](Buffer& buffer, const Batch& values, int64_t count) {
          if (is_operand(element, operand, count)) return values;
          return batch_in(buffer, rows, longest_row, steps_of(operand, count) * kStepBytes);
        };
        const Batch x = {block.x.data + begin * block.x.row_stride, block.x.row_stride,
                         block.x.frame_stride};
        const Batch y = {block.y.data + begin * block.y.row_stride, block.y.row_stride,
                         block.y.frame_stride};
        const Batch x_operands = operands(memory.x, x, inputs);
        const Batch hidden_operands = operands(memory.concatenated, hidden, channels);
        const Batch chain[2] = {batch_in(memory.chain[0], rows, longest_row, chain_bytes),
                                batch_in(memory.chain[1], rows, longest_row, chain_bytes)};
        const Batch rest =
            block.shortcut ? batch_in(memory.shortcut, rows, longest_row, channels * value) : x;
        // Group k of the channels of a frame.
        const auto group = [&](const Frames& of, int64_t k) {
          return Frames{of.data + k * width * value, of.stride};
        };
        const auto multiply = [&](const Layer& layer, const Batch& from, int64_t row, int64_t first,
                                  int64_t last, Product product) {
          const std::vector<Source> sources =
              sources_of(layer, {from.row(row - begin)}, block.dilation);
          read(product, sources);
          kernel.run(product, first, last, 0, panels_of(layer.form.channels));
        };
        const auto of = [&](const Layer& layer, int64_t row, const char* edge, const Frames& out) {
          Product product = product_of(layer, element, padded.of(row), block.reflect, edge);
          product.out = out;
          return product;
        };
        const auto last_layer = [&](int64_t row, int64_t first, int64_t last) {
          const int64_t b = row - begin;
          if (hidden_operands.data != hidden.data)
            kernel.convert(hidden.row(b), element, channels, hidden_operands.row(b), operand,
                           block.out.quantiser, first, last);
          multiply(block.out, hidden_operands, row, first, last,
                   of(block.out, row, beyond, y.row(b)));
        };

        const int64_t passing = block.first_passes ? 1 : 0;
        int64_t work = work_of(block.in) + (block.shortcut ? work_of(*block.shortcut) : 0) +
                       (convolved ? 0 : work_of(block.out));
        each_frames(padded, begin, end, work, parallel_for,
                    [&](int64_t row, int64_t first, int64_t last) {
                      const int64_t b = row - begin;
                      if (x_operands.data != x.data)
                        kernel.convert(x.row(b), element, inputs, x_operands.row(b), operand,
                                       block.in.quantiser, first, last);
                      multiply(block.in, x_operands, row, first, last,
                               of(block.in, row, beyond, hidden.row(b)));
                      if (block.shortcut)
                        multiply(*block.shortcut, x_operands, row, first, last,
                                 of(*block.shortcut, row, beyond, rest.row(b)));
                      if (!convolved) return last_layer(row, first, last);
                      kernel.convert(group(hidden.row(b), passing), element, width, chain[0].row(b),
                                     operand, block.res[0].quantiser, first, last);
                      // What a last step lacks of channels nobody writes there, and it meets
                      // weights of 0: it must not be NaN.
                      if (width % step_channels(operand)) {
                        for (int64_t t = first; t < last; ++t)
                          std::memset(chain[1].row(b).data + (t + 1) * chain_bytes - kStepBytes, 0,
                                      kStepBytes);
                      }
                    });
        for (int64_t j = 0; j < convolved; ++j) {
          const bool ends = j + 1 == convolved;
          work = work_of(block.res[j]) + (ends ? work_of(block.out) : 0);
          each_frames(padded, begin, end, work, parallel_for,
                      [&](int64_t row, int64_t first, int64_t last) {
                        const int64_t b = row - begin;
                        // A group is no more needed once it was added to the one before: its place
                        // takes the output.
                        Product product = of(block.res[j], row, beyond + j * beyond_bytes,
                                             group(hidden.row(b), passing + j));
                        if (!ends) {
                          product.next = group(hidden.row(b), passing + j + 1);
                          product.sum = chain[(j + 1) % 2].row(b);
                          product.quantiser = block.res[j + 1].quantiser;
                        }
                        multiply(block.res[j], chain[j % 2], row, first, last, product);
                        if (ends) last_layer(row, first, last);
                      });
        }

        // Before the means, which may be over more frames.
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t t = padded.of(row); t < frames; ++t)
            std::memset(y.row(row - begin).data + t * y.frame_stride, 0, channels * value);
        }
        float* means = reinterpret_cast<float*>(memory.means.of(rows * channels * sizeof(float)));
        float* squeezed =
            reinterpret_cast<float*>(memory.squeezed.of(rows * units * sizeof(float)));
        float* gates = reinterpret_cast<float*>(memory.gates.of(rows * channels * sizeof(float)));
        const int64_t pieces = (channels + kMeanChannels - 1) / kMeanChannels;
        parallel_for(0, rows * pieces, 1, [&](int64_t from, int64_t to) {
          for (int64_t i = from; i < to; ++i) {
            const int64_t b = i / pieces, first = i % pieces * kMeanChannels;
            kernel.means(y.row(b), element, excited.of(begin + b), means + b * channels, first,
                         std::min(first + kMeanChannels, channels));
          }
        });
        const auto dense = [&](const Layer& layer, float* from, float* to) {
          const int64_t count = layer.form.channels, size = sizeof(float);
          const Frames in = {reinterpret_cast<char*>(from), layer.form.parts[0] * size};
          const std::vector<Source> sources = sources_of(layer, {in}, 1);
          Product product = product_of(layer, Element::float32, rows, false, nullptr);
          read(product, sources);
          product.out = {reinterpret_cast<char*>(to), count * size};
          parallel_for(0, panels_of(count), 1,
                       [&](int64_t from, int64_t to) { kernel.run(product, 0, rows, from, to); });
        };
        dense(block.squeeze, means, squeezed);
        dense(block.excite, squeezed, gates);
        each_frames(padded, begin, end, channels * 16, parallel_for,
                    [&](int64_t row, int64_t first, int64_t last) {
                      const int64_t b = row - begin;
                      kernel.gate(y.row(b), rest.row(b), element, channels, gates + b * channels,
                                  first, last);
                    });
      });
}

}  // namespace spkfast::cpu
