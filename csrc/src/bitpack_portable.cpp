// Portable kernels: a 64-bit accumulator, refilled or emptied 32 bits at a time.
//
// 32 codes of B bits are exactly B words of 32 bits, so a block of 32 starts and ends with an empty
// accumulator. With B known at compile time every shift in the unrolled block is a constant.

#include <cstring>
#include <utility>

#include "bitpack_kernel.hpp"

#if defined(__clang__)
#define ASTRA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define ASTRA_UNROLL _Pragma("GCC unroll 32")
#else
#define ASTRA_UNROLL
#endif

namespace astra::detail {
namespace {

constexpr std::size_t kBlock = 32;  // codes

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

void store_word(std::uint8_t* out, std::uint32_t word) { std::memcpy(out, &word, sizeof word); }

std::uint32_t load_word(const std::uint8_t* data) {
  std::uint32_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

#else

void store_word(std::uint8_t* out, std::uint32_t word) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<std::uint8_t>(word >> (8 * i));
}

std::uint32_t load_word(const std::uint8_t* data) {
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<std::uint32_t>(data[i]) << (8 * i);
  return word;
}

#endif

template <int B>
std::uint32_t pack(const std::int32_t* codes, std::size_t count, std::uint8_t* out) {
  std::uint32_t seen = 0;
  std::uint64_t bits = 0;
  int held = 0;
  std::size_t done = 0;
  for (; done + kBlock <= count; done += kBlock) {
    ASTRA_UNROLL
    for (std::size_t i = 0; i < kBlock; ++i) {
      const auto code = static_cast<std::uint32_t>(codes[done + i]);
      seen |= code;
      bits |= static_cast<std::uint64_t>(code) << held;
      held += B;
      if (held >= 32) {
        store_word(out, static_cast<std::uint32_t>(bits));
        out += 4;
        bits >>= 32;
        held -= 32;
      }
    }
    // Both are so already for codes that fit; said here so that the next block's shifts are
    // constant.
    bits = 0;
    held = 0;
  }
  for (; done < count; ++done) {
    const auto code = static_cast<std::uint32_t>(codes[done]);
    seen |= code;
    bits |= static_cast<std::uint64_t>(code) << held;
    for (held += B; held >= 8; held -= 8, bits >>= 8) *out++ = static_cast<std::uint8_t>(bits);
  }
  if (held > 0) *out = static_cast<std::uint8_t>(bits);
  return seen;
}

template <int B>
void unpack(const std::uint8_t* data, std::size_t count, std::int32_t* codes) {
  constexpr std::uint64_t kMask = (std::uint64_t{1} << B) - 1;
  std::uint64_t bits = 0;
  int held = 0;
  std::size_t done = 0;
  for (; done + kBlock <= count; done += kBlock) {
    ASTRA_UNROLL
    for (std::size_t i = 0; i < kBlock; ++i) {
      if (held < B) {
        bits |= static_cast<std::uint64_t>(load_word(data)) << held;
        data += 4;
        held += 32;
      }
      codes[done + i] = static_cast<std::int32_t>(bits & kMask);
      bits >>= B;
      held -= B;
    }
    bits = 0;
    held = 0;
  }
  for (; done < count; ++done) {
    for (; held < B; held += 8) bits |= static_cast<std::uint64_t>(*data++) << held;
    codes[done] = static_cast<std::int32_t>(bits & kMask);
    bits >>= B;
    held -= B;
  }
}

template <int... I>
constexpr Kernels table(std::integer_sequence<int, I...>) {
  return {"portable", {nullptr, pack<I + 1>...}, {nullptr, unpack<I + 1>...}};
}

}  // namespace

const Kernels kPortable = table(std::make_integer_sequence<int, 16>{});

}  // namespace astra::detail
