// Types of the values in tensors.
#pragma once

namespace spkfast::cpu {

enum class Element { float32, bfloat16, float16 };

}  // namespace spkfast::cpu
