// The Python face of astra_core: buffers in, buffers out, nothing allocated and no array library
// needed. A "memory" argument is a C-contiguous buffer (numpy array, bytes, memoryview, ...) or,
// for libraries whose tensors are no buffers, a tuple (address, element count) that the caller
// vouches for.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <string>

#include "astra/bitpack.hpp"
#include "astra/encode.hpp"

namespace py = pybind11;

namespace {

// Handing over the GIL can cost a thread switch of milliseconds; below this many codes the work
// takes a few microseconds at most and is not worth one.
constexpr std::size_t kReleaseFrom = 32768;

enum class Element { kUint8, kInt32 };

std::string type_name(py::handle value) { return Py_TYPE(value.ptr())->tp_name; }

// Holds a Py_buffer for as long as its memory is used.
class Memory {
 public:
  Memory(py::handle source, const char* name, Element element, bool writable) {
    if (PyTuple_Check(source.ptr())) {
      const auto pair = py::reinterpret_borrow<py::tuple>(source);
      if (pair.size() != 2) throw py::type_error(std::string(name) + " must be (address, count)");
      address_ = reinterpret_cast<void*>(pair[0].cast<std::uintptr_t>());
      count_ = pair[1].cast<std::size_t>();
      return;
    }
    const int flags = PyBUF_FORMAT | PyBUF_ND;
    if (!PyObject_CheckBuffer(source.ptr())) {
      throw py::type_error(std::string(name) + " must be a " + what(element, writable) + ", got " +
                           type_name(source));
    }
    // PyBUF_ND without strides is granted only for C-contiguous memory.
    if (PyObject_GetBuffer(source.ptr(), &view_, flags | (writable ? PyBUF_WRITABLE : 0)) != 0) {
      PyErr_Clear();
      throw py::value_error(std::string(name) + " must be a " + what(element, writable) + ", got " +
                            describe_refused(source, flags, writable));
    }
    held_ = true;
    if (!matches(element)) {
      const std::string format = view_.format == nullptr ? "B" : view_.format;
      PyBuffer_Release(&view_);
      held_ = false;
      throw py::type_error(std::string(name) + " must be a " + what(element, writable) +
                           ", got elements of format '" + format + "'");
    }
    address_ = view_.buf;
    count_ = static_cast<std::size_t>(view_.len / view_.itemsize);
  }

  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  ~Memory() {
    if (held_) PyBuffer_Release(&view_);
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(address_);
  }
  std::size_t count() const { return count_; }

 private:
  static std::string what(Element element, bool writable) {
    return std::string(writable ? "writable " : "") + "contiguous buffer of " +
           (element == Element::kInt32 ? "int32" : "uint8");
  }

  static std::string describe_refused(py::handle source, int flags, bool writable) {
    Py_buffer probe;
    const bool readable = PyObject_GetBuffer(source.ptr(), &probe, flags) == 0;
    if (readable) PyBuffer_Release(&probe);
    PyErr_Clear();
    return (readable && writable ? "a read-only " : "a non-contiguous ") + type_name(source);
  }

  bool matches(Element element) const {
    const char* format = view_.format == nullptr ? "B" : view_.format;
    if (*format == '@' || *format == '=' || *format == '<') ++format;
    if (std::strlen(format) != 1) return false;
    return element == Element::kInt32 ? (*format == 'i' || *format == 'l') && view_.itemsize == 4
                                      : *format == 'B';
  }

  Py_buffer view_{};
  bool held_ = false;
  void* address_ = nullptr;
  std::size_t count_ = 0;
};

template <class Work>
void run(std::size_t count, Work work) {
  if (count < kReleaseFrom) {
    work();
  } else {
    const py::gil_scoped_release release;
    work();
  }
}

py::ssize_t integer(const char* name, py::handle value) {
  if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr())) {
    throw py::type_error(std::string(name) + " must be an integer, got " + type_name(value));
  }
  // Values beyond ssize_t are clipped, and refused as any other that is too large.
  const py::ssize_t number = PyNumber_AsSsize_t(value.ptr(), nullptr);
  if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

int width(py::handle bits) {
  // Clamped to what an int holds; the core refuses all of these alike.
  return static_cast<int>(std::clamp<py::ssize_t>(integer("bits", bits), INT_MIN, INT_MAX));
}

std::size_t whole(const char* name, py::handle value) {
  const py::ssize_t number = integer(name, value);
  if (number < 0) {
    throw py::value_error(std::string(name) + " must be 0 or more, got " + std::to_string(number));
  }
  return static_cast<std::size_t>(number);
}

std::size_t packed_size(py::handle count, py::handle bits) {
  return astra::packed_size(whole("count", count), width(bits));
}

void pack(py::handle codes_source, py::handle bits_given, py::handle out_target) {
  const int bits = width(bits_given);
  const Memory codes(codes_source, "codes", Element::kInt32, false);
  const Memory out(out_target, "out", Element::kUint8, true);
  run(codes.count(), [&] {
    astra::pack(codes.as<std::int32_t>(), codes.count(), bits, out.as<std::uint8_t>(), out.count());
  });
}

void unpack(py::handle data_source, py::handle bits_given, py::handle count_given,
            py::handle out_target) {
  const int bits = width(bits_given);
  const std::size_t count = whole("count", count_given);
  const Memory data(data_source, "data", Element::kUint8, false);
  const Memory out(out_target, "out", Element::kInt32, true);
  if (out.count() < count) {
    throw py::value_error("out must hold at least " + std::to_string(count) + " codes, got " +
                          std::to_string(out.count()));
  }
  run(count, [&] {
    astra::unpack(data.as<std::uint8_t>(), data.count(), bits, out.as<std::int32_t>(), count);
  });
}

void encode(std::uintptr_t vectors, std::uintptr_t codebook, std::size_t rows, std::size_t groups,
            std::size_t codewords, std::size_t vector_width, std::uintptr_t codes,
            unsigned threads) {
  const py::gil_scoped_release release;
  astra::encode(reinterpret_cast<const float*>(vectors), reinterpret_cast<const float*>(codebook),
                {rows, groups, vector_width, codewords}, reinterpret_cast<std::int32_t*>(codes),
                threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of astra_kernels; see csrc/include/astra/ for the contracts.";
  module.attr("version") = ASTRA_VERSION;
  module.def("packed_size", &packed_size, py::arg("count"), py::arg("bits"));
  module.def("pack", &pack, py::arg("codes"), py::arg("bits"), py::arg("out"));
  module.def("unpack", &unpack, py::arg("data"), py::arg("bits"), py::arg("count"), py::arg("out"));
  module.def("encode", &encode, py::arg("vectors"), py::arg("codebook"), py::arg("rows"),
             py::arg("groups"), py::arg("codewords"), py::arg("width"), py::arg("codes"),
             py::arg("threads"));
  module.def("isa", &astra::isa);
  module.def("available_isas", [] {
    py::list names;
    for (const std::string& name : astra::available_isas()) names.append(name);
    return names;
  });
  module.def("set_isa", &astra::set_isa, py::arg("name"));
}
