// A speaker network in an ONNX file, whichever runtime runs it.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

struct Network {
  std::map<std::string, std::string> metadata;                   // What the file says of itself.
  std::function<std::vector<float>(std::vector<float>&)> embed;  // Of samples in [-1, 1].
};

Network LoadNetwork(const std::filesystem::path& path);
