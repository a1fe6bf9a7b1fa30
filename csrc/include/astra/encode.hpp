// Vector quantization: the nearest codeword of every sub-vector, in fp32. This header is the
// contract.
//
// A row has `groups` sub-vectors of `width` channels, and a group `codewords` codewords of that
// width. Code c of a row is the lowest k for which ||t_ck||^2 / 2 - x_c . t_ck is smallest, which
// is where ||x_c - t_ck||^2 is. Sums are taken in an order that depends on the instruction set, so
// two codewords that differ by no more than rounding may be told apart differently on another
// machine; on one machine the answer is always the same, whatever the number of threads.
//
// A distance that is NaN or infinite is never preferred to a finite one; a sub-vector that has no
// finite distance gets code 0.
//
// Errors are std::invalid_argument with a sentence that names the argument. Inputs and outputs must
// not overlap; any alignment will do. Everything may be called concurrently.

#pragma once

#include <cstddef>
#include <cstdint>

namespace astra {

struct EncodeShape {
  std::size_t rows;
  std::size_t groups;
  std::size_t width;      // channels of a sub-vector
  std::size_t codewords;  // of a group, 1 to 65,536
};

// vectors [rows, groups, width], codebook [groups, codewords, width], codes [rows, groups].
// `threads`: at most so many work on it, this one among them.
void encode(const float* vectors, const float* codebook, EncodeShape shape, std::int32_t* codes,
            unsigned threads = 1);

}  // namespace astra
