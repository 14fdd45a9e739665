// Vectors of 16 floats for AVX-512 with products of bfloat16 numbers and of bytes.
#pragma once

#pragma GCC target("avx512bf16,avx512vnni")
// The compiler's own macros do not follow its pragma.
#define SPKFAST_AVX512_DOTS

#include "avx512.h"
