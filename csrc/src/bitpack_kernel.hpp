// The seam between bitpack.cpp, which checks, and the loops: one table per instruction set.
//
// A pack kernel returns the OR of every code it read. Only if that has a bit outside the width was
// there a bad code, so the check costs one instruction per vector and no second pass; which code it
// was is looked up after the fact. What such a kernel wrote is garbage, but inside the buffer.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace astra::detail {

using PackKernel = std::uint32_t (*)(const std::int32_t* codes, std::size_t count,
                                     std::uint8_t* out);
using UnpackKernel = void (*)(const std::uint8_t* data, std::size_t count, std::int32_t* codes);

inline constexpr int kWidths = 17;  // tables are indexed by the width; entry 0 is unused

struct Kernels {
  const char* name;
  std::array<PackKernel, kWidths> pack;
  std::array<UnpackKernel, kWidths> unpack;
};

// Bytes of `count` codes, without overflow on the way.
constexpr std::size_t stream_bytes(std::size_t count, int bits) {
  const auto width = static_cast<std::size_t>(bits);
  return count / 8 * width + (count % 8 * width + 7) / 8;
}

// `astra::unpack` without its checks: bits within 1..16, the bytes are there.
void unpack(const std::uint8_t* data, int bits, std::int32_t* codes, std::size_t count) noexcept;

// Each of these is defined in a translation unit of its own, compiled with that instruction set's
// flags. Nothing inline may be shared between them: the linker keeps one copy of an inline function
// and it might be the one an older machine cannot run. Tails therefore call the portable table.
extern const Kernels kPortable;
#ifdef ASTRA_HAVE_AVX2
extern const Kernels kAvx2;
#endif
#ifdef ASTRA_HAVE_AVX512
extern const Kernels kAvx512;
#endif

}  // namespace astra::detail
