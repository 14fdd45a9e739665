// pybind11 module spkfast._C: what is not a tensor op. Build information, features of arrays and
// streams, crops of FLAC files, and what is asked of modules of torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/cpu_level.h"
#include "cpu/flac_stream.h"
#include "cpu/log_mel_fbank_stream.h"
#include "python_modules.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = SPKFAST_COMPILER;
  info["flags"] = SPKFAST_FLAGS;
  info["torch"] = SPKFAST_TORCH_VERSION;
  info["torch_target"] = SPKFAST_TORCH_TARGET;
  info["cuda"] = SPKFAST_CUDA_STATE;
  info["pybind11"] =
      std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Shorts = py::array_t<int16_t, py::array::c_style>;

spkfast::LogMelFbankSettings settings(const std::vector<int64_t>& integers,
                                      const std::vector<double>& floats) {
  if (integers.size() != spkfast::LogMelFbankSettings::kIntegers ||
      floats.size() != spkfast::LogMelFbankSettings::kFloats)
    throw std::invalid_argument("integers and floats must be those of Settings");
  return {integers.data(), floats.data()};
}

spkfast::cpu::LogMelFbankTables tables(const Floats& window, const Floats& mel,
                                       const std::optional<Floats>& cosines) {
  return {
      .window = window.data(),
      .frame_length = window.shape(0),
      .mel = mel.data(),
      .num_mels = mel.shape(0),
      .cosines = cosines ? cosines->data() : nullptr,
      .num_cosines = cosines ? cosines->shape(0) : 0,
  };
}

// Calls `use` with the samples as a one-dimensional array of float or int16.
template <typename Use>
void with_samples(const py::handle& samples, Use&& use) {
  const auto checked = [&](const auto& array) {
    if (array.ndim() != 1)
      throw std::invalid_argument("samples must have one dimension, got " +
                                  std::to_string(array.ndim()));
    use(array.data(), static_cast<int64_t>(array.shape(0)));
  };
  if (py::isinstance<Floats>(samples)) return checked(py::reinterpret_borrow<Floats>(samples));
  if (py::isinstance<Shorts>(samples)) return checked(py::reinterpret_borrow<Shorts>(samples));
  const auto array = py::array::ensure(samples);
  if (array && array.dtype().kind() == 'f') return checked(Floats(array));
  if (array && array.dtype().is(py::dtype::of<int16_t>())) return checked(Shorts(array));
  if (array && array.dtype().kind() == 'i' && array.itemsize() == 2)  // in another byte order
    return checked(Shorts(array.attr("astype")("int16")));
  const std::string found = array ? py::str(array.dtype()).cast<std::string>()
                                  : std::string(Py_TYPE(samples.ptr())->tp_name);
  throw std::invalid_argument("samples must be an array of floats or of int16, got " + found);
}

class Stream {
 public:
  Stream(const std::vector<int64_t>& integers, const std::vector<double>& floats,
         const Floats& window, const Floats& mel, const std::optional<Floats>& cosines)
      : stream_(settings(integers, floats), tables(window, mel, cosines), spkfast::cpu::level()) {}

  py::array_t<float> push(const py::handle& samples) {
    with_samples(samples, [&](const auto* values, int64_t count) { stream_.push(values, count); });
    return take();
  }

  py::array_t<float> flush() {
    stream_.end();
    py::array_t<float> features = take();
    stream_.reset();
    return features;
  }

  void reset() { stream_.reset(); }

 private:
  py::array_t<float> take() {
    const int64_t ready = stream_.ready();
    py::array_t<float> features({ready, stream_.size()});
    if (ready > 0 && !stream_.take(features.mutable_data())) {
      stream_.reset();
      throw std::invalid_argument(
          "samples hold a NaN or infinite value: mend or drop that audio; the stream starts again");
    }
    return features;
  }

  spkfast::cpu::LogMelFbankStream stream_;
};

class Fbank {
 public:
  Fbank(const std::vector<int64_t>& integers, const std::vector<double>& floats,
        const Floats& window, const Floats& mel, const std::optional<Floats>& cosines)
      : fbank_(settings(integers, floats), tables(window, mel, cosines), spkfast::cpu::level()) {}

  py::array_t<float> compute(const py::handle& samples) const {
    py::array_t<float> features;
    with_samples(samples, [&](const auto* values, int64_t length) {
      int64_t frames = fbank_.settings().count_frames(length);
      const int64_t padded = fbank_.settings().padded_frames(length);
      features = py::array_t<float>({padded, fbank_.plan().size});
      spkfast::cpu::LogMelFbankBatch batch = {};
      if constexpr (std::is_same_v<decltype(values), const float*>) {
        batch.floats = values;
      } else {
        batch.shorts = values;
      }
      batch.lengths = &length;
      batch.features = features.mutable_data();
      batch.frame_lengths = &frames;
      batch.batch = 1;
      batch.samples = length;
      batch.frames = padded;
      const py::gil_scoped_release release;
      const int64_t bad = run_log_mel_fbank(
          fbank_, batch,
          [](int64_t begin, int64_t end, int64_t, const auto& body) { body(begin, end); });
      if (bad >= 0)
        throw std::invalid_argument(
            "samples hold a NaN or infinite value: mend or drop that audio");
    });
    return features;
  }

 private:
  spkfast::cpu::LogMelFbank fbank_;
};

// The bytes of an object, which cannot free or move them as long as this lives.
class HeldBytes {
 public:
  explicit HeldBytes(const py::object& object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~HeldBytes() { PyBuffer_Release(&view_); }
  HeldBytes(const HeldBytes&) = delete;
  HeldBytes& operator=(const HeldBytes&) = delete;

  spkfast::cpu::FlacBytes flac() const {
    return {static_cast<const uint8_t*>(view_.buf), static_cast<int64_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

class Flac {
 public:
  explicit Flac(const py::object& bytes)
      : held_(std::make_unique<HeldBytes>(bytes)), stream_(held_->flac()) {}
  Flac(int descriptor, int64_t offset, int64_t size) : stream_({descriptor, offset, size}) {}

  const std::string& unsupported() const { return stream_.unsupported(); }
  int64_t samples() const { return stream_.samples(); }
  int64_t sample_rate() const { return stream_.sample_rate(); }

  py::array_t<int16_t> read(int64_t start, int64_t count) {
    py::array_t<int16_t> samples(std::max<int64_t>(count, 0));
    int16_t* const out = samples.mutable_data();
    const py::gil_scoped_release release;
    stream_.read(start, count, out);
    return samples;
  }

 private:
  std::unique_ptr<HeldBytes> held_;
  spkfast::cpu::FlacStream stream_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "What spkfast was built with, what this CPU can do, features of arrays and streams, and "
      "crops of FLAC files.";
  m.def("build_info", &build_info,
        "Compiler, flags and versions of the build, as a dictionary of strings.");
  m.def(
      "cpu_level", [] { return std::string(spkfast::cpu::name(spkfast::cpu::level())); },
      "Instruction level that CPU kernels use: scalar, avx2, avx512 or avx512bf16.");
  using Init =
      py::detail::initimpl::constructor<const std::vector<int64_t>&, const std::vector<double>&,
                                        const Floats&, const Floats&, const std::optional<Floats>&>;
  py::class_<Fbank>(m, "Fbank", "See spkfast.NumpyFbank.")
      .def(Init(), py::arg("integers"), py::arg("floats"), py::arg("window"), py::arg("mel"),
           py::arg("cosines"))
      .def("compute", &Fbank::compute, py::arg("samples"), "Features (T, D) of samples (S,).");
  py::class_<Stream>(m, "FbankStream", "See spkfast.StreamingFbank.")
      .def(Init(), py::arg("integers"), py::arg("floats"), py::arg("window"), py::arg("mel"),
           py::arg("cosines"))
      .def("push", &Stream::push, py::arg("samples"), "New frames (t, D) after these samples.")
      .def("flush", &Stream::flush, "The remaining frames (t, D); then starts again.")
      .def("reset", &Stream::reset, "Starts again.");
  py::class_<Flac>(m, "Flac", "See spkfast.data.flac.")
      .def(py::init<const py::object&>(), py::arg("bytes"))
      .def(py::init<int, int64_t, int64_t>(), py::arg("descriptor"), py::arg("offset"),
           py::arg("size"))
      .def_property_readonly("unsupported", &Flac::unsupported,
                             "Why another decoder has to read it, or an empty string.")
      .def_property_readonly("samples", &Flac::samples)
      .def_property_readonly("sample_rate", &Flac::sample_rate)
      .def("read", &Flac::read, py::arg("start"), py::arg("count"), "Samples (n,), int16.");
  spkfast::add_module_functions(m);
}
