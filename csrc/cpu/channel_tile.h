// Passes over frames of channels, over vectors of one instruction set, whose header the including
// unit names before.
#pragma once

#include "channel_kernel.h"
#include "simd/each.h"

namespace {

using spkfast::cpu::Affine;
using spkfast::cpu::AffineGradient;
using spkfast::cpu::Element;
using spkfast::cpu::Frames;
using spkfast::cpu::NormSums;
using spkfast::cpu::ReluGradient;

// Frames whose sums are in registers while the channels pass.
constexpr int kTogether = 4;

// Values of one type from channel `first` on.
template <typename T>
struct At {
  const Frames& frames;
  int64_t first;
  [[gnu::always_inline]] T* operator()(int64_t t, int64_t channel) const {
    return reinterpret_cast<T*>(frames.data + t * frames.stride) + first + channel;
  }
};

template <typename F>
[[gnu::always_inline]] inline void by_element(Element element, F&& f) {
  if (element == Element::float32) return f(float{});
  f(BFloat16{});
}

// A choice that the loops need not make again.
template <typename F>
[[gnu::always_inline]] inline void by_truth(bool choice, F&& f) {
  if (choice) return f(Constant<1>{});
  f(Constant<0>{});
}

// Which of two gradients there are.
template <typename F>
[[gnu::always_inline]] inline void by_grads(const Frames& first, const Frames& second, F&& f) {
  by_truth(first.data, [&](auto of_first) {
    by_truth(second.data, [&](auto of_second) { f(of_first, of_second); });
  });
}

// Calls body(t, number of frames as a constant, channel, width) for all frames, a few at a time,
// and all channels of them.
template <typename Body>
[[gnu::always_inline]] inline void each_frames(int64_t frames, int64_t channels, Body body) {
  int64_t t = 0;
  for (; t + kTogether <= frames; t += kTogether) {
    extent_of(channels).each([&](int64_t i, auto width) __attribute__((always_inline)) {
      body(t, Constant<kTogether>{}, i * W, width);
    });
  }
  for (; t < frames; ++t) {
    extent_of(channels).each([&](int64_t i, auto width) __attribute__((always_inline)) {
      body(t, Constant<1>{}, i * W, width);
    });
  }
}

void affine(const Affine& row, Element element, int64_t frames, int64_t first, int64_t last) {
  by_element(element, [&](auto zero) {
    by_truth(row.y.data, [&](auto plain) {
      by_truth(row.total.data, [&](auto sums) {
        using T = decltype(zero);
        const At<T> x = {row.x, first}, added = {row.added, first}, y = {row.y, first},
                    total = {row.total, first};
        each_frames(frames, last - first,
                    [&](int64_t t, auto together, int64_t c, auto width)
                        __attribute__((always_inline)) {
                          const V scale = width.read(row.scale + first + c, V{});
                          const V shift = width.read(row.shift + first + c, V{});
                          each<together>([&](auto n) __attribute__((always_inline)) {
                            const V v = madd(width.read(x(t + n, c), V{}), scale, shift);
                            if constexpr (plain) width.write(y(t + n, c), v);
                            if constexpr (sums)
                              width.write(total(t + n, c), v + width.read(added(t + n, c), V{}));
                          });
                        });
      });
    });
  });
}

[[gnu::always_inline]] inline void clear(float* p, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; ++c) p[c] = 0.0F;
}

void affine_gradient(const AffineGradient& row, Element element, int64_t frames, int64_t first,
                     int64_t last) {
  clear(row.grad_scale, first, last);
  clear(row.grad_shift, first, last);
  by_element(element, [&](auto zero) {
    by_grads(row.grad_y, row.grad_total, [&](auto of_y, auto of_total) {
      using T = decltype(zero);
      const At<T> grad_y = {row.grad_y, first}, grad_total = {row.grad_total, first},
                  x = {row.x, first}, grad_x = {row.grad_x, first};
      each_frames(frames, last - first,
                  [&](int64_t t, auto together, int64_t c, auto width)
                      __attribute__((always_inline)) {
                        const V scale = width.read(row.scale + first + c, V{});
                        V of_scale = {}, of_shift = {};
                        each<together>([&](auto n) __attribute__((always_inline)) {
                          V grad = {};
                          if constexpr (of_y) grad = width.read(grad_y(t + n, c), V{});
                          if constexpr (of_total)
                            grad = grad + width.read(grad_total(t + n, c), V{});
                          of_scale = madd(grad, width.read(x(t + n, c), V{}), of_scale);
                          of_shift = of_shift + grad;
                          width.write(grad_x(t + n, c), grad * scale);
                        });
                        float *p = row.grad_scale + first + c, *q = row.grad_shift + first + c;
                        width.write(p, width.read(p, V{}) + of_scale);
                        width.write(q, width.read(q, V{}) + of_shift);
                      });
    });
  });
}

void norm_sums(const NormSums& row, Element element, int64_t frames, int64_t first, int64_t last) {
  clear(row.sums, first, last);
  clear(row.products, first, last);
  by_element(element, [&](auto zero) {
    by_grads(row.grad_y, row.grad_total, [&](auto of_y, auto of_total) {
      using T = decltype(zero);
      const At<T> grad_y = {row.grad_y, first}, grad_total = {row.grad_total, first},
                  y = {row.y, first};
      each_frames(frames, last - first,
                  [&](int64_t t, auto together, int64_t c, auto width)
                      __attribute__((always_inline)) {
                        const V mean = width.read(row.mean + first + c, V{});
                        V sum = {}, product = {};
                        each<together>([&](auto n) __attribute__((always_inline)) {
                          V grad = {};
                          if constexpr (of_y) grad = width.read(grad_y(t + n, c), V{});
                          if constexpr (of_total)
                            grad = grad + width.read(grad_total(t + n, c), V{});
                          product = madd(grad, width.read(y(t + n, c), V{}) - mean, product);
                          sum = sum + grad;
                        });
                        float *p = row.sums + first + c, *q = row.products + first + c;
                        width.write(p, width.read(p, V{}) + sum);
                        width.write(q, width.read(q, V{}) + product);
                      });
    });
  });
}

void relu_gradient(const ReluGradient& row, Element element, int64_t frames, int64_t first,
                   int64_t last) {
  clear(row.grad_bias, first, last);
  by_element(element, [&](auto zero) {
    by_grads(row.grad_y, row.grad_total, [&](auto of_y, auto of_total) {
      by_truth(row.grad_mean, [&](auto moments) {
        using T = decltype(zero);
        const At<T> grad_y = {row.grad_y, first}, grad_total = {row.grad_total, first},
                    y = {row.y, first}, out = {row.grad, first};
        each_frames(
            frames, last - first,
            [&](int64_t t, auto together, int64_t c, auto width) __attribute__((always_inline)) {
              V offset = {}, slope = {}, mean = {}, sum = {};
              const V scale = row.scale ? width.read(row.scale + first + c, V{}) : all(1.0F);
              if constexpr (moments) {
                offset = width.read(row.grad_mean + first + c, V{}) * row.share;
                slope = width.read(row.grad_var + first + c, V{}) * (2 * row.share);
                mean = width.read(row.mean + first + c, V{});
              }
              each<together>([&](auto n) __attribute__((always_inline)) {
                const V value = width.read(y(t + n, c), V{});
                V grad = {};
                if constexpr (of_y) grad = width.read(grad_y(t + n, c), V{});
                if constexpr (of_total) grad = grad + width.read(grad_total(t + n, c), V{});
                grad = grad * scale;
                if constexpr (moments) grad = madd(slope, value - mean, grad + offset);
                grad = value <= 0.0F ? V{} : grad;  // NaN stays
                sum = sum + grad;
                width.write(out(t + n, c), grad);
              });
              float* p = row.grad_bias + first + c;
              width.write(p, width.read(p, V{}) + sum);
            });
      });
    });
  });
}

}  // namespace
