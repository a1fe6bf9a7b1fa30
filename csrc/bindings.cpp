// The Python face of astra_core: buffers in, buffers out, nothing allocated and no array library
// needed. A "memory" argument is a C-contiguous buffer (numpy array, bytes, memoryview, ...) or,
// for libraries whose tensors are no buffers, a tuple (address, element count) that the caller
// vouches for.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <system_error>

#include "astra/attention.hpp"
#include "astra/bitpack.hpp"
#include "astra/elementwise.hpp"
#include "astra/encode.hpp"
#include "astra/frame.hpp"
#include "astra/keeper.hpp"
#include "astra/linear.hpp"
#include "astra/product.hpp"

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

template <std::size_t kCount>
std::array<std::size_t, kCount> sizes(const char* name, const py::tuple& given) {
  if (given.size() != kCount) {
    throw py::type_error(std::string(name) + " must be a tuple of " + std::to_string(kCount));
  }
  std::array<std::size_t, kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) {
    values[i] = whole(name, PyTuple_GET_ITEM(given.ptr(), static_cast<py::ssize_t>(i)));
  }
  return values;
}

astra::HeadStrides strides(const char* name, const py::tuple& given) {
  const auto values = sizes<3>(name, given);
  return {values[0], values[1], values[2]};
}

// A tensor: its address and the strides of its batch, head and row.
struct Heads {
  Heads(const char* name, const py::tuple& given) {
    if (given.size() != 2) throw py::type_error(std::string(name) + " must be (address, strides)");
    address = reinterpret_cast<void*>(given[0].cast<std::uintptr_t>());
    by = strides(name, given[1].cast<py::tuple>());
  }
  void* address;
  astra::HeadStrides by;
};

// By astra::Storage.
constexpr const char* kStorages[] = {"float32", "bfloat16", "float16"};

astra::Storage storage_of(int storage) {
  if (storage < 0 || storage >= static_cast<int>(std::size(kStorages))) {
    throw py::value_error("storage must be an index of attention_dtypes(), got " +
                          std::to_string(storage));
  }
  return static_cast<astra::Storage>(storage);
}

astra::Queries queries_of(const py::tuple& shape, const py::tuple& query, const py::tuple& out,
                          std::uintptr_t lse, float scale, std::uintptr_t sinks, unsigned threads,
                          const std::string& isa, int storage) {
  const auto [batch, heads, kv_heads, rows, width, value_width] = sizes<6>("shape", shape);
  const Heads q("query", query);
  const Heads o("out", out);
  astra::Queries queries{};
  queries.shape = {batch, heads, kv_heads, rows, width, value_width};
  queries.query = q.address;
  queries.query_strides = q.by;
  queries.out = o.address;
  queries.out_strides = o.by;
  queries.lse = reinterpret_cast<float*>(lse);
  queries.scale = scale;
  queries.sinks = reinterpret_cast<const float*>(sinks);
  queries.threads = threads;
  queries.isa = isa.c_str();
  queries.storage = storage_of(storage);
  return queries;
}

std::size_t scores_of(const astra::AttentionShape& shape, std::size_t keys) {
  return shape.batch * shape.heads * shape.rows * keys;
}

// (count, key, value, mask, is_causal)
astra::DenseKeys dense_of(const py::tuple& given) {
  if (given.size() != 5) throw py::type_error("dense must be a tuple of 5");
  const Heads key("key", given[1].cast<py::tuple>());
  const Heads value("value", given[2].cast<py::tuple>());
  const auto mask = given[3].cast<std::uintptr_t>();
  return {whole("count", given[0]),
          key.address,
          key.by,
          value.address,
          value.by,
          reinterpret_cast<const std::uint8_t*>(mask),
          given[4].cast<bool>()};
}

// (address, bits, codes of a token, stride of a batch row)
astra::TokenCodes codes_of(const py::tuple& given) {
  const auto [address, bits, per_token, stride] = sizes<4>("codes", given);
  return {reinterpret_cast<const void*>(address), static_cast<int>(bits), per_token, stride};
}

// (address, stages, groups, codewords)
astra::CodeTable table_of(const py::tuple& given) {
  const auto [address, stages, groups, codewords] = sizes<4>("table", given);
  return {reinterpret_cast<const float*>(address), stages, groups, codewords};
}

// (count, key codes, key table, value codes, value table, cos, sin, stride of their batch row,
// mask, and maybe how the angles are stored)
astra::CodedKeys coded_of(const py::tuple& given) {
  if (given.size() != 9 && given.size() != 10) {
    throw py::type_error("coded must be a tuple of 9 or 10");
  }
  const auto address = [&](std::size_t i) { return given[i].cast<std::uintptr_t>(); };
  return {whole("count", given[0]),
          codes_of(given[1].cast<py::tuple>()),
          table_of(given[2].cast<py::tuple>()),
          codes_of(given[3].cast<py::tuple>()),
          table_of(given[4].cast<py::tuple>()),
          reinterpret_cast<const void*>(address(5)),
          reinterpret_cast<const void*>(address(6)),
          whole("rope_stride", given[7]),
          reinterpret_cast<const std::uint8_t*>(address(8)),
          given.size() == 10 ? storage_of(given[9].cast<int>()) : astra::Storage::kFloat32};
}

void attention(const py::tuple& shape, const py::tuple& query, const py::tuple& dense_given,
               const py::tuple& out, std::uintptr_t lse, float scale, std::uintptr_t sinks,
               unsigned threads, const std::string& isa, int storage, bool rounded) {
  auto queries = queries_of(shape, query, out, lse, scale, sinks, threads, isa, storage);
  queries.rounded = rounded;
  const astra::DenseKeys dense = dense_of(dense_given);
  run(scores_of(queries.shape, dense.count), [&] { astra::attention(queries, dense); });
}

int coded_attention(const py::tuple& shape, const py::tuple& query, const py::tuple& coded_given,
                    const py::tuple& out, std::uintptr_t lse, float scale, std::uintptr_t sinks,
                    unsigned threads, const std::string& isa, int storage, bool rounded) {
  auto queries = queries_of(shape, query, out, lse, scale, sinks, threads, isa, storage);
  queries.rounded = rounded;
  const astra::CodedKeys coded = coded_of(coded_given);
  astra::CodesFound found{};
  run(scores_of(queries.shape, coded.count),
      [&] { found = astra::coded_attention(queries, coded); });
  return static_cast<int>(found);
}

int mixed_attention(const py::tuple& shape, const py::tuple& query, const py::tuple& dense_given,
                    const py::tuple& coded_given, const py::tuple& out, std::uintptr_t lse,
                    float scale, std::uintptr_t sinks, unsigned threads, const std::string& isa,
                    int storage) {
  const auto queries = queries_of(shape, query, out, lse, scale, sinks, threads, isa, storage);
  const astra::DenseKeys dense = dense_of(dense_given);
  const astra::CodedKeys coded = coded_of(coded_given);
  astra::CodesFound found{};
  run(scores_of(queries.shape, dense.count + coded.count),
      [&] { found = astra::mixed_attention(queries, dense, coded); });
  return static_cast<int>(found);
}

astra::LinearWeights linear_weights(std::uintptr_t values, std::uintptr_t scales,
                                    std::uintptr_t minima, std::uintptr_t bias, int bits,
                                    bool half_scales) {
  return {reinterpret_cast<const void*>(values),
          reinterpret_cast<const void*>(scales),
          reinterpret_cast<const void*>(minima),
          reinterpret_cast<const float*>(bias),
          bits,
          half_scales};
}

void quantized_linear(std::uintptr_t x, std::uintptr_t values, std::uintptr_t scales,
                      std::uintptr_t minima, std::uintptr_t bias, std::uintptr_t out,
                      std::size_t rows, std::size_t inputs, std::size_t outputs, std::size_t groups,
                      int bits, bool half_scales, unsigned threads, const char* isa) {
  const py::gil_scoped_release release;
  const auto weights = linear_weights(values, scales, minima, bias, bits, half_scales);
  astra::quantized_linear(reinterpret_cast<const float*>(x), weights,
                          {rows, inputs, outputs, groups}, reinterpret_cast<float*>(out), threads,
                          isa);
}

// parts: values, scales, minima, bias, out, outputs, bits and half_scales of each
void quantized_linears(std::uintptr_t x, const py::list& parts_given, std::size_t rows,
                       std::size_t inputs, std::size_t groups, unsigned threads) {
  std::vector<astra::LinearPart> parts;
  for (const py::handle given : parts_given) {
    const auto part =
        given.cast<std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                              std::uintptr_t, std::size_t, int, bool>>();
    const auto [values, scales, minima, bias, out, outputs, bits, half_scales] = part;
    parts.push_back({linear_weights(values, scales, minima, bias, bits, half_scales), outputs,
                     reinterpret_cast<float*>(out)});
  }
  const py::gil_scoped_release release;
  astra::quantized_linears(reinterpret_cast<const float*>(x), parts, {rows, inputs, 0, groups},
                           threads);
}

// Addresses of contiguous fp32, for which the caller vouches.
void rms_norm(std::uintptr_t x, std::uintptr_t weight, std::size_t rows, std::size_t width,
              float eps, std::uintptr_t out, unsigned threads) {
  run(rows * width, [&] {
    astra::rms_norm(reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(weight), rows,
                    width, eps, reinterpret_cast<float*>(out), threads);
  });
}

void gated_silu(std::uintptr_t gate, std::uintptr_t up, std::size_t count, std::uintptr_t out,
                unsigned threads) {
  run(count, [&] {
    astra::gated_silu(reinterpret_cast<const float*>(gate), reinterpret_cast<const float*>(up),
                      count, reinterpret_cast<float*>(out), threads);
  });
}

void product(std::uintptr_t x, std::uintptr_t weights, std::uintptr_t bias, std::size_t rows,
             std::size_t inputs, std::size_t outputs, std::uintptr_t out, unsigned threads,
             bool add, bool rounded) {
  const auto floats = [](std::uintptr_t at) { return reinterpret_cast<const float*>(at); };
  const astra::ProductShape shape{rows, inputs, outputs};
  auto* to = reinterpret_cast<float*>(out);
  run(rows * inputs, [&] {
    if (rounded) {
      const auto* halves = reinterpret_cast<const std::uint16_t*>(weights);
      astra::product_of_rounded(floats(x), halves, floats(bias), shape, to, threads, add);
    } else {
      astra::product(floats(x), floats(weights), floats(bias), shape, to, threads, add);
    }
  });
}

astra::RowStrides row_strides(const astra::HeadStrides& strides) {
  return {strides.batch, strides.head, strides.row};
}

// shape: batch, heads, tokens, width, angle_stride
void rotate(const py::tuple& shape_given, const py::tuple& x_given, std::uintptr_t cos,
            std::uintptr_t sin, const py::tuple& out_given, unsigned threads) {
  const auto [batch, heads, tokens, width, angle_stride] = sizes<5>("shape", shape_given);
  const Heads x("x", x_given);
  const Heads out("out", out_given);
  const astra::RotateShape shape{batch, heads, tokens, width, angle_stride};
  run(batch * heads * tokens * width, [&] {
    astra::rotate(static_cast<const float*>(x.address), row_strides(x.by),
                  reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), shape,
                  static_cast<float*>(out.address), row_strides(out.by), threads);
  });
}

void merge_state(std::uintptr_t out_a, std::uintptr_t lse_a, std::uintptr_t out_b,
                 std::uintptr_t lse_b, std::size_t rows, std::size_t width, std::uintptr_t out,
                 std::uintptr_t lse, unsigned threads) {
  const auto read = [](std::uintptr_t address) { return reinterpret_cast<const float*>(address); };
  run(rows * width, [&] {
    astra::merge_state(read(out_a), read(lse_a), read(out_b), read(lse_b), rows, width,
                       reinterpret_cast<float*>(out), reinterpret_cast<float*>(lse), threads);
  });
}

// A side: ((address, strides) of out, (address, strides) of lse)
astra::PartialState side_of(const py::tuple& given) {
  if (given.size() != 2) throw py::type_error("a side must be (out, lse)");
  const Heads out("out", given[0].cast<py::tuple>());
  const Heads lse("lse", given[1].cast<py::tuple>());
  return {static_cast<float*>(out.address), row_strides(out.by), static_cast<float*>(lse.address),
          row_strides(lse.by)};
}

// shape: batch, heads, tokens, width
void merge_into(const py::tuple& shape_given, const py::tuple& one, const py::tuple& other,
                unsigned threads) {
  const auto [batch, heads, tokens, width] = sizes<4>("shape", shape_given);
  const astra::StateShape shape{batch, heads, tokens, width};
  const auto into = side_of(one), from = side_of(other);
  run(batch * heads * tokens * width, [&] { astra::merge_into(into, from, shape, threads); });
}

bool all_finite(const py::tuple& shape_given, const py::tuple& x_given) {
  const auto [batch, heads, tokens, width] = sizes<4>("shape", shape_given);
  const Heads x("x", x_given);
  const astra::StateShape shape{batch, heads, tokens, width};
  bool finite = false;
  run(batch * heads * tokens * width, [&] {
    finite = astra::all_finite(static_cast<const float*>(x.address), row_strides(x.by), shape);
  });
  return finite;
}

// shape: rows, groups, codewords, width
bool look_up(const py::tuple& shape_given, std::uintptr_t codes, std::uintptr_t tables,
             std::uintptr_t out) {
  const auto [rows, groups, codewords, vector_width] = sizes<4>("shape", shape_given);
  bool found = false;
  run(rows * groups * vector_width, [&] {
    found = astra::look_up(reinterpret_cast<const std::int32_t*>(codes),
                           reinterpret_cast<const float*>(tables), rows, groups, codewords,
                           vector_width, reinterpret_cast<float*>(out));
  });
  return found;
}

// shape: rows, groups, codewords, width
bool add_rows(const py::tuple& shape_given, std::uintptr_t codes, std::uintptr_t tables,
              std::uintptr_t out, unsigned threads) {
  const auto [rows, groups, codewords, vector_width] = sizes<4>("shape", shape_given);
  bool found = false;
  run(rows * groups * vector_width, [&] {
    found = astra::add_rows(reinterpret_cast<const std::int32_t*>(codes),
                            reinterpret_cast<const std::uint16_t*>(tables), rows, groups, codewords,
                            vector_width, reinterpret_cast<float*>(out), threads);
  });
  return found;
}

// Bytes that somebody sent, in any contiguous buffer. Called for every frame: nothing but the
// address and the size is asked for.
class Bytes {
 public:
  explicit Bytes(py::handle source) {
    if (PyObject_GetBuffer(source.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { PyBuffer_Release(&view_); }

  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::int64_t field(py::handle value) {
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

int check_header(py::handle data, const py::tuple& expected) {
  if (expected.size() != 7) throw py::type_error("expected must be a header of seven fields");
  const auto at = [&](std::size_t i) {
    return field(PyTuple_GET_ITEM(expected.ptr(), static_cast<py::ssize_t>(i)));
  };
  const astra::wire::Expected header{at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
  const Bytes bytes(data);
  return static_cast<int>(astra::wire::check_header(bytes.data(), bytes.size(), header));
}

bool is_bye(py::handle data, py::handle source) {
  const Bytes bytes(data);
  return astra::wire::is_bye(bytes.data(), bytes.size(), field(source));
}

int judge_prefix(py::handle data) {
  const Bytes bytes(data);
  return static_cast<int>(astra::wire::judge_prefix(bytes.data(), bytes.size()));
}

py::tuple read_hello(py::handle data) {
  const Bytes bytes(data);
  astra::wire::Hello hello;
  const auto verdict = astra::wire::read_hello(bytes.data(), bytes.size(), hello);
  const auto* run = reinterpret_cast<const char*>(hello.run.data());
  return py::make_tuple(static_cast<int>(verdict), hello.version, hello.world_size, hello.rank,
                        hello.to, hello.reason_size, py::bytes(run, hello.run.size()));
}

py::tuple read_facts(py::handle data) {
  const Bytes bytes(data);
  std::array<astra::wire::Text, astra::wire::kMaxTexts> texts;
  const auto facts = astra::wire::read_facts(bytes.data(), bytes.size(), texts);
  py::list strings;
  if (facts.error == astra::wire::FactsError::kNone) {
    for (std::size_t i = 0; i < facts.count; ++i) {
      const auto* start = reinterpret_cast<const char*>(bytes.data() + texts[i].offset);
      strings.append(py::str(start, texts[i].size));
    }
  }
  return py::make_tuple(static_cast<int>(facts.error), facts.position, strings);
}

py::tuple read_codes(py::handle data_source, py::handle bits, py::handle codewords,
                     py::handle count_given, py::handle out_target) {
  const std::size_t count = whole("count", count_given);
  const Memory data(data_source, "data", Element::kUint8, false);
  const Memory out(out_target, "out", Element::kInt32, true);
  if (out.count() < count) {
    throw py::value_error("out must hold at least " + std::to_string(count) + " codes, got " +
                          std::to_string(out.count()));
  }
  const auto bound = static_cast<std::int32_t>(
      std::clamp<py::ssize_t>(integer("codewords", codewords), 0, INT_MAX));
  const int wide = width(bits);
  astra::wire::Codes found;
  run(count, [&] {
    found = astra::wire::read_codes(data.as<std::uint8_t>(), data.count(), wide, bound,
                                    out.as<std::int32_t>(), count);
  });
  const bool beyond = found.error == astra::wire::CodesError::kCode;
  return py::make_tuple(static_cast<int>(found.error),
                        beyond ? out.as<std::int32_t>()[found.index] : 0);
}

std::unique_ptr<astra::Keeper> keeper() {
  try {
    return std::make_unique<astra::Keeper>();
  } catch (const std::system_error& error) {
    const py::tuple facts = py::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, facts.ptr());
    throw py::error_already_set();
  }
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
  module.def("attention", &attention, py::arg("shape"), py::arg("query"), py::arg("dense"),
             py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("sinks"), py::arg("threads"),
             py::arg("isa") = "", py::arg("storage") = 0, py::arg("rounded") = false);
  module.def("coded_attention", &coded_attention, py::arg("shape"), py::arg("query"),
             py::arg("coded"), py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("sinks"),
             py::arg("threads"), py::arg("isa") = "", py::arg("storage") = 0,
             py::arg("rounded") = false);
  module.def("mixed_attention", &mixed_attention, py::arg("shape"), py::arg("query"),
             py::arg("dense"), py::arg("coded"), py::arg("out"), py::arg("lse"), py::arg("scale"),
             py::arg("sinks"), py::arg("threads"), py::arg("isa") = "", py::arg("storage") = 0);
  module.def("attention_dtypes", [] {
    py::list names;
    for (const char* name : kStorages) names.append(name);
    return names;
  });
  module.def("attention_rounds", &astra::attention_rounds);
  module.def("attention_isas", [] {
    py::list names;
    for (const std::string& name : astra::attention_isas()) names.append(name);
    return names;
  });
  module.def("quantized_linear", &quantized_linear, py::arg("x"), py::arg("values"),
             py::arg("scales"), py::arg("minima"), py::arg("bias"), py::arg("out"), py::arg("rows"),
             py::arg("inputs"), py::arg("outputs"), py::arg("groups"), py::arg("bits"),
             py::arg("half_scales"), py::arg("threads"), py::arg("isa") = py::none());
  module.def("quantized_linears", &quantized_linears, py::arg("x"), py::arg("parts"),
             py::arg("rows"), py::arg("inputs"), py::arg("groups"), py::arg("threads"));
  module.def("linear_isas", [] {
    py::list names;
    for (const std::string& name : astra::linear_isas()) names.append(name);
    return names;
  });
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("rows"),
             py::arg("width"), py::arg("eps"), py::arg("out"), py::arg("threads"));
  module.def("gated_silu", &gated_silu, py::arg("gate"), py::arg("up"), py::arg("count"),
             py::arg("out"), py::arg("threads"));
  module.def("product_isa", [] { return std::string(astra::product_isa()); });
  module.def("product_suits_many_rows", &astra::product_suits_many_rows);
  module.def("product", &product, py::arg("x"), py::arg("weights"), py::arg("bias"),
             py::arg("rows"), py::arg("inputs"), py::arg("outputs"), py::arg("out"),
             py::arg("threads"), py::arg("add") = false, py::arg("rounded") = false);
  module.def("product_rounds", &astra::product_rounds);
  module.def("rotate", &rotate, py::arg("shape"), py::arg("x"), py::arg("cos"), py::arg("sin"),
             py::arg("out"), py::arg("threads"));
  module.def("merge_state", &merge_state, py::arg("out_a"), py::arg("lse_a"), py::arg("out_b"),
             py::arg("lse_b"), py::arg("rows"), py::arg("width"), py::arg("out"), py::arg("lse"),
             py::arg("threads"));
  module.def("merge_into", &merge_into, py::arg("shape"), py::arg("one"), py::arg("other"),
             py::arg("threads"));
  module.def("all_finite", &all_finite, py::arg("shape"), py::arg("x"));
  module.def("look_up", &look_up, py::arg("shape"), py::arg("codes"), py::arg("tables"),
             py::arg("out"));
  module.def("add_rows", &add_rows, py::arg("shape"), py::arg("codes"), py::arg("tables"),
             py::arg("out"), py::arg("threads"));
  module.def("check_header", &check_header, py::arg("data"), py::arg("expected"));
  module.def("is_bye", &is_bye, py::arg("data"), py::arg("source"));
  module.def("judge_prefix", &judge_prefix, py::arg("data"));
  module.def("read_hello", &read_hello, py::arg("data"));
  module.def("read_facts", &read_facts, py::arg("data"));
  module.def("read_codes", &read_codes, py::arg("data"), py::arg("bits"), py::arg("codewords"),
             py::arg("count"), py::arg("out"));
  py::class_<astra::Keeper>(module, "Keeper")
      .def(py::init(&keeper))
      .def_property_readonly("pid", &astra::Keeper::pid);
  module.def("isa", &astra::isa);
  module.def("available_isas", [] {
    py::list names;
    for (const std::string& name : astra::available_isas()) names.append(name);
    return names;
  });
  module.def("set_isa", &astra::set_isa, py::arg("name"));
}
