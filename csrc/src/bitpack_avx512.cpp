// AVX-512 kernels (F, BW and VBMI: Ice Lake, Zen 4 and later). The ragged end goes to AVX2's.
//
// The plan is that of bitpack_avx2.cpp on vectors twice as wide. VBMI's byte permutation crosses
// lanes, so one permutation brings all the bits of a step together and one store writes them.
//
// ASTRA_SIMDE builds the same source on SIMDe's emulation, for the tests on machines without
// AVX-512.

#ifdef ASTRA_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// SIMDe 0.7 gives this alias the masked form's arguments.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#else
#include <immintrin.h>
#endif

#include <utility>

#include "bitpack_kernel.hpp"

namespace astra::detail {
namespace {

// A byte permutation and the bytes it does not clear.
struct alignas(64) Bytes {
  char at[64];
  std::uint64_t used;
};

struct alignas(64) Words {
  int at[16];
};

struct alignas(64) Halfwords {
  short at[32];
};

// The low halves of the 16 + 16 elements of two vectors, in order.
constexpr Halfwords low_halves() {
  Halfwords index{};
  for (int i = 0; i < 32; ++i) index.at[i] = static_cast<short>(2 * i);
  return index;
}

// Moves the low ceil(4B/8) bytes of the even (half 0) or odd (half 1) u64 elements to their place
// in the joined 32B bits.
template <int B>
constexpr Bytes join_half(int half) {
  Bytes index{};
  constexpr int kHalfBytes = (4 * B + 7) / 8;
  for (int pair = 0; pair < 4; ++pair) {
    const int first = pair * B + (half == 0 ? 0 : 4 * B / 8);
    for (int i = 0; i < kHalfBytes; ++i) {
      index.at[first + i] = static_cast<char>(16 * pair + 8 * half + i);
      index.used |= std::uint64_t{1} << (first + i);
    }
  }
  return index;
}

// Both halves at once, where they share no byte.
template <int B>
constexpr Bytes join_halves() {
  Bytes low = join_half<B>(0);
  const Bytes high = join_half<B>(1);
  for (int i = 0; i < 64; ++i) {
    if (high.used >> i & 1) low.at[i] = high.at[i];
  }
  low.used |= high.used;
  return low;
}

// The bytes of code i at the bottom of element i, and how far the code lies from their first bit.
template <int B>
constexpr Bytes code_bytes() {
  Bytes index{};
  for (int code = 0; code < 16; ++code) {
    const int first = code * B / 8;
    const int last = (code * B + B - 1) / 8;
    for (int i = 0; first + i <= last; ++i) {
      index.at[4 * code + i] = static_cast<char>(first + i);
      index.used |= std::uint64_t{1} << (4 * code + i);
    }
  }
  return index;
}

template <int B>
constexpr Words code_shifts() {
  Words shifts{};
  for (int code = 0; code < 16; ++code) shifts.at[code] = code * B % 8;
  return shifts;
}

__m512i permute(const Bytes& bytes, __m512i from) {
  return _mm512_maskz_permutexvar_epi8(bytes.used, _mm512_loadu_si512(bytes.at), from);
}

template <int B>
__m512i join_pairs(__m512i codes) {
  if constexpr (B < 15) {
    return _mm512_madd_epi16(codes, _mm512_set1_epi32((1 << (16 + B)) | 1));
  } else {
    // 2^15 is no signed 16-bit factor but -2^15 is: join the negatives and change the sign.
    static_assert(B == 15);
    const __m512i factors = _mm512_set1_epi32(static_cast<int>(0x8000FFFFu));
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_madd_epi16(codes, factors));
  }
}

// 32 codes as u16 in, 4B bytes at the bottom out.
template <int B>
__m512i join(__m512i codes) {
  const __m512i pairs = join_pairs<B>(codes);
  const __m512i raised = _mm512_sllv_epi32(pairs, _mm512_set1_epi64(32 - 2 * B));
  const __m512i fours = _mm512_srli_epi64(raised, 32 - 2 * B);
  if constexpr (B % 2 == 0) {
    static constexpr Bytes kJoin = join_halves<B>();
    return permute(kJoin, fours);
  } else {
    static constexpr Bytes kLow = join_half<B>(0);
    static constexpr Bytes kHigh = join_half<B>(1);
    const __m512i odd = _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0);
    const __m512i shifted = _mm512_sllv_epi64(fours, odd);
    return _mm512_or_si512(permute(kLow, shifted), permute(kHigh, shifted));
  }
}

// The narrowest vector that holds the 4B bytes of a step: the less it reaches past them, the
// shorter the ragged end.
template <int B>
constexpr std::size_t kStoreBytes = B <= 4   ? 16
                                    : B <= 8 ? 32
                                             : 64;

template <int B>
void store(std::uint8_t* out, __m512i joined) {
  if constexpr (kStoreBytes<B> == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(joined));
  } else if constexpr (kStoreBytes<B> == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(joined));
  } else {
    _mm512_storeu_si512(out, joined);
  }
}

template <int B>
std::uint32_t pack(const std::int32_t* codes, std::size_t count, std::uint8_t* out) {
  static constexpr Halfwords kLowHalves = low_halves();
  const __m512i low = _mm512_loadu_si512(kLowHalves.at);
  const std::size_t size = stream_bytes(count, B);
  __m512i seen = _mm512_setzero_si512();
  std::size_t done = 0;
  std::size_t written = 0;
  for (; done + 32 <= count && written + kStoreBytes<B> <= size; done += 32) {
    const __m512i first = _mm512_loadu_si512(codes + done);
    const __m512i second = _mm512_loadu_si512(codes + done + 16);
    seen = _mm512_or_si512(seen, _mm512_or_si512(first, second));
    __m512i joined = _mm512_permutex2var_epi16(first, low, second);
    if constexpr (B < 16) joined = join<B>(joined);
    store<B>(out + written, joined);
    written += 4 * B;
  }
  Words parts;
  _mm512_storeu_si512(parts.at, seen);
  std::uint32_t all = kAvx2.pack[B](codes + done, count - done, out + written);
  for (const int part : parts.at) all |= static_cast<std::uint32_t>(part);
  return all;
}

template <int B>
__m512i load(const std::uint8_t* data) {
  if constexpr (B <= 8) {
    return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  } else {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }
}

template <int B>
void unpack(const std::uint8_t* data, std::size_t count, std::int32_t* codes) {
  static constexpr Bytes kBytes = code_bytes<B>();
  static constexpr Words kShifts = code_shifts<B>();
  constexpr std::size_t kLoadBytes = B <= 8 ? 16 : 32;  // 16 codes are 2B bytes
  const __m512i shifts = _mm512_loadu_si512(kShifts.at);
  const __m512i mask = _mm512_set1_epi32((1 << B) - 1);
  const std::size_t size = stream_bytes(count, B);
  std::size_t done = 0;
  std::size_t read = 0;
  for (; done + 16 <= count && read + kLoadBytes <= size; done += 16, read += 2 * B) {
    const __m512i bytes = permute(kBytes, load<B>(data + read));
    _mm512_storeu_si512(codes + done, _mm512_and_si512(_mm512_srlv_epi32(bytes, shifts), mask));
  }
  kAvx2.unpack[B](data + read, count - done, codes + done);
}

template <int... I>
constexpr Kernels table(std::integer_sequence<int, I...>) {
  return {"avx512", {nullptr, pack<I + 1>...}, {nullptr, unpack<I + 1>...}};
}

}  // namespace

const Kernels kAvx512 = table(std::make_integer_sequence<int, 16>{});

}  // namespace astra::detail
