// embed MODEL.onnx AUDIO.pcm [AUDIO2.pcm]: a recording's speaker embedding, or the cosine of two.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "network.h"

namespace {

void Check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// The file holds 16-bit samples, little-endian, mono, at the rate of the network, and nothing else.
std::vector<float> Embedding(const Network& network, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Check(file && !std::filesystem::is_directory(path), path + ": not a file that can be read");
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  for (const std::string mark : {"RIFF", "RF64", "FORM", "fLaC", "OggS", "ID3"})
    Check(bytes.compare(0, mark.size(), mark) != 0,
          path + ": expected samples alone, got a file that begins with " + mark +
              "; convert it: ffmpeg -i IN -ac 1 -ar " + network.metadata.at("sample_rate") +
              " -f s16le OUT.pcm");
  Check(bytes.size() % 2 == 0, path + ": expected 16-bit samples, got an odd number of bytes");
  std::vector<float> waveform(bytes.size() / 2);
  const std::string& least = network.metadata.at("min_samples");
  Check(waveform.size() >= std::stoul(least),
        path + ": expected at least " + least + " samples, got " + std::to_string(waveform.size()));
  const auto* halves = reinterpret_cast<const uint8_t*>(bytes.data());
  for (size_t i = 0; i < waveform.size(); ++i) {
    waveform[i] = static_cast<int16_t>(halves[2 * i] | halves[2 * i + 1] << 8) / 32768.0f;
  }
  const std::vector<float> embedding = network.embed(waveform);
  Check(std::all_of(embedding.begin(), embedding.end(), [](float x) { return std::isfinite(x); }),
        path + ": the embedding is not finite; is the model file damaged?");
  return embedding;
}

double Cosine(const std::vector<float>& a, const std::vector<float>& b) {
  const auto dot = [](const auto& x, const auto& y) {
    return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
  };
  return dot(a, b) / std::sqrt(dot(a, a) * dot(b, b));
}

}  // namespace

int main(int argc, char** argv) try {
  Check(argc == 3 || argc == 4, "usage: embed MODEL.onnx AUDIO.pcm [AUDIO2.pcm]");
  const std::string model = argv[1];
  Check(std::filesystem::is_regular_file(model), model + ": there is no such file");
  Network network = LoadNetwork(model);
  Check(network.metadata["inputs"] == "waveform" && network.metadata["layout"] == "padded",
        model + ": expected the inputs 'waveform' and 'lengths'; write the file with to_onnx");

  const std::vector<float> embedding = Embedding(network, argv[2]);
  if (argc == 4) {
    std::printf("%.9g\n", Cosine(embedding, Embedding(network, argv[3])));
  } else {
    for (const float value : embedding) std::printf("%.9g\n", value);
  }
  return 0;
} catch (const std::exception& error) {
  std::string line = error.what();
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fprintf(stderr, "embed: %s\n", line.c_str());
  return 2;
}
