// The instruction set that CPU kernels use: found once by cpuid, lowered for tests by
// SPKFAST_CPU_LEVEL.
#pragma once

namespace spkfast::cpu {

enum class Level { scalar, avx2, avx512, avx512bf16 };

// Name as in SPKFAST_CPU_LEVEL and spkfast.info().
const char* name(Level level);

// Highest level of this CPU.
Level highest_level();

// The level to use. Throws std::invalid_argument where SPKFAST_CPU_LEVEL names no level, or one
// that this CPU lacks.
Level level();

}  // namespace spkfast::cpu
