// Linear layers of integer weights: out = x w^T + bias, where weights have 8 or 4 bits and inputs
// are rounded to 8. This header is the contract.
//
// A row of x and a row of w form `groups` groups of inputs / groups consecutive values. A group of
// x is rounded by itself: with m = max |x|, x[k] becomes q[k] = round(x[k] * (127 / m)), half to
// even, and stands for q[k] * (m / 127); with m below 2^-119 it is 0. These integers are the same
// on every processor. Products are summed exactly within a group, groups one after the other in
// fp32. So a row's answer does not depend on the rows beside it, nor on the number of threads;
// between instruction sets, and between one row and several, it may differ by the rounding of fp32.
// A row with a NaN or an infinity gives NaN.
//
// Errors are std::invalid_argument with a sentence that names the argument. Inputs and outputs must
// not overlap; any alignment will do. Everything may be called concurrently.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace astra {

struct LinearShape {
  std::size_t rows;
  std::size_t inputs;
  std::size_t outputs;
  std::size_t groups;  // of a row of weights: inputs is a multiple, by at most 65,536
};

// Scales and minima [outputs, groups], fp32 or, with half_scales, bfloat16.
struct LinearWeights {
  // bits 8: int8 [outputs, inputs], a weight is scale * w. bits 4: [outputs, inputs / 2] bytes, two
  // weights each, the even one in the low half, a weight is scale * w + minimum.
  const void* values;
  const void* scales;
  const void* minima;  // with bits 4 only
  const float* bias;   // [outputs], or null for none
  int bits;
  bool half_scales;
};

// x [rows, inputs], out [rows, outputs]. `threads`: at most so many work on it, this one among
// them. `isa`: one of linear_isas(), or null for the quickest that this machine has.
void quantized_linear(const float* x, const LinearWeights& weights, LinearShape shape, float* out,
                      unsigned threads = 1, const char* isa = nullptr);

// One of several layers with the same inputs.
struct LinearPart {
  LinearWeights weights;
  std::size_t outputs;
  float* out;  // [rows, outputs]
};

// `quantized_linear` of each part, with its own `outputs` in place of the shape's: the same
// numbers, but x is rounded once.
void quantized_linears(const float* x, const std::vector<LinearPart>& parts, LinearShape shape,
                       unsigned threads = 1, const char* isa = nullptr);

// The instruction sets of this build that this machine has, the slowest first.
std::vector<std::string> linear_isas();

}  // namespace astra
