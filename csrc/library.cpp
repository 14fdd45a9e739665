// The table of every op: one line per op and one per backward. Kernels register themselves in
// csrc/cpu and csrc/cuda, fakes and gradients in spkfast/ops; a schema repeats the signature of its
// definition in spkfast/reference.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(spkfast, m) {
  m.def("log_mel_fbank(Tensor waveforms, Tensor lengths, Tensor window, Tensor mel, Tensor? cosines, Tensor? seeds, Tensor? masks, int[] integers, float[] floats, ScalarType dtype, bool validate) -> (Tensor features, Tensor frame_lengths)");
  m.def("log_mel_fbank_backward(Tensor grad, Tensor waveforms, Tensor lengths, Tensor window, Tensor mel, Tensor? cosines, Tensor? seeds, Tensor? masks, int[] integers, float[] floats, ScalarType dtype, bool validate) -> Tensor");
}
// clang-format on
