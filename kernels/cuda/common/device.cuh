// What a launch asks the current device.
#pragma once

#include "platform.cuh"

namespace spkfast {

constexpr int kReservedBytes = 1024;  // of shared memory, taken beside what a block asks for

struct Device {
  int processors, shared_per_processor, shared_per_block;
};

inline cudaError_t current_device(Device& device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, number);
  };
  get(device.processors, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

}  // namespace spkfast
