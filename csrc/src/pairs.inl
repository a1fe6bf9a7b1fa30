// What a lane holds in a product: a float or, with ASTRA_BFLOAT16, a pair of numbers rounded to
// bfloat16, whose products one instruction sums.

#include "vectors.inl"

namespace astra::detail {
namespace {

#ifdef ASTRA_BFLOAT16

constexpr std::size_t kPair = 2;
constexpr std::size_t kHalves = kPair * kLanes;

inline Floats multiply_add(Floats sum, Floats a, Floats b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The numbers of `first`, and behind them those of `second`.
inline __m512i rounded(Floats first, Floats second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

template <std::size_t... kAt>
inline Floats interleaved(__m512i x, std::index_sequence<kAt...>) {
  typedef std::uint16_t Order __attribute__((vector_size(2 * kHalves)));
  const Order from = {static_cast<std::uint16_t>(kAt / 2 + (kAt % 2 != 0 ? kLanes : 0))...};
  return (Floats)_mm512_permutexvar_epi16((__m512i)from, x);
}

// A lane of `first` beside the same lane of `second`.
inline Floats joined(Floats first, Floats second) {
  return interleaved(rounded(first, second), std::make_index_sequence<kHalves>());
}

#else

constexpr std::size_t kPair = 1;

inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
inline Floats joined(Floats first, Floats /*second*/) { return first; }

#endif

// Lanes that so many numbers take.
constexpr std::size_t paired(std::size_t count) { return (count + kPair - 1) / kPair; }

}  // namespace
}  // namespace astra::detail
