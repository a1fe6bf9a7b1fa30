// The inner loops of attention, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension) and compiled for each instruction set as ASTRA_ATTENTION. ASTRA_BLOCK keys, or columns
// of the values, by a panel of queries stay in registers: 8 x 3 sums of 32 registers, or 4 x 3 of
// 16.

#include <utility>

#include "attention_kernel.hpp"

namespace astra::detail {
namespace {

constexpr std::size_t kLanes = ASTRA_LANES;
constexpr std::size_t kBlock = ASTRA_BLOCK;
constexpr float kInfinity = __builtin_inff();

// aligned(4): they are loaded from anywhere.
typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

template <std::size_t kValue>
struct Constant {
  static constexpr std::size_t value = kValue;
};

template <class Body, std::size_t... kValues>
inline void each_of(Body body, std::index_sequence<kValues...>) {
  (body(Constant<kValues>{}), ...);
}

// body(0), ..., body(kCount - 1) with constants: GCC keeps an array in registers if it sees
// constant places in it from the start, but not if it has to unroll a loop first.
template <std::size_t kCount, class Body>
inline void each(Body body) {
  each_of(body, std::make_index_sequence<kCount>());
}

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
// Subtracted, as 0 + x is not x where x is -0, which would cost an addition.
inline Floats all(float x) { return x - Floats{}; }

// NaN in `x` leaves `bound`: what is not a number shows in the sums, not in the maximum.
inline Floats larger(Floats bound, Floats x) { return x > bound ? x : bound; }

// 2^x for x <= 0, to a relative 1.6e-7: 2^f on [-1/2, 1/2] by its minimax polynomial of degree 5,
// times a power of two that is put together in the exponent's bits. It is 1 at 0, and 0 from -127
// on and at -inf; NaN stays NaN.
inline Floats exp2(Floats x) {
  // The low bits of `shifted` are the nearest integer of x, plus 127.
  constexpr float kShift = 12582912.0F + 127.0F;
  x = x < -127.0F ? all(-127.0F) : x;
  const Floats shifted = x + kShift;
  const Floats fraction = x - (shifted - kShift);
  const Floats power = (Floats)((Bits)shifted << 23);
  Floats y = all(0x1.5bba14p-10F);
  y = y * fraction + 0x1.3cea88p-7F;
  y = y * fraction + 0x1.c6b752p-5F;
  y = y * fraction + 0x1.ebf9bcp-3F;
  y = y * fraction + 0x1.62e42ap-1F;
  y = y * fraction + 1.0F;
  return y * power;
}

// Where a lane comes from when blocks of `step` lanes are traded across the diagonal: lanes of the
// first vector are numbered from 0, those of the second from kLanes.
constexpr std::int32_t low_lane(std::size_t lane, std::size_t step) {
  return static_cast<std::int32_t>((lane & step) != 0 ? kLanes + lane - step : lane);
}
constexpr std::int32_t high_lane(std::size_t lane, std::size_t step) {
  return static_cast<std::int32_t>((lane & step) != 0 ? kLanes + lane : lane + step);
}

// GCC has Clang's builtin from version 12 on, Clang has none of GCC's.
template <std::size_t kStep, std::size_t... kLane>
inline void trade_lanes(Floats& a, Floats& b, std::index_sequence<kLane...>) {
#ifdef __clang__
  const Floats first = __builtin_shufflevector(a, b, low_lane(kLane, kStep)...);
  b = __builtin_shufflevector(a, b, high_lane(kLane, kStep)...);
#else
  const Ints low = {low_lane(kLane, kStep)...};
  const Ints high = {high_lane(kLane, kStep)...};
  const Floats first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
#endif
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
    for (std::size_t i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) trade<kStep>(x[i], x[i + kStep]);
    }
    transpose<kStep * 2>(x);
  }
}

// Rows [row, row + kLanes) of `count`, channels [c, c + kLanes): one vector a channel.
inline void load_block(const float* const* rows, std::size_t row, std::size_t count, std::size_t c,
                       Floats (&x)[kLanes]) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    x[i] = row + i < count ? load(rows[row + i] + c) : Floats{};
  }
  transpose<1>(x);
}

void load_panel(const float* const* rows, std::size_t count, float factor, const Panel& panel) {
  const std::size_t stride = panel.vectors * kLanes;
  for (std::size_t v = 0; v < panel.vectors; ++v) {
    const std::size_t row = v * kLanes;
    std::size_t c = 0;
    for (; c + kLanes <= panel.width; c += kLanes) {
      Floats x[kLanes];
      load_block(rows, row, count, c, x);
      for (std::size_t i = 0; i < kLanes; ++i) {
        store(panel.queries + (c + i) * stride + row, x[i] * factor);
      }
    }
    for (; c < panel.width; ++c) {
      Floats x{};
      for (std::size_t i = 0; i < kLanes && row + i < count; ++i) x[i] = rows[row + i][c] * factor;
      store(panel.queries + c * stride + row, x);
    }
    store(panel.max + row, all(-kInfinity));
    store(panel.sum + row, Floats{});
  }
  for (std::size_t i = 0; i < panel.value_width * stride; i += kLanes) {
    store(panel.out + i, Floats{});
  }
}

void store_panel(const Panel& panel, std::size_t count, float* const* out) {
  const std::size_t stride = panel.vectors * kLanes;
  for (std::size_t row = 0; row < count; row += kLanes) {
    const Floats sum = load(panel.sum + row);
    // A query that saw nothing has sum 0 and out 0.
    const Floats factor = 1.0F / (sum == 0.0F ? all(1.0F) : sum);
    std::size_t c = 0;
    for (; c + kLanes <= panel.value_width; c += kLanes) {
      Floats x[kLanes];
      for (std::size_t i = 0; i < kLanes; ++i) {
        x[i] = load(panel.out + (c + i) * stride + row) * factor;
      }
      transpose<1>(x);
      for (std::size_t i = 0; i < kLanes && row + i < count; ++i) store(out[row + i] + c, x[i]);
    }
    for (; c < panel.value_width; ++c) {
      const Floats x = load(panel.out + c * stride + row) * factor;
      for (std::size_t i = 0; i < kLanes && row + i < count; ++i) out[row + i][c] = x[i];
    }
  }
}

// Scores of kKeys keys for all queries of the panel, written to `scores` and taken into `max`.
// `place` is the first key's; kMasked: some queries do not see all of these keys.
template <std::size_t kKeys, std::size_t kVectors, bool kMasked>
inline void score(const Panel& panel, const float* keys, std::size_t key_stride, std::size_t place,
                  float* scores, Floats (&max)[kVectors]) {
  Floats sums[kKeys][kVectors];
  const float* row[kKeys];
  each<kKeys>([&](auto k) {
    row[k.value] = keys + k.value * key_stride;
    each<kVectors>([&](auto v) { sums[k.value][v.value] = Floats{}; });
  });
  const float* queries = panel.queries;
  const std::size_t width = panel.width;
  for (std::size_t c = 0; c < width; ++c, queries += kVectors * kLanes) {
    Floats query[kVectors];
    each<kVectors>([&](auto v) { query[v.value] = load(queries + v.value * kLanes); });
    each<kKeys>([&](auto k) {
      const Floats key = all(row[k.value][c]);
      each<kVectors>([&](auto v) { sums[k.value][v.value] += query[v.value] * key; });
    });
  }
  if constexpr (kMasked) {
    each<kVectors>([&](auto v) {
      const Ints limits = *reinterpret_cast<const Ints*>(panel.limits + v.value * kLanes);
      each<kKeys>([&](auto k) {
        Floats& sum = sums[k.value][v.value];
        sum = limits > static_cast<std::int32_t>(place + k.value) ? sum : all(-kInfinity);
      });
    });
  }
  each<kKeys>([&](auto k) {
    each<kVectors>([&](auto v) {
      max[v.value] = larger(max[v.value], sums[k.value][v.value]);
      store(scores + (k.value * kVectors + v.value) * kLanes, sums[k.value][v.value]);
    });
  });
}

// Blocks of kKeys keys while they last, then of half as many.
template <std::size_t kKeys, std::size_t kVectors>
void score_all(const Panel& panel, const KeyTile& tile, std::size_t count, std::size_t done,
               float* scores, Floats (&max)[kVectors]) {
  for (; done + kKeys <= count; done += kKeys) {
    const float* keys = tile.keys + done * tile.key_stride;
    const std::size_t place = tile.first + done;
    float* to = scores + done * kVectors * kLanes;
    if (kKeys == kBlock && place + kKeys <= panel.least) {
      // The last few keys need no code of their own.
      constexpr bool kMasked = kKeys != kBlock;
      score<kKeys, kVectors, kMasked>(panel, keys, tile.key_stride, place, to, max);
    } else {
      score<kKeys, kVectors, true>(panel, keys, tile.key_stride, place, to, max);
    }
  }
  if constexpr (kKeys > 1) {
    if (done < count) score_all<kKeys / 2, kVectors>(panel, tile, count, done, scores, max);
  }
}

// out = out * alpha + weights^T values for columns [c, c + kColumns). A tile is summed on its own:
// the error of long sums grows with the number of tiles rather than of keys.
template <std::size_t kColumns, std::size_t kVectors>
inline void weigh(const Panel& panel, const KeyTile& tile, std::size_t count, std::size_t c,
                  const float* weights, const Floats (&alpha)[kVectors]) {
  Floats sums[kColumns][kVectors];
  float* out = panel.out + c * kVectors * kLanes;
  each<kColumns>([&](auto i) {
    each<kVectors>([&](auto v) { sums[i.value][v.value] = Floats{}; });
  });
  const float* values = tile.values + c;
  const std::size_t stride = tile.value_stride;
  for (std::size_t k = 0; k < count; ++k, values += stride, weights += kVectors * kLanes) {
    Floats weight[kVectors];
    each<kVectors>([&](auto v) { weight[v.value] = load(weights + v.value * kLanes); });
    each<kColumns>([&](auto i) {
      const Floats value = all(values[i.value]);
      each<kVectors>([&](auto v) { sums[i.value][v.value] += weight[v.value] * value; });
    });
  }
  each<kColumns>([&](auto i) {
    each<kVectors>([&](auto v) {
      float* at = out + (i.value * kVectors + v.value) * kLanes;
      store(at, load(at) * alpha[v.value] + sums[i.value][v.value]);
    });
  });
}

template <std::size_t kColumns, std::size_t kVectors>
void weigh_all(const Panel& panel, const KeyTile& tile, std::size_t count, std::size_t c,
               const float* weights, const Floats (&alpha)[kVectors]) {
  for (; c + kColumns <= panel.value_width; c += kColumns) {
    weigh<kColumns, kVectors>(panel, tile, count, c, weights, alpha);
  }
  if constexpr (kColumns > 1) {
    if (c < panel.value_width) {
      weigh_all<kColumns / 2, kVectors>(panel, tile, count, c, weights, alpha);
    }
  }
}

// What is subtracted from scores: the maximum, or 0 where nothing was seen, as -inf - -inf is NaN.
inline Floats shift_of(Floats max) { return max == -kInfinity ? Floats{} : max; }

template <std::size_t kVectors>
void absorb(const Panel& panel, const KeyTile& tile, float* weights) {
  const std::size_t seen = panel.most - tile.first;
  const std::size_t count = seen < tile.count ? seen : tile.count;
  Floats max[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) max[v] = load(panel.max + v * kLanes);
  score_all<kBlock, kVectors>(panel, tile, count, 0, weights, max);

  Floats alpha[kVectors];
  Floats shift[kVectors];
  Floats sum[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    shift[v] = shift_of(max[v]);
    alpha[v] = exp2(load(panel.max + v * kLanes) - shift[v]);
    sum[v] = Floats{};
    store(panel.max + v * kLanes, max[v]);
  }
  for (std::size_t k = 0; k < count; ++k) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      float* at = weights + (k * kVectors + v) * kLanes;
      const Floats weight = exp2(load(at) - shift[v]);
      sum[v] += weight;
      store(at, weight);
    }
  }
  for (std::size_t v = 0; v < kVectors; ++v) {
    float* at = panel.sum + v * kLanes;
    store(at, load(at) * alpha[v] + sum[v]);
  }
  weigh_all<kBlock, kVectors>(panel, tile, count, 0, weights, alpha);
}

void absorb_panel(const Panel& panel, const KeyTile& tile, float* weights) {
  if (tile.first >= panel.most) return;
  if (panel.vectors == 1) {
    absorb<1>(panel, tile, weights);
  } else if (panel.vectors == 2) {
    absorb<2>(panel, tile, weights);
  } else {
    absorb<3>(panel, tile, weights);
  }
}

// Few queries: channels side by side.
// Vectors of values in registers: enough sums to hide the latency of an addition.
constexpr std::size_t chunk_of(std::size_t rows) {
  return rows > 2 ? kBlock / 2 : rows == 2 ? kBlock : 8;
}
constexpr std::size_t kFewRows = 4;         // queries in registers

inline std::size_t value_channel(const FewRows& few, std::size_t vector) {
  const std::size_t c = vector * kLanes;
  return c + kLanes <= few.value_width ? c : few.value_width - kLanes;
}

// All ones where the last vector of a row does not repeat channels.
inline Ints fresh_lanes(const FewRows& few) {
  Ints fresh;
  for (std::size_t l = 0; l < kLanes; ++l) fresh[l] = l >= few.stride - few.width ? -1 : 0;
  return fresh;
}

// The sums of kLanes vectors, one a lane.
template <std::size_t kStep>
inline Floats sums_of(Floats (&x)[kLanes]) {
  for (std::size_t i = 0; i < kLanes; i += 2 * kStep) {
    trade<kStep>(x[i], x[i + kStep]);
    x[i] += x[i + kStep];
  }
  if constexpr (kStep * 2 < kLanes) return sums_of<kStep * 2>(x);
  return x[0];
}

template <std::size_t kRows>
void score_few(const FewRows& few, std::size_t first_row, const KeyTile& tile, std::size_t count,
               float* weights) {
  const std::size_t vectors = few.stride / kLanes;
  const std::size_t last = few.width - kLanes;
  const Ints fresh = fresh_lanes(few);
  const float* queries = few.queries + first_row * few.stride;
  Ints lane;
  for (std::size_t l = 0; l < kLanes; ++l) lane[l] = static_cast<std::int32_t>(l);
  for (std::size_t start = 0; start < count; start += kLanes) {
    Floats parts[kRows][kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      // Behind the last key, its scores again; they are masked below.
      const std::size_t k = start + i < count ? start + i : count - 1;
      const float* key = tile.keys + k * tile.key_stride;
      Floats sums[kRows];
      const Floats end = (Floats)((Ints)load(key + last) & fresh);
      for (std::size_t r = 0; r < kRows; ++r) {
        sums[r] = end * load(queries + r * few.stride + (vectors - 1) * kLanes);
      }
      for (std::size_t v = 0; v + 1 < vectors; ++v) {
        const Floats x = load(key + v * kLanes);
        for (std::size_t r = 0; r < kRows; ++r) {
          sums[r] += x * load(queries + r * few.stride + v * kLanes);
        }
      }
      for (std::size_t r = 0; r < kRows; ++r) parts[r][i] = sums[r];
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      const std::size_t seen = static_cast<std::size_t>(few.limits[first_row + r]);
      const std::size_t end = seen < tile.first + count ? seen : tile.first + count;
      const auto here = static_cast<std::int32_t>(end) - static_cast<std::int32_t>(tile.first + start);
      const Floats scores = sums_of<1>(parts[r]);
      store(weights + (first_row + r) * kTileKeys + start, lane < here ? scores : all(-kInfinity));
    }
  }
}

// Scores to weights, in place; gives alpha, by which the row's former sums are multiplied.
inline float soften(const FewRows& few, std::size_t row, std::size_t count, float* weights) {
  Floats max = all(few.max[row]);
  for (std::size_t k = 0; k < count; k += kLanes) max = larger(max, load(weights + k));
  float top = max[0];
  for (std::size_t l = 1; l < kLanes; ++l) top = max[l] > top ? max[l] : top;
  const float shift = top == -kInfinity ? 0.0F : top;
  const float alpha = exp2(all(few.max[row] - shift))[0];
  Floats sum{};
  for (std::size_t k = 0; k < count; k += kLanes) {
    const Floats weight = exp2(load(weights + k) - shift);
    sum += weight;
    store(weights + k, weight);
  }
  float total = few.sum[row] * alpha;
  for (std::size_t l = 0; l < kLanes; ++l) total += sum[l];
  few.sum[row] = total;
  few.max[row] = top;
  return alpha;
}

template <std::size_t kRows, std::size_t kVectors>
void weigh_few(const FewRows& few, std::size_t first_row, const KeyTile& tile, std::size_t count,
               std::size_t vector, const float* weights, const float* alpha) {
  const std::size_t vectors = few.out_stride / kLanes;
  for (; vector + kVectors <= vectors; vector += kVectors) {
    std::size_t channel[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) channel[v] = value_channel(few, vector + v);
    Floats sums[kRows][kVectors];
    float* out = few.out + first_row * few.out_stride + vector * kLanes;
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = Floats{};
    }
    const float* values = tile.values;
    for (std::size_t k = 0; k < count; ++k, values += tile.value_stride) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        const Floats value = load(values + channel[v]);
        for (std::size_t r = 0; r < kRows; ++r) {
          sums[r][v] += value * weights[(first_row + r) * kTileKeys + k];
        }
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        float* at = out + r * few.out_stride + v * kLanes;
        store(at, load(at) * alpha[first_row + r] + sums[r][v]);
      }
    }
  }
  if constexpr (kVectors > 1) {
    if (vector < vectors) {
      weigh_few<kRows, kVectors / 2>(few, first_row, tile, count, vector, weights, alpha);
    }
  }
}

template <std::size_t kRows>
void score_rows(const FewRows& few, std::size_t row, const KeyTile& tile, std::size_t count,
                float* weights) {
  for (; row + kRows <= few.rows; row += kRows) {
    score_few<kRows>(few, row, tile, count, weights);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) score_rows<kRows - 1>(few, row, tile, count, weights);
  }
}

template <std::size_t kRows>
void weigh_rows(const FewRows& few, std::size_t row, const KeyTile& tile, std::size_t count,
                const float* weights, const float* alpha) {
  for (; row + kRows <= few.rows; row += kRows) {
    weigh_few<kRows, chunk_of(kRows)>(few, row, tile, count, 0, weights, alpha);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) weigh_rows<kRows - 1>(few, row, tile, count, weights, alpha);
  }
}

void absorb_few(const FewRows& few, const KeyTile& tile, float* weights) {
  if (tile.first >= few.most) return;
  const std::size_t seen = few.most - tile.first;
  const std::size_t count = seen < tile.count ? seen : tile.count;
  float alpha[kMostFew];
  score_rows<kFewRows>(few, 0, tile, count, weights);
  for (std::size_t r = 0; r < few.rows; ++r) {
    alpha[r] = soften(few, r, count, weights + r * kTileKeys);
  }
  weigh_rows<kFewRows>(few, 0, tile, count, weights, alpha);
}

void rotate(float* key, const float* cos, const float* sin, std::size_t width) {
  const std::size_t half = width / 2;
  std::size_t c = 0;
  for (; c + kLanes <= half; c += kLanes) {
    const Floats low = load(key + c);
    const Floats high = load(key + half + c);
    store(key + c, low * load(cos + c) - high * load(sin + c));
    store(key + half + c, high * load(cos + half + c) + low * load(sin + half + c));
  }
  for (; c < half; ++c) {
    const float low = key[c];
    const float high = key[half + c];
    key[c] = low * cos[c] - high * sin[c];
    key[half + c] = high * cos[half + c] + low * sin[half + c];
  }
}

}  // namespace

const AttentionKernels ASTRA_ATTENTION = {
    ASTRA_NAME, kLanes, load_panel, absorb_panel, store_panel, absorb_few, rotate,
};

}  // namespace astra::detail
