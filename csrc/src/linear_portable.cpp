#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "linear_kernel.hpp"

#define ASTRA_LANES 4
#define ASTRA_LINEAR kLinearPortable
#define ASTRA_LINEAR_NAME "portable"

#include "vectors.inl"

namespace astra::detail {
namespace {

using Input = std::int16_t;
constexpr std::size_t kStep = 2, kRows = 3, kVectors = 2, kChunk = 4, kPartial = 4;
constexpr std::int32_t kOffset = 0;
constexpr std::uint32_t kFlip = 0;

using Partial = Ints;

inline Ints multiply_add(Ints sums, Ints weights, Ints inputs) {
  const auto lower = [](Ints both) { return (Ints)((Bits)both << 16) >> 16; };
  return sums + lower(weights) * lower(inputs) + (weights >> 16) * (inputs >> 16);
}

inline Ints load_weights(const std::uint8_t* from) {
  Ints weights;
  for (std::size_t l = 0; l < 4; ++l) {
    const auto even = static_cast<std::int8_t>(from[2 * l]);
    const auto odd = static_cast<std::int8_t>(from[2 * l + 1]);
    weights[l] = static_cast<std::int32_t>(static_cast<std::uint32_t>(odd) << 16 |
                                           static_cast<std::uint16_t>(even));
  }
  return weights;
}

inline Ints repeated(const Input* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return Ints{} + pair;
}

inline Floats scaled_add(Floats sums, Floats x, Floats scale) { return sums + x * scale; }

inline void store_inputs(Input* to, Ints integers) {
  for (std::size_t l = 0; l < kLanes; ++l) to[l] = static_cast<Input>(integers[l]);
}

template <std::int32_t kAdded>
inline Partial partial(const std::int8_t* weights, const Input* inputs, std::size_t count) {
  Partial sums{};
  for (std::size_t i = 0; i + kChunk <= count; i += kChunk) {
    for (std::size_t l = 0; l < kPartial; ++l) sums[l] += weights[i + l] * inputs[i + l];
  }
  return sums;
}

}  // namespace
}  // namespace astra::detail

#include "linear_loop.inl"
