// Complex numbers and short Fourier transforms, one in each lane, over the vectors of one
// instruction set, whose header the including unit names before.
#pragma once

namespace {

struct Complex {
  V re, im;
};
[[gnu::always_inline]] inline Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}
[[gnu::always_inline]] inline Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
[[gnu::always_inline]] inline Complex minus_i(Complex a) { return {a.im, -a.re}; }
[[gnu::always_inline]] inline Complex times(Complex a, V c, V s) {
  return {nmadd(a.im, s, a.re * c), madd(a.re, s, a.im * c)};
}
[[gnu::always_inline]] inline Complex times(Complex a, float re, float im) {
  return times(a, all(re), all(im));
}

[[gnu::always_inline]] inline void butterfly2(Complex* z) {
  const Complex a = z[0];
  z[0] = a + z[1];
  z[1] = a - z[1];
}

[[gnu::always_inline]] inline void butterfly3(Complex* z) {
  const Complex sum = z[1] + z[2], difference = z[1] - z[2];
  const V half = all(0.5F), s = all(0.866025404F);
  const Complex middle = {nmadd(half, sum.re, z[0].re), nmadd(half, sum.im, z[0].im)};
  z[0] = z[0] + sum;
  z[1] = {madd(s, difference.im, middle.re), nmadd(s, difference.re, middle.im)};
  z[2] = {nmadd(s, difference.im, middle.re), madd(s, difference.re, middle.im)};
}

[[gnu::always_inline]] inline void butterfly4(Complex* z) {
  const Complex a = z[0] + z[2], b = z[0] - z[2], c = z[1] + z[3], d = z[1] - z[3];
  z[0] = a + c;
  z[2] = a - c;
  z[1] = {b.re + d.im, b.im - d.re};
  z[3] = {b.re - d.im, b.im + d.re};
}

[[gnu::always_inline]] inline void butterfly5(Complex* z) {
  const V c1 = all(0.309016994F), c2 = all(-0.809016994F);
  const V s1 = all(0.951056516F), s2 = all(0.587785252F);
  const Complex a = z[1] + z[4], b = z[1] - z[4], c = z[2] + z[3], d = z[2] - z[3];
  const Complex m1 = {madd(c2, c.re, madd(c1, a.re, z[0].re)),
                      madd(c2, c.im, madd(c1, a.im, z[0].im))};
  const Complex m2 = {madd(c1, c.re, madd(c2, a.re, z[0].re)),
                      madd(c1, c.im, madd(c2, a.im, z[0].im))};
  const Complex n1 = {madd(s2, d.re, s1 * b.re), madd(s2, d.im, s1 * b.im)};
  const Complex n2 = {nmadd(s1, d.re, s2 * b.re), nmadd(s1, d.im, s2 * b.im)};
  z[0] = z[0] + a + c;
  z[1] = {m1.re + n1.im, m1.im - n1.re};
  z[4] = {m1.re - n1.im, m1.im + n1.re};
  z[2] = {m2.re + n2.im, m2.im - n2.re};
  z[3] = {m2.re - n2.im, m2.im + n2.re};
}

[[gnu::always_inline]] inline void butterfly8(Complex* z) {
  const V half_root = all(0.707106781F);
  Complex even[4], odd[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    even[k] = z[k] + z[k + 4];
    odd[k] = z[k] - z[k + 4];
  }
  odd[1] = {(odd[1].re + odd[1].im) * half_root, (odd[1].im - odd[1].re) * half_root};
  odd[2] = minus_i(odd[2]);
  odd[3] = {(odd[3].im - odd[3].re) * half_root, -(odd[3].re + odd[3].im) * half_root};
  butterfly4(even);
  butterfly4(odd);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    z[2 * k] = even[k];
    z[2 * k + 1] = odd[k];
  }
}

template <int R>
[[gnu::always_inline]] inline void butterfly(Complex* z) {
  if constexpr (R == 2) butterfly2(z);
  if constexpr (R == 3) butterfly3(z);
  if constexpr (R == 4) butterfly4(z);
  if constexpr (R == 5) butterfly5(z);
  if constexpr (R == 8) butterfly8(z);
}

}  // namespace
