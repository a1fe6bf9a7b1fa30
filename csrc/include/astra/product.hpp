// Products of fp32 rows with weights that stay in the order in which they are stored.
//
// A library's product copies weights into an order of its own first, which takes as long as the
// product itself where there are few rows. Here the rows are put in order instead: vectors hold 16
// rows, and each weight is read once for up to 48 of them.

#pragma once

#include <cstddef>
#include <cstdint>

namespace astra {

struct ProductShape {
  std::size_t rows;
  std::size_t inputs;
  std::size_t outputs;
};

// The instruction set that `product` runs in: "avx512" or "portable".
const char* product_isa();

// Whether `product` is as fast as MKL's own with many rows, too: MKL, which is Intel's, leaves
// AVX-512 to Intel's processors and runs AVX2 on others.
bool product_suits_many_rows();

// out[m][n] = bias[n] + sum over k of x[m][k] * weights[n][k], all of them contiguous; `bias` may
// be null. With `add`, that is added to what `out` holds. Rows do not see each other: neither
// numbers that are not finite nor rounding of one depend on another's values. On at most `threads`
// threads. `out` may not overlap the others.
void product(const float* x, const float* weights, const float* bias, ProductShape shape,
             float* out, unsigned threads, bool add = false);

// The same of numbers rounded to bfloat16, at twice the rate: `weights` are, [outputs, inputs
// rounded up to an even number], zeros behind; x is meanwhile. Sums are fp32.
// std::invalid_argument: this machine does not have it, see product_rounds.
void product_of_rounded(const float* x, const std::uint16_t* weights, const float* bias,
                        ProductShape shape, float* out, unsigned threads, bool add = false);

// Whether this machine multiplies pairs of such numbers (AVX512-BF16).
bool product_rounds();

}  // namespace astra
