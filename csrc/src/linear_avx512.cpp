// As linear_avx2.cpp, with wider vectors in the tiles.

#include <immintrin.h>

#include "linear_kernel.hpp"

#define ASTRA_LANES 16
#define ASTRA_LINEAR kLinearAvx512
#define ASTRA_LINEAR_NAME "avx512"

#include "vectors.inl"

namespace astra::detail {
namespace {

using Input = std::int16_t;
constexpr std::size_t kStep = 2, kRows = 6, kVectors = 4, kChunk = 32, kPartial = 16;
constexpr std::int32_t kOffset = 0;
constexpr std::uint32_t kFlip = 0;

using Partial = Ints;

inline Ints multiply_add(Ints sums, Ints weights, Ints inputs) {
  const __m512i products =
      _mm512_madd_epi16(reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(inputs));
  return sums + reinterpret_cast<Ints>(products);
}

inline Ints load_weights(const void* from) {
  const __m256i bytes = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi16(bytes));
}

inline Ints repeated(const Input* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return reinterpret_cast<Ints>(_mm512_set1_epi32(pair));
}

inline Floats scaled_add(Floats sums, Floats x, Floats scale) {
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)scale, (__m512)sums);
}

inline void store_inputs(Input* to, Ints integers) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)integers));
}

template <std::int32_t kAdded>
inline Partial partial(const std::int8_t* weights, const Input* inputs, std::size_t count) {
  Partial sums{};
  for (std::size_t i = 0; i + kChunk <= count; i += kChunk) {
    const __m512i input = _mm512_loadu_si512(inputs + i);
    sums = multiply_add(sums, load_weights(weights + i), reinterpret_cast<Ints>(input));
  }
  return sums;
}

}  // namespace
}  // namespace astra::detail

#include "linear_loop.inl"
