// pybind11 module spkfast._C: what is not a tensor op. Build information only, for spkfast.info().
#include <pybind11/pybind11.h>

#include <string>

namespace {

// Highest instruction level of this CPU, as spkfast names them.
std::string cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    return "avx512bf16";
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "scalar";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = SPKFAST_COMPILER;
  info["flags"] = SPKFAST_FLAGS;
  info["torch"] = SPKFAST_TORCH_VERSION;
  info["torch_target"] = SPKFAST_TORCH_TARGET;
  info["cuda"] = SPKFAST_CUDA_STATE;
  info["pybind11"] =
      std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What spkfast was built with, and what this CPU can do.";
  m.def("build_info", &build_info,
        "Compiler, flags and versions of the build, as a dictionary of strings.");
  m.def("cpu_level", &cpu_level,
        "Highest instruction level of this CPU: scalar, avx2, avx512 or avx512bf16.");
}
