// Without dot-product instructions: integers of 16 bits, two products and their sum at a time,
// which neither saturates nor loses a bit, at twice the rate of fp32.

#include <immintrin.h>

#include "linear_kernel.hpp"

#define ASTRA_LANES 8
#define ASTRA_LINEAR kLinearAvx2
#define ASTRA_LINEAR_NAME "avx2"

#include "vectors.inl"

namespace astra::detail {
namespace {

using Input = std::int16_t;
constexpr std::size_t kStep = 2, kRows = 6, kVectors = 2, kChunk = 16, kPartial = 8;
constexpr std::int32_t kOffset = 0;
constexpr std::uint32_t kFlip = 0;

using Partial = Ints;

inline Ints multiply_add(Ints sums, Ints weights, Ints inputs) {
  const __m256i products =
      _mm256_madd_epi16(reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(inputs));
  return sums + reinterpret_cast<Ints>(products);
}

inline Ints load_weights(const void* from) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi16(bytes));
}

inline Ints repeated(const Input* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return reinterpret_cast<Ints>(_mm256_set1_epi32(pair));
}

inline Floats scaled_add(Floats sums, Floats x, Floats scale) {
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)scale, (__m256)sums);
}

inline void store_inputs(Input* to, Ints integers) {
  const __m256i x = (__m256i)integers, pairs = _mm256_packs_epi32(x, x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x88)));
}

template <std::int32_t kAdded>
inline Partial partial(const std::int8_t* weights, const Input* inputs, std::size_t count) {
  Partial sums{};
  for (std::size_t i = 0; i + kChunk <= count; i += kChunk) {
    const __m256i input = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs + i));
    sums = multiply_add(sums, load_weights(weights + i), reinterpret_cast<Ints>(input));
  }
  return sums;
}

}  // namespace
}  // namespace astra::detail

#include "linear_loop.inl"
