// Argument checks shared by kernels. They throw std::invalid_argument, which arrives in Python as a
// clean ValueError, and must run before any parallel loop: an exception thrown inside one loses its
// message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace spkfast {

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType expected) {
  check(tensor.scalar_type() == expected, name, " must be ", torch::headeronly::toString(expected),
        ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ')';
  return text.str();
}

// A size of -1 stands for any.
inline void check_shape(const char* name, const torch::stable::Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  std::ostringstream wanted;
  int64_t d = 0;
  for (int64_t size : expected) {
    equal = equal && (size < 0 || tensor.size(d) == size);
    wanted << (d++ ? ", " : "");
    if (size < 0) {
      wanted << "any";
    } else {
      wanted << size;
    }
  }
  check(equal, name, " must have shape (", wanted.str(), "), got ", shape_text(tensor));
}

}  // namespace spkfast
