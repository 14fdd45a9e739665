// The network in onnxruntime.
#include <onnxruntime_cxx_api.h>

#include <memory>

#include "network.h"

Network LoadNetwork(const std::filesystem::path& path) {
  static Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "embed");
  const auto session = std::make_shared<Ort::Session>(env, path.c_str(), Ort::SessionOptions());
  Network network;
  Ort::AllocatorWithDefaultOptions allocator;
  const Ort::ModelMetadata metadata = session->GetModelMetadata();
  for (const auto& key : metadata.GetCustomMetadataMapKeysAllocated(allocator)) {
    const auto value = metadata.LookupCustomMetadataMapAllocated(key.get(), allocator);
    network.metadata[key.get()] = value.get();
  }
  network.embed = [session](std::vector<float>& waveform) {
    int64_t rows = 1, length = waveform.size();
    const int64_t shape[] = {rows, length};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    const Ort::Value inputs[] = {
        Ort::Value::CreateTensor(memory, waveform.data(), waveform.size(), shape, 2),
        Ort::Value::CreateTensor(memory, &length, 1, &rows, 1)};
    const char *names[] = {"waveform", "lengths"}, *output = "embedding";
    const auto outputs = session->Run(Ort::RunOptions(), names, inputs, 2, &output, 1);
    const float* values = outputs[0].GetTensorData<float>();
    const size_t size = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
    return std::vector<float>(values, values + size);
  };
  return network;
}
