// The seam between encode.cpp and its inner loop, one function per instruction set.

#pragma once

#include <cstddef>
#include <cstdint>

namespace astra::detail {

// Codewords side by side: a panel holds 16 of them, channel after channel, so that the loop reads
// memory in order. The last panel is filled up with zeros, whose half norms are infinite.
inline constexpr std::size_t kPanel = 16;

// For `rows` sub-vectors, `stride` floats apart: the smallest score and the codeword that has it.
using EncodeKernel = void (*)(const float* vectors, std::size_t stride, std::size_t rows,
                              std::size_t width, const float* panels, const float* half_norms,
                              std::size_t panel_count, float* best, std::int32_t* codes);

// As in bitpack_kernel.hpp, each has a translation unit and flags of its own, and no inline code in
// common.
void encode_portable(const float* vectors, std::size_t stride, std::size_t rows, std::size_t width,
                     const float* panels, const float* half_norms, std::size_t panel_count,
                     float* best, std::int32_t* codes);
void encode_avx2(const float* vectors, std::size_t stride, std::size_t rows, std::size_t width,
                 const float* panels, const float* half_norms, std::size_t panel_count, float* best,
                 std::int32_t* codes);
void encode_avx512(const float* vectors, std::size_t stride, std::size_t rows, std::size_t width,
                   const float* panels, const float* half_norms, std::size_t panel_count,
                   float* best, std::int32_t* codes);

}  // namespace astra::detail
