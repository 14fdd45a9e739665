#include "cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace spkfast::cpu {

const char* name(Level level) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
  return kNames[static_cast<int>(level)];
}

Level highest_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    return Level::avx512bf16;
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::scalar;
}

Level level() {
  static const Level highest = highest_level();
  const char* wanted = std::getenv("SPKFAST_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return highest;
  for (Level candidate : {Level::scalar, Level::avx2, Level::avx512, Level::avx512bf16}) {
    if (std::string(wanted) != name(candidate)) continue;
    if (candidate <= highest) return candidate;
    throw std::invalid_argument(std::string("SPKFAST_CPU_LEVEL=") + wanted +
                                " is above this CPU, which has " + name(highest));
  }
  throw std::invalid_argument(
      std::string("SPKFAST_CPU_LEVEL must be scalar, avx2, avx512 or avx512bf16, got '") + wanted +
      "'");
}

}  // namespace spkfast::cpu
