// The seam between product.cpp and its inner loops, one table of functions per instruction set.

#pragma once

#include <cstddef>

namespace astra::detail {

inline constexpr std::size_t kPanelVectors = 3;  // of rows
inline constexpr std::size_t kMostGroup = 16;    // columns that are computed together

// Where a group of columns comes from and goes to. Weights and x have `stride` lanes a row: a
// number each or, where a kernel takes pairs, two numbers of 16 bits.
struct ProductGroup {
  const float* weights;  // of the first column, from the first input of this pass on
  std::size_t stride;
  std::size_t inputs;   // lanes of this pass
  std::size_t columns;  // at most `group` of the kernels
  const float* bias;    // of the first column, or null
  bool add;             // to what `out` holds
  std::size_t out_stride;
  const float* ahead;  // weights to be fetched meanwhile, `lines` rows for each tile, or null
  const float* ahead_end;
  std::size_t lines;
};

struct ProductKernels {
  const char* name;
  std::size_t lanes;
  std::size_t pair;   // inputs of a lane; rows of several are all in panels
  std::size_t group;  // columns
  std::size_t tile;   // columns whose sums are in registers together
  // Rows [0, rows) of x, at most kPanelVectors * lanes, with `inputs` numbers each: one vector a
  // number, or a pair of them. Lanes without a row are 0.
  void (*order)(const float* x, std::size_t stride, std::size_t rows, std::size_t inputs,
                float* panel);
  // The group's columns of the rows that `order` has put into `panel`.
  void (*of_panel)(const float* panel, std::size_t rows, const ProductGroup& group, float* out);
  // The group's columns of a single row, as it is stored.
  void (*of_row)(const float* x, const ProductGroup& group, float* out);
};

extern const ProductKernels kProductPortable;
#ifdef ASTRA_HAVE_AVX512
extern const ProductKernels kProductAvx512;
extern const ProductKernels kProductBfloat16;
#endif

}  // namespace astra::detail
