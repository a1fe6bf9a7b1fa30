// The seam between linear.cpp and its inner loops, one table per instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

namespace astra::detail {

// Rows of inputs, rounded. A group takes `padded` integers, zeros behind its own.
struct LinearRows {
  void* integers;  // [rows, groups * padded] of 1 or 2 bytes, by the kernel
  float* steps;    // [rows, groups], what 1 stands for; NaN where a group is not finite
  float* sums;     // [rows, groups], of the integers, times the step
  // [rows, groups]: what is added to a sum of products, as the kernel's weights are too large by as
  // much as makes them unsigned
  std::int32_t* offsets;
};

// What every loop needs of a call.
struct LinearCall {
  std::size_t rows, inputs, outputs, groups, width, padded;  // width: of a group, inputs / groups
  const std::int8_t* values;                                 // weights of 8 bits, or null
  const std::uint8_t* halves;                                // of 4 bits, or null
  const void* scales;
  const void* minima;
  const float* bias;
  bool half_scales;
  LinearRows x;
  float* out;
};

struct LinearKernel {
  const char* name;
  std::size_t step;   // inputs that one instruction sums; a group's are padded to a multiple
  std::size_t bytes;  // of a rounded input
  std::size_t tile;   // outputs side by side
  std::size_t (*space)(const LinearCall& call);
  void (*round)(const LinearCall& call, const float* x);
  // Outputs from `first` to `last`, of all rows. `space` has space(call) bytes, aligned to 64.
  // many: outputs are taken in tiles, whose weights are laid out once for all rows.
  void (*many)(const LinearCall& call, std::size_t first, std::size_t last, void* space);
  // few: weights are read once, in order.
  void (*few)(const LinearCall& call, std::size_t first, std::size_t last, void* space);
};

// As in bitpack_kernel.hpp, each has a translation unit and flags of its own, and no inline code in
// common.
extern const LinearKernel kLinearPortable;
#ifdef ASTRA_HAVE_AVX2
extern const LinearKernel kLinearAvx2;
#endif
#ifdef ASTRA_HAVE_AVX512
extern const LinearKernel kLinearAvx512;
extern const LinearKernel kLinearVnni;
#endif

}  // namespace astra::detail
