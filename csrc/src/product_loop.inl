// The inner loops of product.cpp, written once with vectors of ASTRA_LANES floats and compiled for
// each instruction set as ASTRA_PRODUCT. The sums of ASTRA_COLUMNS columns by a panel of rows stay
// in registers: 8 x 3 of 32.

#include "product_kernel.hpp"

#include "pairs.inl"

namespace astra::detail {
namespace {

constexpr std::size_t kColumns = ASTRA_COLUMNS;
constexpr std::size_t kLine = 16;       // floats of a cache line
constexpr std::size_t kPanelAhead = 4;  // inputs of a panel that are fetched ahead of their use
static_assert(kLanes % kColumns == 0 && kLanes <= kMostGroup);

template <std::size_t kVectors>
void order_vectors(const float* x, std::size_t stride, std::size_t rows, std::size_t inputs,
                   float* panel) {
  each<kVectors>([&](auto v) {
    constexpr std::size_t kFirst = v.value * kLanes;
    std::size_t k = 0;
    for (; k + kLanes <= inputs; k += kLanes) {
      Floats block[kLanes];
      each<kLanes>([&](auto i) {
        const std::size_t row = kFirst + i.value;
        block[i.value] = row < rows ? load(x + row * stride + k) : Floats{};
      });
      transpose<1>(block);
      each<kLanes / kPair>([&](auto i) {
        constexpr std::size_t kInput = i.value * kPair;
        store(panel + ((k / kPair + i.value) * kVectors + v.value) * kLanes,
              joined(block[kInput], block[kInput + kPair - 1]));
      });
    }
    for (; k < inputs; k += kPair) {
      const std::size_t next = k + kPair - 1;
      Floats first{}, second{};
      for (std::size_t i = 0; i < kLanes && kFirst + i < rows; ++i) {
        const float* row = x + (kFirst + i) * stride;
        first[i] = row[k];
        second[i] = next < inputs ? row[next] : 0.0F;
      }
      store(panel + (k / kPair * kVectors + v.value) * kLanes, joined(first, second));
    }
  });
}

void order(const float* x, std::size_t stride, std::size_t rows, std::size_t inputs, float* panel) {
  if (rows <= kLanes) {
    order_vectors<1>(x, stride, rows, inputs, panel);
  } else if (rows <= 2 * kLanes) {
    order_vectors<2>(x, stride, rows, inputs, panel);
  } else {
    order_vectors<3>(x, stride, rows, inputs, panel);
  }
}

// kCount columns of a panel, to `sums` as a vector a column and vector of rows. Meanwhile `lines`
// rows of weights from `ahead` on are fetched, a line of each for a line of inputs.
template <std::size_t kCount, std::size_t kVectors>
inline void tile(const float* panel, const float* weights, const float* bias,
                 const ProductGroup& group, const float* ahead, std::size_t lines, float* sums) {
  Floats total[kCount][kVectors];
  const float* column[kCount];
  each<kCount>([&](auto n) {
    column[n.value] = weights + n.value * group.stride;
    const Floats start = bias == nullptr ? Floats{} : all(bias[n.value]);
    each<kVectors>([&](auto v) { total[n.value][v.value] = start; });
  });
  std::size_t k = 0;
  while (k < group.inputs) {
    const std::size_t stop = k + kLine < group.inputs ? k + kLine : group.inputs;
    for (std::size_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * group.stride + k, 0, 2);
    for (; k < stop; ++k, panel += kVectors * kLanes) {
      Floats rows[kVectors];
      each<kVectors>([&](auto v) {
        rows[v.value] = load(panel + v.value * kLanes);
        __builtin_prefetch(panel + (kPanelAhead * kVectors + v.value) * kLanes);
      });
      each<kCount>([&](auto n) {
        const Floats weight = all(column[n.value][k]);
        each<kVectors>([&](auto v) {
          Floats& sum = total[n.value][v.value];
          sum = multiply_add(sum, rows[v.value], weight);
        });
      });
    }
  }
  each<kCount>([&](auto n) {
    each<kVectors>([&](auto v) {
      store(sums + (n.value * kVectors + v.value) * kLanes, total[n.value][v.value]);
    });
  });
}

// Sums as `tile` leaves them, to rows of `out`.
template <std::size_t kVectors>
inline void store_group(const float* sums, std::size_t rows, const ProductGroup& group,
                        float* out) {
  if (group.columns == kLanes) {
    each<kVectors>([&](auto v) {
      Floats block[kLanes];
      each<kLanes>(
          [&](auto i) { block[i.value] = load(sums + (i.value * kVectors + v.value) * kLanes); });
      transpose<1>(block);
      each<kLanes>([&](auto i) {
        const std::size_t row = v.value * kLanes + i.value;
        if (row >= rows) return;
        float* to = out + row * group.out_stride;
        store(to, group.add ? load(to) + block[i.value] : block[i.value]);
      });
    });
    return;
  }
  for (std::size_t row = 0; row < rows; ++row) {
    float* to = out + row * group.out_stride;
    for (std::size_t n = 0; n < group.columns; ++n) {
      const float sum = sums[n * kVectors * kLanes + row];
      to[n] = group.add ? to[n] + sum : sum;
    }
  }
}

template <std::size_t kVectors>
void of_vectors(const float* panel, std::size_t rows, const ProductGroup& group, float* out) {
  alignas(64) float sums[kLanes * kVectors * kLanes];
  for (std::size_t row = 0; row < rows; ++row) __builtin_prefetch(out + row * group.out_stride, 1);
  const float* ahead = group.ahead;
  const auto step = static_cast<std::ptrdiff_t>(group.lines * group.stride);
  std::size_t n = 0;
  for (; n + kColumns <= group.columns; n += kColumns) {
    const bool more = ahead != nullptr && group.ahead_end - ahead >= step;
    tile<kColumns, kVectors>(panel, group.weights + n * group.stride,
                             group.bias == nullptr ? nullptr : group.bias + n, group, ahead,
                             more ? group.lines : 0, sums + n * kVectors * kLanes);
    if (more) ahead += step;
  }
  for (; n < group.columns; ++n) {
    tile<1, kVectors>(panel, group.weights + n * group.stride,
                      group.bias == nullptr ? nullptr : group.bias + n, group, nullptr, 0,
                      sums + n * kVectors * kLanes);
  }
  store_group<kVectors>(sums, rows, group, out);
}

void of_panel(const float* panel, std::size_t rows, const ProductGroup& group, float* out) {
  if (rows <= kLanes) {
    of_vectors<1>(panel, rows, group, out);
  } else if (rows <= 2 * kLanes) {
    of_vectors<2>(panel, rows, group, out);
  } else {
    of_vectors<3>(panel, rows, group, out);
  }
}

// kCount columns of one row: vectors of inputs, summed up at the end.
template <std::size_t kCount>
inline void row_tile(const float* x, const float* weights, const float* bias,
                     const ProductGroup& group, float* out) {
  Floats total[kCount];
  float rest[kCount];
  each<kCount>([&](auto n) {
    total[n.value] = Floats{};
    rest[n.value] = bias == nullptr ? 0.0F : bias[n.value];
  });
  std::size_t k = 0;
  for (; k + kLanes <= group.inputs; k += kLanes) {
    const Floats input = load(x + k);
    each<kCount>(
        [&](auto n) { total[n.value] += input * load(weights + n.value * group.stride + k); });
  }
  for (; k < group.inputs; ++k) {
    each<kCount>([&](auto n) { rest[n.value] += x[k] * weights[n.value * group.stride + k]; });
  }
  each<kCount>([&](auto n) {
    float sum = 0.0F;
    for (std::size_t lane = 0; lane < kLanes; ++lane) sum += total[n.value][lane];
    sum += rest[n.value];
    out[n.value] = group.add ? out[n.value] + sum : sum;
  });
}

void of_row(const float* x, const ProductGroup& group, float* out) {
  std::size_t n = 0;
  for (; n + kColumns <= group.columns; n += kColumns) {
    row_tile<kColumns>(x, group.weights + n * group.stride,
                       group.bias == nullptr ? nullptr : group.bias + n, group, out + n);
  }
  for (; n < group.columns; ++n) {
    row_tile<1>(x, group.weights + n * group.stride,
                group.bias == nullptr ? nullptr : group.bias + n, group, out + n);
  }
}

}  // namespace

const ProductKernels ASTRA_PRODUCT = {ASTRA_PRODUCT_NAME, kLanes, kPair,    kLanes,
                                      kColumns,           order,  of_panel, of_row};

}  // namespace astra::detail
