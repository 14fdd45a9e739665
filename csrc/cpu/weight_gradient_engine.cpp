#include "weight_gradient_engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace spkfast::cpu {
namespace {

// What stays in the second cache while the panels pass: steps, and channels of the inputs.
constexpr int64_t kBlockSteps = 384, kBlockChannels = 258;
// Channels of a tile of the widest kernel.
constexpr int64_t kTileChannels = 6;
// Parts of the time that have sums of their own.
constexpr int64_t kTimeParts = 2;
// Multiplications that are worth a second thread.
constexpr int64_t kTaskWork = 1 << 18;
// Rows of sums that one thread finishes at a time.
constexpr int64_t kFinishRows = 64;

const WeightGradientKernel& kernel_of(Level level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level >= Level::avx512bf16) return weight_gradient_avx512bf16();
  if (level == Level::avx512) return weight_gradient_avx512();
  if (level == Level::avx2) return weight_gradient_avx2();
#else
  (void)level;
#endif
  return weight_gradient_scalar();
}

struct Range {
  int64_t first, last;

  int64_t size() const { return last - first; }
  // Part i of n, whose sizes differ by one unit at most.
  Range part(int64_t i, int64_t n, int64_t unit = 1) const {
    const int64_t units = (size() + unit - 1) / unit;
    return {std::min(last, first + units * i / n * unit),
            std::min(last, first + units * (i + 1) / n * unit)};
  }
};

int64_t parts_of(int64_t size, int64_t most) { return (size + most - 1) / most; }

// Frames of one row.
struct Piece {
  int64_t row;
  Range frames;
};

class Sums {
 public:
  Sums(const WeightGradient& call, const WeightGradientKernel& kernel)
      : call_(call), kernel_(kernel), inputs_(0) {
    for (const int64_t part : call.parts) inputs_ += part;
  }
  int64_t inputs() const { return inputs_; }
  int64_t rows() const { return inputs_ * call_.taps; }
  // Numbers of the sums of all panels: for each one kPanel for each input and tap.
  int64_t size() const { return panels_of(call_.channels) * rows() * kPanel; }

  // Sums over `frames` of all rows one after the other, for some panels and inputs.
  void make(Range frames, Range panels, Range inputs, float* sums) const {
    const int64_t blocks = parts_of(frames.size(), kBlockSteps * step_frames(call_.operand));
    for (int64_t i = 0; i < blocks; ++i) add(frames.part(i, blocks), panels, inputs, sums, i > 0);
  }

 private:
  void add(Range frames, Range panels, Range inputs, float* sums, bool add) const {
    thread_local struct {
      Buffer left, right, beyond;
      std::vector<Piece> pieces;
      std::vector<Source> sources;
    } memory;
    memory.pieces.clear();
    int64_t steps = 0, words = 0;
    for (int64_t f = frames.first; f < frames.last;) {
      const int64_t row = f / call_.frames, first = f % call_.frames;
      const Range piece = {first, std::min(call_.frames, first + frames.last - f)};
      memory.pieces.push_back({row, piece});
      steps += steps_of(piece);
      words += words_of(piece);
      f += piece.size();
    }
    const int64_t widest = std::max(inputs_, call_.channels) * sizeof(float);
    char* beyond = memory.beyond.of(widest);
    std::memset(beyond, 0, widest);

    Product form = {};
    form.operand = call_.operand;
    form.beyond = beyond;
    const int64_t panel_bytes = steps * kPanel * kStepBytes;
    char* right = memory.right.of(panels.size() * panel_bytes);
    pack(form, memory.pieces, panels, {right, panel_bytes});

    const int64_t blocks = parts_of(inputs.size(), kBlockChannels), stride = words * kStepBytes;
    const int64_t sum_bytes = kPanel * sizeof(float);
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = inputs.part(i, blocks, kTileChannels);
      char* left = memory.left.of(block.size() * stride);
      turn(form, memory.pieces, block, {left, stride});
      Product product = {};
      product.operand = call_.operand;
      product.frames = block.size();
      for (int64_t panel = panels.first; panel < panels.last; ++panel) {
        product.weight = right + (panel - panels.first) * panel_bytes;
        product.channels = std::min(kPanel, call_.channels - panel * kPanel);
        for (int64_t tap = 0; tap < call_.taps; ++tap) {
          memory.sources.clear();
          const char* at = left + tap * call_.dilation * kStepBytes / step_frames(call_.operand);
          for (const Piece& piece : memory.pieces) {
            memory.sources.push_back({at, stride, steps_of(piece.frames), 0});
            at += words_of(piece.frames) * kStepBytes;
          }
          product.sources = memory.sources.data();
          product.num_sources = static_cast<int64_t>(memory.sources.size());
          char* out = reinterpret_cast<char*>(sums) +
                      (panel * rows() + block.first * call_.taps + tap) * sum_bytes;
          product.out = {out, call_.taps * sum_bytes};
          kernel_.run(product, add);
        }
      }
    }
  }

  // Steps of a piece, and words of an input that has what all taps read of it.
  int64_t steps_of(Range piece) const { return parts_of(piece.size(), step_frames(call_.operand)); }
  int64_t words_of(Range piece) const {
    return steps_of(piece) + (call_.taps - 1) * call_.dilation / step_frames(call_.operand);
  }

  void pack(Product form, const std::vector<Piece>& pieces, Range panels, Frames to) const {
    const Range channels = {panels.first * kPanel, std::min(call_.channels, panels.last * kPanel)};
    const int64_t skipped = channels.first * value_bytes(call_.grad_element);
    form.element = call_.grad_element;
    for (const Piece& piece : pieces) {
      // A last step's second frame must add nothing: that of the piece is the last one here.
      form.frames = piece.frames.last;
      const Frames grad = call_.grad.row(piece.row);
      const int64_t steps = steps_of(piece.frames);
      const Source source = {grad.data + skipped, grad.stride, steps, piece.frames.first};
      kernel_.pack(form, source, channels.size(), to);
      to.data += steps * kPanel * kStepBytes;
    }
  }

  void turn(Product form, const std::vector<Piece>& pieces, Range inputs, Frames to) const {
    form.element = call_.element;
    form.frames = call_.frames;
    form.reflect = call_.reflect;
    for (const Piece& piece : pieces) {
      const int64_t first = piece.frames.first - call_.taps / 2 * call_.dilation;
      const int64_t words = words_of(piece.frames);
      Range part = {0, 0};
      for (size_t i = 0; i < call_.parts.size(); ++i) {
        part = {part.last, part.last + call_.parts[i]};
        const Range both = {std::max(part.first, inputs.first), std::min(part.last, inputs.last)};
        if (both.size() <= 0) continue;
        const Frames x = call_.inputs[i].row(piece.row);
        const int64_t skipped = (both.first - part.first) * value_bytes(call_.element);
        kernel_.turn(form, {x.data + skipped, x.stride, words, first}, both.size(),
                     {to.data + (both.first - inputs.first) * to.stride, to.stride});
      }
      to.data += words * kStepBytes;
    }
  }

  const WeightGradient& call_;
  const WeightGradientKernel& kernel_;
  int64_t inputs_;
};

}  // namespace

void run_weight_gradient(const WeightGradient& call, Level level, int64_t threads,
                         const ParallelFor& parallel_for) {
  thread_local Buffer memory;
  const WeightGradientKernel& kernel = kernel_of(level);
  const Sums sums(call, kernel);
  const int64_t frames = call.batch * call.frames, panels = panels_of(call.channels);
  if (frames == 0) std::memset(call.out, 0, call.channels * sums.rows() * sizeof(float));
  if (frames == 0 || sums.size() == 0) return;

  // Threads share the time first, so that none reads what another does, in parts that depend on
  // nothing else; then panels and inputs.
  const int64_t parts =
      frames < kTimeParts * kBlockSteps * step_frames(call.operand) ? 1 : kTimeParts;
  const int64_t shares = threads / std::gcd(threads, parts);
  const int64_t by_panels = std::min(shares, panels);
  const int64_t by_inputs =
      std::min(parts_of(shares, by_panels), parts_of(sums.inputs(), kTileChannels));
  float* found = reinterpret_cast<float*>(memory.of(parts * sums.size() * sizeof(float)));
  const int64_t tasks = parts * by_panels * by_inputs;
  const int64_t work = frames * call.channels * sums.rows() / tasks;
  parallel_for(0, tasks, 1 + kTaskWork / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / (by_panels * by_inputs);
      sums.make(Range{0, frames}.part(part, parts),
                Range{0, panels}.part(task / by_inputs % by_panels, by_panels),
                Range{0, sums.inputs()}.part(task % by_inputs, by_inputs, kTileChannels),
                found + part * sums.size());
    }
  });
  const int64_t rows = sums.rows(), pieces = parts_of(rows, kFinishRows);
  const int64_t grain = 1 + kTaskWork / (kPanel * kFinishRows * parts);
  parallel_for(0, panels * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / pieces, first = i % pieces * kFinishRows;
      const int64_t column = panel * kPanel;
      kernel.finish(found + column * rows, parts, sums.size(), first,
                    std::min(rows, first + kFinishRows), std::min(kPanel, call.channels - column),
                    call.out + column * rows, rows);
    }
  });
}

}  // namespace spkfast::cpu
