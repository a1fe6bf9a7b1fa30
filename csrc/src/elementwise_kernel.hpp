// The seam between elementwise.cpp and its inner loops, one table of functions per instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

namespace astra::detail {

struct ElementwiseKernels {
  void (*rms_norm)(const float* x, const float* weight, std::size_t width, float eps, float* out);
  void (*gated_silu)(const float* gate, const float* up, std::size_t count, float* out);
  void (*rotate)(const float* x, const float* cos, const float* sin, std::size_t half, float* out);
  // out = a + weight * (b - a)
  void (*blend)(const float* a, const float* b, float weight, std::size_t width, float* out);
  bool (*finite)(const float* x, std::size_t width);
  // out += the sum of `count` rows of bfloat16, while lines of those in `ahead`, of which there may
  // be fewer, are fetched.
  void (*add_rows)(const std::uint16_t* const* rows, std::size_t count,
                   const std::uint16_t* const* ahead, std::size_t ahead_count, std::size_t width,
                   float* out);
};

// As in bitpack_kernel.hpp, each has a translation unit and flags of its own, and no inline code in
// common.
extern const ElementwiseKernels kElementwisePortable;
#ifdef ASTRA_HAVE_AVX2
extern const ElementwiseKernels kElementwiseAvx2;
#endif
#ifdef ASTRA_HAVE_AVX512
extern const ElementwiseKernels kElementwiseAvx512;
#endif

}  // namespace astra::detail
