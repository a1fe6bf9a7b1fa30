// The loops of elementwise.cpp, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension) and compiled for each instruction set as ASTRA_ELEMENTWISE. What is left of a row
// behind its last whole vector goes through the same code, in a vector filled up with zeros.

#include <cstdint>
#include <cstring>

#include "elementwise_kernel.hpp"

namespace astra::detail {
namespace {

constexpr std::size_t kLanes = ASTRA_LANES;
constexpr std::size_t kSums = 4;  // additions under way at once

// aligned(4): they are loaded from anywhere.
typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
inline void store(float* at, Floats x) { *reinterpret_cast<Floats*>(at) = x; }
inline Floats all(float x) { return Floats{} + x; }

inline Floats load_some(const float* at, std::size_t count) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, at, count * sizeof(float));
  return load(lanes);
}

inline void store_some(float* at, Floats x, std::size_t count) {
  float lanes[kLanes];
  store(lanes, x);
  std::memcpy(at, lanes, count * sizeof(float));
}

// Whole vectors of `count` floats with `whole(i)`, and the rest with `some(i, rest)`.
template <class Whole, class Some>
inline void sweep(std::size_t count, Whole whole, Some some) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) whole(i);
  if (i < count) some(i, count - i);
}

// e^x for -87 <= x <= 0, to a relative 1e-7: e^x = 2^n e^r with n the nearest integer of x/ln 2, by
// Cephes' polynomial of e^r on [-ln 2 / 2, ln 2 / 2]; ln 2 comes in two parts, the first of which
// has so few bits that n times it is exact. 2^n is put together in the exponent's bits. NaN stays.
inline Floats exponential(Floats x) {
  // The low bits of `shifted` are n, plus 127.
  constexpr float kShift = 12582912.0F + 127.0F;
  const Floats shifted = x * 0x1.715476p+0F + kShift;
  const Floats n = shifted - kShift;
  const Floats r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  const Floats power = (Floats)((Bits)shifted << 23);
  Floats y = all(1.9875691500e-4F);
  y = y * r + 1.3981999507e-3F;
  y = y * r + 8.3334519073e-3F;
  y = y * r + 4.1665795894e-2F;
  y = y * r + 1.6666665459e-1F;
  y = y * r + 5.0000001201e-1F;
  return (y * (r * r) + r + 1.0F) * power;
}

void rms_norm(const float* x, const float* weight, std::size_t width, float eps, float* out) {
  Floats sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums * kLanes <= width; i += kSums * kLanes) {
    for (std::size_t s = 0; s < kSums; ++s) {
      const Floats value = load(x + i + s * kLanes);
      sums[s] += value * value;
    }
  }
  const auto add = [&](Floats value) { sums[0] += value * value; };
  sweep(
      width - i, [&](std::size_t j) { add(load(x + i + j)); },
      [&](std::size_t j, std::size_t rest) { add(load_some(x + i + j, rest)); });
  const Floats total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.0F;
  for (std::size_t l = 0; l < kLanes; ++l) sum += total[l];
  const float scale = 1.0F / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
  sweep(
      width, [&](std::size_t j) { store(out + j, load(weight + j) * (load(x + j) * scale)); },
      [&](std::size_t j, std::size_t rest) {
        store_some(out + j, load_some(weight + j, rest) * (load_some(x + j, rest) * scale), rest);
      });
}

inline Floats silu(Floats x) {
  constexpr float kLeast = -87.0F;  // silu of what is below is 0, to 1e-36
  const Floats size = x < 0.0F ? x : -x;
  const Floats e = exponential(size < kLeast ? all(kLeast) : size);
  const Floats value = x * (x < 0.0F ? e : all(1.0F)) / (1.0F + e);
  return x < kLeast ? x * 0.0F : value;
}

void gated_silu(const float* gate, const float* up, std::size_t count, float* out) {
  sweep(
      count, [&](std::size_t i) { store(out + i, silu(load(gate + i)) * load(up + i)); },
      [&](std::size_t i, std::size_t rest) {
        store_some(out + i, silu(load_some(gate + i, rest)) * load_some(up + i, rest), rest);
      });
}

void rotate(const float* x, const float* cos, const float* sin, std::size_t half, float* out) {
  sweep(
      half,
      [&](std::size_t i) {
        const Floats a = load(x + i), b = load(x + half + i);
        store(out + i, a * load(cos + i) - b * load(sin + i));
        store(out + half + i, b * load(cos + half + i) + a * load(sin + half + i));
      },
      [&](std::size_t i, std::size_t rest) {
        const auto some = [rest](const float* at) { return load_some(at, rest); };
        const Floats a = some(x + i), b = some(x + half + i);
        store_some(out + i, a * some(cos + i) - b * some(sin + i), rest);
        store_some(out + half + i, b * some(cos + half + i) + a * some(sin + half + i), rest);
      });
}

void blend(const float* a, const float* b, float weight, std::size_t width, float* out) {
  sweep(
      width,
      [&](std::size_t i) {
        const Floats first = load(a + i);
        store(out + i, first + weight * (load(b + i) - first));
      },
      [&](std::size_t i, std::size_t rest) {
        const Floats first = load_some(a + i, rest);
        store_some(out + i, first + weight * (load_some(b + i, rest) - first), rest);
      });
}

bool finite(const float* x, std::size_t width) {
  // 0 where x is finite, else NaN, which no sum loses
  Floats zeros = {};
  sweep(
      width, [&](std::size_t i) { zeros += load(x + i) * 0.0F; },
      [&](std::size_t i, std::size_t rest) { zeros += load_some(x + i, rest) * 0.0F; });
  bool all_are = true;
  for (std::size_t l = 0; l < kLanes; ++l) all_are &= zeros[l] == 0.0F;
  return all_are;
}

typedef std::uint16_t Halves __attribute__((vector_size(2 * ASTRA_LANES), aligned(2), may_alias));

inline Floats widened(const std::uint16_t* at) {
  const Halves halves = *reinterpret_cast<const Halves*>(at);
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

// kTogether vectors of `out` in registers, from column `first` on.
template <std::size_t kTogether>
inline void add_columns(const std::uint16_t* const* rows, std::size_t count,
                        const std::uint16_t* const* ahead, std::size_t ahead_count,
                        std::size_t first, float* out) {
  constexpr std::size_t kLine = 32;  // numbers of bfloat16
  Floats sums[kTogether];
  for (std::size_t v = 0; v < kTogether; ++v) sums[v] = load(out + first + v * kLanes);
  for (std::size_t r = 0; r < count; ++r) {
    const std::uint16_t* row = rows[r] + first;
    for (std::size_t v = 0; v < kTogether; ++v) sums[v] += widened(row + v * kLanes);
    if (r >= ahead_count) continue;
    for (std::size_t i = 0; i < kTogether * kLanes; i += kLine) {
      __builtin_prefetch(ahead[r] + first + i);
    }
  }
  for (std::size_t v = 0; v < kTogether; ++v) store(out + first + v * kLanes, sums[v]);
}

void add_rows(const std::uint16_t* const* rows, std::size_t count,
              const std::uint16_t* const* ahead, std::size_t ahead_count, std::size_t width,
              float* out) {
  constexpr std::size_t kTogether = 8;
  std::size_t i = 0;
  for (; i + kTogether * kLanes <= width; i += kTogether * kLanes) {
    add_columns<kTogether>(rows, count, ahead, ahead_count, i, out);
  }
  for (; i + kLanes <= width; i += kLanes) {
    add_columns<1>(rows, count, ahead, ahead_count, i, out);
  }
  for (; i < width; ++i) {
    for (std::size_t r = 0; r < count; ++r) {
      const std::uint32_t bits = static_cast<std::uint32_t>(rows[r][i]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      out[i] += value;
    }
  }
}

}  // namespace

const ElementwiseKernels ASTRA_ELEMENTWISE = {rms_norm, gated_silu, rotate,
                                              blend,    finite,     add_rows};

}  // namespace astra::detail
