// The table of every op: one line per op and one per backward. Kernels register themselves in
// csrc/cpu and csrc/cuda, fakes and gradients in spkfast/ops. A schema repeats the signature of its
// definition in spkfast/reference, further outputs being what its gradient needs; those of
// inference take packed weights in place of its weights (spkfast/ops/_packing.py).
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(spkfast, m) {
  m.def("add_noise(Tensor waveforms, Tensor noises, Tensor begins, Tensor sizes, Tensor offsets, Tensor snr_db, float power_floor) -> Tensor");
  m.def("add_noise_(Tensor(a!) waveforms, Tensor noises, Tensor begins, Tensor sizes, Tensor offsets, Tensor snr_db, float power_floor) -> ()");
  m.def("attentive_pooling(Tensor x, Tensor hidden, Tensor hidden_vectors, Tensor? context, Tensor? context_vectors, Tensor weight, Tensor bias, Tensor? lengths, int[] integers, float[] floats) -> (Tensor mean, Tensor var)");
  m.def("attentive_stats_pool(Tensor x, Tensor? logits, Tensor? lengths) -> (Tensor mean, Tensor var, Tensor highest, Tensor total)");
  m.def("attentive_stats_pool_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor? logits, Tensor? lengths, Tensor mean, Tensor var, Tensor highest, Tensor total) -> (Tensor grad_x, Tensor grad_logits)");
  m.def("attentive_stats_pool_from_hidden(Tensor x, Tensor hidden, Tensor weight, Tensor bias, Tensor? lengths) -> (Tensor mean, Tensor var, Tensor highest, Tensor total)");
  m.def("attentive_stats_pool_from_hidden_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor hidden, Tensor weight, Tensor bias, Tensor? lengths, Tensor mean, Tensor var, Tensor highest, Tensor total) -> (Tensor grad_x, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def("change_speed(Tensor waveforms, Tensor lengths, Tensor which, Tensor[] filters, int[] ratios, int context, int num_samples) -> Tensor");
  m.def("channel_affine(Tensor x, Tensor scale, Tensor shift, Tensor? added, bool plain) -> (Tensor y, Tensor total)");
  m.def("channel_affine_backward(Tensor? grad_y, Tensor? grad_total, Tensor x, Tensor scale) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)");
  m.def("conv_batch_norm(Tensor[] x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? added, int[] integers, float eps) -> (Tensor out, Tensor total, Tensor y, Tensor mean, Tensor var)");
  m.def("conv_batch_norm_backward(Tensor? grad_out, Tensor? grad_total, Tensor y, Tensor mean, Tensor var, Tensor? gamma, float eps) -> (Tensor grad, Tensor grad_bias, Tensor grad_gamma, Tensor grad_beta)");
  m.def("conv_input_gradient(Tensor grad, Tensor weight, int[] integers) -> Tensor");
  m.def("conv_relu(Tensor[] x, Tensor weight, Tensor? bias, int[] integers) -> (Tensor y, Tensor mean, Tensor var)");
  m.def("conv_relu_backward(Tensor? grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor y, Tensor mean) -> (Tensor grad, Tensor grad_bias)");
  m.def("conv_weight_gradient(Tensor[] x, Tensor grad, int[] integers) -> Tensor");
  m.def("log_mel_fbank(Tensor waveforms, Tensor lengths, Tensor window, Tensor mel, Tensor? cosines, Tensor? seeds, Tensor? masks, int[] integers, float[] floats, ScalarType dtype, bool validate) -> (Tensor features, Tensor frame_lengths)");
  m.def("log_mel_fbank_backward(Tensor grad, Tensor waveforms, Tensor lengths, Tensor window, Tensor mel, Tensor? cosines, Tensor? seeds, Tensor? masks, int[] integers, float[] floats, ScalarType dtype, bool validate) -> Tensor");
  m.def("margin_softmax_loss(Tensor x, Tensor weight, Tensor? bias, Tensor target, int[] integers, float[] floats) -> (Tensor sums, Tensor total, Tensor chosen, Tensor best, Tensor own, Tensor rows)");
  m.def("margin_softmax_loss_backward(Tensor grad_sums, Tensor grad_total, Tensor grad_chosen, Tensor x, Tensor weight, Tensor? bias, Tensor target, int[] integers, float[] floats, Tensor sums, Tensor total, Tensor chosen, Tensor best, Tensor own, Tensor rows) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("paired_dot(Tensor a, Tensor b, Tensor first, Tensor second) -> Tensor");
  m.def("product_pack(Tensor weight, int[] parts, int precision) -> Tensor");
  m.def("reverberate(Tensor waveforms, Tensor responses, Tensor begins, Tensor sizes, Tensor gains, int longest) -> Tensor");
  m.def("reverberate_(Tensor(a!) waveforms, Tensor responses, Tensor begins, Tensor sizes, Tensor gains, int longest) -> ()");
  m.def("se_res2net_block(Tensor x, Tensor[] params, Tensor? padded, Tensor? excited, int[] integers, float[] floats) -> Tensor");
  m.def("tdnn_layer(Tensor[] x, Tensor weight, Tensor vectors, Tensor? offset, Tensor? lengths, int[] integers, float[] floats) -> Tensor");
  m.def("top_moments(Tensor scores, int n) -> (Tensor mean, Tensor std)");
}
// clang-format on
