#include "astra/product.hpp"

#include <algorithm>
#include <stdexcept>

#include "arena.hpp"
#include "pool.hpp"
#include "processor.hpp"
#include "product_kernel.hpp"

namespace astra {
namespace {

using detail::kPanelVectors;
using detail::ProductGroup;
using detail::ProductKernels;

constexpr std::size_t kMostInputs = 768;      // of a pass: longer sums are less exact
constexpr std::size_t kPanelFloats = 147456;  // of the rows of a pass, which so stay in L2
constexpr std::size_t kGroupsOfUnit = 4;      // of columns: a thread's next piece of work
constexpr std::size_t kMostSingleRows = 2;    // behind the last whole vector of rows

const ProductKernels& kernels([[maybe_unused]] bool rounded) {
#ifdef ASTRA_HAVE_AVX512
  if (rounded && product_rounds()) return detail::kProductBfloat16;
  if (__builtin_cpu_supports("avx512f")) return detail::kProductAvx512;
#endif
  return detail::kProductPortable;
}

std::size_t in_parts(std::size_t count, std::size_t part) { return (count + part - 1) / part; }

// Rows [first_row, first_row + rows) with inputs [first_input, first_input + inputs). Of the rows,
// the first `whole` are in panels; a vector for one or two more would cost as much as a full one.
struct Pass {
  const ProductKernels& kernels;
  const float* x;
  const float* weights;
  const float* bias;
  float* out;
  ProductShape shape;
  unsigned threads;
  bool add;
  std::size_t first_row, rows, whole, first_input, inputs;
  float* panels;

  std::size_t panel_rows() const { return kPanelVectors * kernels.lanes; }
  std::size_t panel_count() const { return in_parts(whole, panel_rows()); }
  float* panel(std::size_t index) const { return panels + index * panel_rows() * inputs; }
  // Lanes of a row of weights.
  std::size_t stride() const { return in_parts(shape.inputs, kernels.pair); }
  const float* weights_of(std::size_t column) const {
    return weights + column * stride() + first_input / kernels.pair;
  }
  const float* row(std::size_t index) const {
    return x + (first_row + index) * shape.inputs + first_input;
  }

  void order(std::size_t index) const {
    const std::size_t first = index * panel_rows();
    kernels.order(row(first), shape.inputs, std::min(panel_rows(), whole - first), inputs,
                  panel(index));
  }

  void columns(std::size_t group_index) const {
    const std::size_t first = group_index * kernels.group;
    if (first >= shape.outputs) return;
    const std::size_t tiles = panel_count() * (kernels.group / kernels.tile);
    ProductGroup group{};
    group.weights = weights_of(first);
    group.stride = stride();
    group.inputs = in_parts(inputs, kernels.pair);
    group.columns = std::min(kernels.group, shape.outputs - first);
    group.bias = bias == nullptr || first_input != 0 ? nullptr : bias + first;
    group.add = add || first_input != 0;
    group.out_stride = shape.outputs;
    group.lines = tiles == 0 ? 0 : in_parts(kernels.group, tiles);
    const std::size_t next = first + kernels.group;
    const std::size_t after = std::min(next + kernels.group, shape.outputs);
    group.ahead = next < shape.outputs ? weights_of(next) : nullptr;
    group.ahead_end = weights_of(after);
    float* to = out + first_row * shape.outputs + first;
    for (std::size_t p = 0; p < panel_count(); ++p) {
      const std::size_t r = p * panel_rows();
      kernels.of_panel(panel(p), std::min(panel_rows(), whole - r), group, to + r * shape.outputs);
      if (group.ahead == nullptr) continue;
      const std::size_t used = (p + 1) * (kernels.group / kernels.tile) * group.lines;
      group.ahead = next + used < after ? weights_of(next + used) : nullptr;
    }
    for (std::size_t r = whole; r < rows; ++r)
      kernels.of_row(row(r), group, to + r * shape.outputs);
  }

  void run() {
    detail::run_units(
        threads, panel_count(),
        [](void* pass, std::size_t unit) { static_cast<Pass*>(pass)->order(unit); }, this);
    detail::run_units(
        threads, in_parts(shape.outputs, kernels.group * kGroupsOfUnit),
        [](void* pass, std::size_t unit) {
          for (std::size_t g = 0; g < kGroupsOfUnit; ++g) {
            static_cast<Pass*>(pass)->columns(unit * kGroupsOfUnit + g);
          }
        },
        this);
  }
};

}  // namespace

const char* product_isa() { return kernels(false).name; }

bool product_rounds() { return detail::has_bfloat16(); }

bool product_suits_many_rows() {
#ifdef ASTRA_HAVE_AVX512
  return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

namespace {

void multiply(const ProductKernels& chosen, const float* x, const float* weights, const float* bias,
              ProductShape shape, float* out, unsigned threads, bool add) {
  if (shape.inputs == 0) {
    for (std::size_t i = 0; i < shape.rows * shape.outputs; ++i) {
      const float start = add ? out[i] : 0.0F;
      out[i] = bias == nullptr ? start : start + bias[i % shape.outputs];
    }
    return;
  }
  const std::size_t over = shape.rows % chosen.lanes;
  const std::size_t single = chosen.pair == 1 && over <= kMostSingleRows ? over : 0;
  const std::size_t panel_rows = kPanelVectors * chosen.lanes;
  const std::size_t inputs =
      in_parts(in_parts(shape.inputs, in_parts(shape.inputs, kMostInputs)), 16) * 16;
  const std::size_t panels = in_parts(shape.rows - single, panel_rows);
  const std::size_t most = std::max<std::size_t>(1, kPanelFloats / (panel_rows * inputs));
  const std::size_t blocks = std::max<std::size_t>(1, in_parts(panels, most));
  const std::size_t block_rows = in_parts(panels, blocks) * panel_rows;
  static thread_local detail::Arena arena;
  auto* memory = static_cast<float*>(arena.reserve(block_rows * inputs * sizeof(float)));
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::size_t first = block * block_rows;
    const bool last = block + 1 == blocks;
    const std::size_t rows = last ? shape.rows - first : block_rows;
    for (std::size_t k = 0; k < shape.inputs; k += inputs) {
      Pass{chosen,
           x,
           weights,
           bias,
           out,
           shape,
           threads,
           add,
           first,
           rows,
           last ? rows - single : rows,
           k,
           std::min(inputs, shape.inputs - k),
           memory}
          .run();
    }
  }
}

}  // namespace

void product(const float* x, const float* weights, const float* bias, ProductShape shape,
             float* out, unsigned threads, bool add) {
  multiply(kernels(false), x, weights, bias, shape, out, threads, add);
}

void product_of_rounded(const float* x, const std::uint16_t* weights, const float* bias,
                        ProductShape shape, float* out, unsigned threads, bool add) {
  if (!product_rounds()) throw std::invalid_argument("this machine has no AVX512-BF16");
  // pairs of weights lie in the lanes of floats
  multiply(kernels(true), x, reinterpret_cast<const float*>(weights), bias, shape, out, threads,
           add);
}

}  // namespace astra
