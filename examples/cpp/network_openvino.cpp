// The network in OpenVINO.
#include <openvino/openvino.hpp>

#include "network.h"

Network LoadNetwork(const std::filesystem::path& path) {
  ov::Core core;
  const auto model = core.read_model(path.string());
  Network network;
  if (model->has_rt_info("framework")) {
    for (const auto& [key, value] : model->get_rt_info<ov::AnyMap>("framework")) {
      network.metadata[key] = value.as<std::string>();
    }
  }
  // Left alone, it computes in bfloat16 where the CPU can: too coarse for the front-end.
  const auto f32 = ov::hint::inference_precision(ov::element::f32);
  auto request = core.compile_model(model, "CPU", f32).create_infer_request();
  network.embed = [request](std::vector<float>& waveform) mutable {
    int64_t length = waveform.size();
    request.set_tensor("waveform", {ov::element::f32, {1, waveform.size()}, waveform.data()});
    request.set_tensor("lengths", {ov::element::i64, {1}, &length});
    request.infer();
    const ov::Tensor embedding = request.get_tensor("embedding");
    const float* values = embedding.data<const float>();
    return std::vector<float>(values, values + embedding.get_size());
  };
  return network;
}
