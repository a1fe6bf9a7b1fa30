// With AVX-512 VNNI: four products of bytes and their sum at a time, at four times the rate of
// fp32. One side has to be unsigned, which the weights become by adding 128; what that adds to a
// product is 128 times the sum of the inputs, and is taken off again.

#include <immintrin.h>

#include "linear_kernel.hpp"

#define ASTRA_LANES 16
#define ASTRA_LINEAR kLinearVnni
#define ASTRA_LINEAR_NAME "avx512vnni"

#include "vectors.inl"

namespace astra::detail {
namespace {

using Input = std::int8_t;
constexpr std::size_t kStep = 4, kRows = 6, kVectors = 4, kChunk = 32, kPartial = 16;
constexpr std::int32_t kOffset = 128;
constexpr std::uint32_t kFlip = 0x80808080;  // + 128 of every byte, modulo 256

using Partial = Ints;

inline Ints multiply_add(Ints sums, Ints weights, Ints inputs) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                    reinterpret_cast<__m512i>(weights),
                                                    reinterpret_cast<__m512i>(inputs)));
}

inline Ints load_weights(const void* from) {
  return reinterpret_cast<Ints>(_mm512_loadu_si512(from));
}

inline Ints repeated(const Input* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return reinterpret_cast<Ints>(_mm512_set1_epi32(four));
}

inline Floats scaled_add(Floats sums, Floats x, Floats scale) {
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)scale, (__m512)sums);
}

inline void store_inputs(Input* to, Ints integers) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)integers));
}

template <std::int32_t kAdded>
inline Partial partial(const std::int8_t* weights, const Input* inputs, std::size_t count) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(kAdded));
  const auto add = [&](Partial sums, __m512i bytes, __m512i input) {
    return multiply_add(sums, reinterpret_cast<Ints>(_mm512_xor_si512(bytes, flip)),
                        reinterpret_cast<Ints>(input));
  };
  Partial sums{};
  std::size_t i = 0;
  for (; i + 64 <= count; i += 64) {
    sums = add(sums, _mm512_loadu_si512(weights + i), _mm512_loadu_si512(inputs + i));
  }
  if (i + kChunk <= count) {  // the upper half of the inputs is zero
    const auto half = [](const void* from) {
      return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
    };
    sums = add(sums, half(weights + i), half(inputs + i));
  }
  return sums;
}

}  // namespace
}  // namespace astra::detail

#include "linear_loop.inl"
