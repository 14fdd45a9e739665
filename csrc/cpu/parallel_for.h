// How engines are given threads, without knowing torch.
#pragma once

#include <cstdint>
#include <functional>

namespace spkfast::cpu {

// Runs body(begin, end) over parts of [begin, end) of about `grain` or more, on any threads.
using ParallelFor = std::function<void(int64_t begin, int64_t end, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace spkfast::cpu
