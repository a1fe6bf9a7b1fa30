// Vectors of ASTRA_LANES floats (a GCC and Clang extension), for loops that are written once and
// compiled for each instruction set.

#include <cstddef>
#include <cstdint>
#include <utility>

// Functions whose arrays are to stay in registers.
#define ASTRA_INLINE inline __attribute__((always_inline))

namespace astra::detail {
namespace {

constexpr std::size_t kLanes = ASTRA_LANES;

typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * ASTRA_LANES)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * ASTRA_LANES)));

// What is loaded from anywhere, and stored there, and nothing else: Clang forgets an alignment that
// belongs to a name where the name goes through a template.
typedef float LooseFloats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::int32_t LooseInts __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

template <std::size_t kValue>
struct Constant {
  static constexpr std::size_t value = kValue;
};

template <class Body, std::size_t... kValues>
ASTRA_INLINE void each_of(Body body, std::index_sequence<kValues...>) {
  (body(Constant<kValues>{}), ...);
}

// body(0), ..., body(kCount - 1) with constants: GCC keeps an array in registers if it sees
// constant places in it from the start, but not if it has to unroll a loop first.
template <std::size_t kCount, class Body>
ASTRA_INLINE void each(Body body) {
  each_of(body, std::make_index_sequence<kCount>());
}

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }
// Subtracted, as 0 + x is not x where x is -0, which would cost an addition.
inline Floats all(float x) { return x - Floats{}; }

// Where a lane comes from when blocks of `step` lanes are traded across the diagonal: lanes of the
// first vector are numbered from 0, those of the second from kLanes.
constexpr std::int32_t low_lane(std::size_t lane, std::size_t step) {
  return static_cast<std::int32_t>((lane & step) != 0 ? kLanes + lane - step : lane);
}
constexpr std::int32_t high_lane(std::size_t lane, std::size_t step) {
  return static_cast<std::int32_t>((lane & step) != 0 ? kLanes + lane : lane + step);
}

// Lanes of `a`, numbered from 0, and of `b`, numbered on. GCC has Clang's builtin from version 12
// on, Clang has none of GCC's.
template <std::int32_t... kFrom, class Vector>
inline Vector shuffled(Vector a, Vector b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  const decltype(a < b) from = {kFrom...};
  return __builtin_shuffle(a, b, from);
#endif
}

template <std::size_t kStep, std::size_t... kLane>
inline void trade_lanes(Floats& a, Floats& b, std::index_sequence<kLane...>) {
  const Floats first = shuffled<low_lane(kLane, kStep)...>(a, b);
  b = shuffled<high_lane(kLane, kStep)...>(a, b);
  a = first;
}

// Step kStep of a transposition.
template <std::size_t kStep>
inline void trade(Floats& a, Floats& b) {
  trade_lanes<kStep>(a, b, std::make_index_sequence<kLanes>());
}

template <std::size_t kStep>
inline void transpose(Floats (&x)[kLanes]) {
  if constexpr (kStep < kLanes) {
    each<kLanes>([&](auto i) {
      if constexpr ((i.value & kStep) == 0) trade<kStep>(x[i.value], x[i.value + kStep]);
    });
    transpose<kStep * 2>(x);
  }
}

template <std::size_t kStep, std::size_t... kLane>
inline Floats across_lanes(Floats x, std::index_sequence<kLane...>) {
  return shuffled<static_cast<std::int32_t>(kLane ^ kStep)...>(x, x);
}

// Lane l of `x` in lane l ^ kStep.
template <std::size_t kStep>
inline Floats across(Floats x) {
  return across_lanes<kStep>(x, std::make_index_sequence<kLanes>());
}

}  // namespace
}  // namespace astra::detail
