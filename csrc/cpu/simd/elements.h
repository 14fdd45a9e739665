// Floating-point types of tensors that C++ has no name for.
#pragma once

#include <cstdint>

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace
