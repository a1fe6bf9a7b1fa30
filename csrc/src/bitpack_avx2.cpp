// AVX2 kernels. Unaligned loads and stores throughout; the ragged end goes to the portable kernel.
//
// Pack, 16 codes a step: every stage joins neighbours, doubling the bits held in one element.
//   8 x i32, twice   packus      16 x u16, B bits each (codes 0-7 in the low lane, 8-15 in the
//   high) 16 x u16         madd        8 x u32, 2B bits each: a*1 + b*2^B 8 x u32          sllv,
//   srl   4 x u64, 4B bits each 4 x u64          pshufb      the 8B bits = B bytes of each 128-bit
//   lane brought together
// For odd B, 4B ends in the middle of a byte: the upper half of each lane is shifted up by those
// four bits first, and the byte that the halves share is their OR.
//
// Unpack, 8 codes a step: B bytes are broadcast to both lanes, a byte shuffle gives every i32 the
// (up to three) bytes that hold its code, and a shift per element and a mask cut the code out.

#include <immintrin.h>

#include <utility>

#include "bitpack_kernel.hpp"

namespace astra::detail {
namespace {

constexpr char kZero = -128;  // a shuffle index that gives a zero byte

struct alignas(32) Bytes {
  char at[32];
};

struct alignas(32) Words {
  int at[8];
};

// Shuffle that moves the low ceil(4B/8) bytes of the half `half` of each lane to their place in the
// joined 8B bits.
template <int B>
constexpr Bytes join_half(int half) {
  Bytes index{};
  constexpr int kHalfBytes = (4 * B + 7) / 8;
  const int first = half == 0 ? 0 : 4 * B / 8;
  for (int i = 0; i < 32; ++i) index.at[i] = kZero;
  for (int lane = 0; lane < 2; ++lane) {
    for (int i = 0; i < kHalfBytes; ++i) {
      index.at[16 * lane + first + i] = static_cast<char>(8 * half + i);
    }
  }
  return index;
}

// Both halves at once, where they share no byte.
template <int B>
constexpr Bytes join_halves() {
  Bytes low = join_half<B>(0);
  const Bytes high = join_half<B>(1);
  for (int i = 0; i < 32; ++i) {
    if (high.at[i] != kZero) low.at[i] = high.at[i];
  }
  return low;
}

// The bytes of code i at the bottom of element i, and how far the code lies from their first bit.
template <int B>
constexpr Bytes code_bytes() {
  Bytes index{};
  for (int code = 0; code < 8; ++code) {
    const int first = code * B / 8;
    const int last = (code * B + B - 1) / 8;
    for (int i = 0; i < 4; ++i) {
      index.at[4 * code + i] = first + i <= last ? static_cast<char>(first + i) : kZero;
    }
  }
  return index;
}

template <int B>
constexpr Words code_shifts() {
  Words shifts{};
  for (int code = 0; code < 8; ++code) shifts.at[code] = code * B % 8;
  return shifts;
}

template <class Table>
__m256i load_table(const Table& table) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(&table));
}

// Two groups of 16 bytes, one per lane.
__m256i load_lanes(const std::int32_t* low, const std::int32_t* high) {
  const __m128i lane = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lane),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

template <int B>
__m256i join_pairs(__m256i codes) {
  if constexpr (B < 15) {
    return _mm256_madd_epi16(codes, _mm256_set1_epi32((1 << (16 + B)) | 1));
  } else {
    // 2^15 is no signed 16-bit factor but -2^15 is: join the negatives and change the sign.
    static_assert(B == 15);
    const __m256i factors = _mm256_set1_epi32(static_cast<int>(0x8000FFFFu));
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_madd_epi16(codes, factors));
  }
}

// 16 codes as u16 in, B bytes at the bottom of each lane out, zeros above.
template <int B>
__m256i join_lanes(__m256i codes) {
  const __m256i pairs = join_pairs<B>(codes);
  const __m256i raised = _mm256_sllv_epi32(pairs, _mm256_set1_epi64x(32 - 2 * B));
  const __m256i fours = _mm256_srli_epi64(raised, 32 - 2 * B);
  if constexpr (B % 2 == 0) {
    static constexpr Bytes kJoin = join_halves<B>();
    return _mm256_shuffle_epi8(fours, load_table(kJoin));
  } else {
    static constexpr Bytes kLow = join_half<B>(0);
    static constexpr Bytes kHigh = join_half<B>(1);
    const __m256i shifted = _mm256_sllv_epi64(fours, _mm256_set_epi64x(4, 0, 4, 0));
    return _mm256_or_si256(_mm256_shuffle_epi8(shifted, load_table(kLow)),
                           _mm256_shuffle_epi8(shifted, load_table(kHigh)));
  }
}

template <int B>
std::uint32_t pack(const std::int32_t* codes, std::size_t count, std::uint8_t* out) {
  constexpr std::size_t kStep = 16;
  constexpr std::size_t kStepBytes = 2 * B;
  const std::size_t size = stream_bytes(count, B);
  __m256i seen = _mm256_setzero_si256();
  std::size_t done = 0;
  std::size_t written = 0;
  // The second store reaches 16 bytes from the second group's start, past what it owns.
  for (; done + kStep <= count && written + B + 16 <= size; done += kStep) {
    const __m256i first = load_lanes(codes + done, codes + done + 8);
    const __m256i second = load_lanes(codes + done + 4, codes + done + 12);
    seen = _mm256_or_si256(seen, _mm256_or_si256(first, second));
    __m256i joined = _mm256_packus_epi32(first, second);
    if constexpr (B < 16) joined = join_lanes<B>(joined);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + written), _mm256_castsi256_si128(joined));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + written + B),
                     _mm256_extracti128_si256(joined, 1));
    written += kStepBytes;
  }
  Words parts;
  _mm256_store_si256(reinterpret_cast<__m256i*>(&parts), seen);
  std::uint32_t all = kPortable.pack[B](codes + done, count - done, out + written);
  for (const int part : parts.at) all |= static_cast<std::uint32_t>(part);
  return all;
}

template <int B>
void unpack(const std::uint8_t* data, std::size_t count, std::int32_t* codes) {
  static constexpr Bytes kBytes = code_bytes<B>();
  static constexpr Words kShifts = code_shifts<B>();
  const __m256i index = load_table(kBytes);
  const __m256i shifts = load_table(kShifts);
  const __m256i mask = _mm256_set1_epi32((1 << B) - 1);
  const std::size_t size = stream_bytes(count, B);
  std::size_t done = 0;
  std::size_t read = 0;
  for (; done + 8 <= count && read + 16 <= size; done += 8, read += B) {
    const __m128i group = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + read));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(group), index);
    const __m256i cut = _mm256_and_si256(_mm256_srlv_epi32(bytes, shifts), mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + done), cut);
  }
  kPortable.unpack[B](data + read, count - done, codes + done);
}

template <int... I>
constexpr Kernels table(std::integer_sequence<int, I...>) {
  return {"avx2", {nullptr, pack<I + 1>...}, {nullptr, unpack<I + 1>...}};
}

}  // namespace

const Kernels kAvx2 = table(std::make_integer_sequence<int, 16>{});

}  // namespace astra::detail
