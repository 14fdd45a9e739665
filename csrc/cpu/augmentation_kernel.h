// What a unit of the augmentation of waveforms offers to the engine. Plain data and functions: a
// unit compiled for one instruction set holds nothing that the linker could share with another.
#pragma once

#include <cstdint>

namespace spkfast::cpu {

// Samples as they come: one of the two is null.
struct Samples {
  const float* floats;
  const int16_t* shorts;  // to be divided by 32768
};

// Outputs j = first to first + lanes - 1 of each period of a change of speed: sums over `taps`
// inputs, which begin `start` after that of the period.
struct SpeedTile {
  int64_t first, count, start, taps;
  const float* weights;  // [taps][lanes]
};

// Periods of p inputs and q outputs.
struct SpeedPlan {
  int64_t p, q, num_tiles;
  const SpeedTile* tiles;
};

// One pass over blocks of radix * stride points, each split into `radix` of `stride`, a multiple of
// the lanes.
struct RealFftPass {
  int64_t radix, stride;
  const float* twiddles;  // [radix - 1][2][stride]
};

// Products of real polynomials modulo x^(2 points) + 1, which is plain convolution where the result
// is no longer than that. With x^points = i such a polynomial is a complex one of half the length
// modulo x^points - i, and x = w y, w the root of i, makes that modulus y^points - 1: a complex
// transform, whose points need no order, since they are only multiplied with one another.
struct ConvolutionPlan {
  int64_t points;                // a multiple of the lanes' square
  const float *cosines, *sines;  // [points]: of pi n / (2 points)
  const RealFftPass* passes;     // their radices and one transform of the lanes make up the points
  int64_t num_passes;
};

struct AugmentationKernel {
  int64_t lanes;
  // `count` samples from `first` on as floats.
  void (*to_floats)(const Samples& samples, int64_t first, int64_t count, float* out);
  // `periods` * q outputs.
  void (*change_speed)(const SpeedPlan& plan, const float* x, int64_t periods, float* out);
  // Sum of squares of `count` samples.
  double (*energy)(const Samples& samples, int64_t first, int64_t count);
  // out += gain * samples
  void (*add)(const Samples& samples, int64_t first, int64_t count, float gain, float* out);
  // The spectrum of `count` <= 2 points samples, re and im of `points` floats each.
  void (*spectrum)(const ConvolutionPlan& plan, const Samples& samples, int64_t first,
                   int64_t count, float* re, float* im);
  // The product of two spectra, in place of the first, and the first `count` samples of gain times
  // its signal.
  void (*convolved)(const ConvolutionPlan& plan, float* re, float* im, const float* other_re,
                    const float* other_im, float gain, int64_t count, float* out);
};

const AugmentationKernel& augmentation_scalar();
const AugmentationKernel& augmentation_avx2();
const AugmentationKernel& augmentation_avx512();

}  // namespace spkfast::cpu
