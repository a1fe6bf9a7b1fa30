// The inner loops of attention, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension) and compiled for each instruction set as ASTRA_ATTENTION. ASTRA_BLOCK keys, or columns
// of the values, by a panel of queries stay in registers: 8 x 3 sums of 32 registers, or 4 x 3 of
// 16.

#include "attention_kernel.hpp"
#include "pairs.inl"

namespace astra::detail {
namespace {

constexpr std::size_t kBlock = ASTRA_BLOCK;
constexpr float kInfinity = __builtin_inff();

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

#include "attention_round.inl"

// Rows [row, row + kLanes) of `count`, channels [c, c + kLanes): one vector a channel.
inline void load_block(const float* const* rows, std::size_t row, std::size_t count, std::size_t c,
                       Floats (&x)[kLanes]) {
  if (row + kLanes <= count) {
    each<kLanes>([&](auto i) { x[i.value] = load(rows[row + i.value] + c); });
  } else {
    each<kLanes>([&](auto i) {
      x[i.value] = row + i.value < count ? load(rows[row + i.value] + c) : Floats{};
    });
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
      float* to = panel.queries + c / kPair * stride + row;
      each<kLanes / kPair>([&](auto i) {
        constexpr std::size_t kFirst = i.value * kPair;
        store(to + i.value * stride, joined(x[kFirst] * factor, x[kFirst + kPair - 1] * factor));
      });
    }
    for (; c < panel.width; c += kPair) {
      const std::size_t next = c + kPair - 1;
      Floats x{}, y{};
      for (std::size_t i = 0; i < kLanes && row + i < count; ++i) {
        x[i] = rows[row + i][c] * factor;
        y[i] = next < panel.width ? rows[row + i][next] * factor : 0.0F;
      }
      store(panel.queries + c / kPair * stride + row, joined(x, y));
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
      const float* from = panel.out + c * stride + row;
      each<kLanes>([&](auto i) { x[i.value] = load(from + i.value * stride) * factor; });
      transpose<1>(x);
      each<kLanes>([&](auto i) {
        if (row + i.value < count) store(out[row + i.value] + c, x[i.value]);
      });
    }
    for (; c < panel.value_width; ++c) {
      const Floats x = load(panel.out + c * stride + row) * factor;
      for (std::size_t i = 0; i < kLanes && row + i < count; ++i) out[row + i][c] = x[i];
    }
  }
}

// How many keys of the tile the vectors of a panel see, each at least as many as the one before.
template <std::size_t kVectors>
struct Seen {
  Seen(const Panel& panel, const KeyTile& tile, std::size_t count) {
    each<kVectors>([&](auto v) {
      const auto limit = static_cast<std::size_t>(panel.limits[(v.value + 1) * kLanes - 1]);
      const std::size_t seen = limit > tile.first ? limit - tile.first : 0;
      keys[v.value] = seen < count ? seen : count;
    });
  }

  std::size_t keys[kVectors];
};

// Scores of kKeys keys for the queries of the panel from vector kFirst on, written to `scores` and
// taken into `max`. `place` is the first key's; kMasked: some queries do not see all of these keys.
template <std::size_t kKeys, std::size_t kVectors, std::size_t kFirst, bool kMasked>
inline void score(const Panel& panel, const float* keys, std::size_t key_stride, std::size_t place,
                  float* scores, Floats (&max)[kVectors]) {
  constexpr std::size_t kUsed = kVectors - kFirst;
  Floats sums[kKeys][kUsed];
  const float* row[kKeys];
  each<kKeys>([&](auto k) {
    row[k.value] = keys + k.value * key_stride;
    each<kUsed>([&](auto v) { sums[k.value][v.value] = Floats{}; });
  });
  const float* queries = panel.queries + kFirst * kLanes;
  const std::size_t width = paired(panel.width);
  for (std::size_t c = 0; c < width; ++c, queries += kVectors * kLanes) {
    Floats query[kUsed];
    each<kUsed>([&](auto v) { query[v.value] = load(queries + v.value * kLanes); });
    each<kKeys>([&](auto k) {
      const Floats key = all(row[k.value][c]);
      each<kUsed>([&](auto v) {
        Floats& sum = sums[k.value][v.value];
        sum = multiply_add(sum, query[v.value], key);
      });
    });
  }
  if constexpr (kMasked) {
    each<kUsed>([&](auto v) {
      const std::int32_t* own = panel.limits + (kFirst + v.value) * kLanes;
      const Ints limits = *reinterpret_cast<const LooseInts*>(own);
      each<kKeys>([&](auto k) {
        Floats& sum = sums[k.value][v.value];
        sum = limits > static_cast<std::int32_t>(place + k.value) ? sum : all(-kInfinity);
      });
    });
  }
  each<kKeys>([&](auto k) {
    each<kUsed>([&](auto v) {
      constexpr std::size_t kVector = kFirst + v.value;
      max[kVector] = larger(max[kVector], sums[k.value][v.value]);
      store(scores + (k.value * kVectors + kVector) * kLanes, sums[k.value][v.value]);
    });
  });
}

// Blocks of kKeys keys while they last, then of half as many.
template <std::size_t kKeys, std::size_t kVectors>
void score_all(const Panel& panel, const KeyTile& tile, const Seen<kVectors>& seen,
               std::size_t count, std::size_t done, float* scores, Floats (&max)[kVectors]) {
  for (; done + kKeys <= count; done += kKeys) {
    const float* keys = tile.keys + done * tile.key_stride;
    const std::size_t place = tile.first + done;
    float* to = scores + done * kVectors * kLanes;
    if (kKeys == kBlock && place + kKeys <= panel.least) {
      // The last few keys need no code of their own.
      constexpr bool kMasked = kKeys != kBlock;
      score<kKeys, kVectors, 0, kMasked>(panel, keys, tile.key_stride, place, to, max);
    } else if (kVectors == 1 || seen.keys[0] > done) {
      score<kKeys, kVectors, 0, true>(panel, keys, tile.key_stride, place, to, max);
    } else if (kVectors == 2 || seen.keys[1 % kVectors] > done) {
      score<kKeys, kVectors, 1 % kVectors, true>(panel, keys, tile.key_stride, place, to, max);
    } else {
      score<kKeys, kVectors, 2 % kVectors, true>(panel, keys, tile.key_stride, place, to, max);
    }
  }
  if constexpr (kKeys > 1) {
    if (done < count) score_all<kKeys / 2, kVectors>(panel, tile, seen, count, done, scores, max);
  }
}

// out = out * alpha + weights^T values for columns [c, c + kColumns). A tile is summed on its own:
// the error of long sums grows with the number of tiles rather than of keys.
template <std::size_t kColumns, std::size_t kVectors>
inline void weigh(const Panel& panel, const KeyTile& tile, const Seen<kVectors>& seen,
                  std::size_t c, const float* weights, const Floats (&alpha)[kVectors]) {
  Floats sums[kColumns][kVectors];
  float* out = panel.out + c * kVectors * kLanes;
  each<kColumns>(
      [&](auto i) { each<kVectors>([&](auto v) { sums[i.value][v.value] = Floats{}; }); });
  const float* values = tile.values + c;
  const std::size_t stride = tile.value_stride;
  std::size_t k = 0;
  // First the keys that all vectors see, then those that all but the first see, and so on.
  each<kVectors>([&](auto first) {
    constexpr std::size_t kFirst = first.value;
    for (; k < paired(seen.keys[kFirst]); ++k, values += stride, weights += kVectors * kLanes) {
      Floats weight[kVectors - kFirst];
      each<kVectors - kFirst>(
          [&](auto v) { weight[v.value] = load(weights + (kFirst + v.value) * kLanes); });
      each<kColumns>([&](auto i) {
        const Floats value = all(values[i.value]);
        each<kVectors - kFirst>([&](auto v) {
          Floats& sum = sums[i.value][kFirst + v.value];
          sum = multiply_add(sum, weight[v.value], value);
        });
      });
    }
  });
  each<kColumns>([&](auto i) {
    each<kVectors>([&](auto v) {
      float* at = out + (i.value * kVectors + v.value) * kLanes;
      store(at, load(at) * alpha[v.value] + sums[i.value][v.value]);
    });
  });
}

template <std::size_t kColumns, std::size_t kVectors>
void weigh_all(const Panel& panel, const KeyTile& tile, const Seen<kVectors>& seen, std::size_t c,
               const float* weights, const Floats (&alpha)[kVectors]) {
  for (; c + kColumns <= panel.value_width; c += kColumns) {
    weigh<kColumns, kVectors>(panel, tile, seen, c, weights, alpha);
  }
  if constexpr (kColumns > 1) {
    if (c < panel.value_width) {
      weigh_all<kColumns / 2, kVectors>(panel, tile, seen, c, weights, alpha);
    }
  }
}

// What is subtracted from scores: the maximum, or 0 where nothing was seen, as -inf - -inf is NaN.
inline Floats shift_of(Floats max) { return max == -kInfinity ? Floats{} : max; }

template <std::size_t kVectors>
void absorb(const Panel& panel, const KeyTile& tile, float* weights) {
  const std::size_t most = panel.most - tile.first;
  const std::size_t count = most < tile.count ? most : tile.count;
  const Seen<kVectors> seen(panel, tile, count);
  Floats max[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) max[v] = load(panel.max + v * kLanes);
  score_all<kBlock, kVectors>(panel, tile, seen, count, 0, weights, max);

  Floats alpha[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    const Floats shift = shift_of(max[v]);
    alpha[v] = exp2(load(panel.max + v * kLanes) - shift);
    store(panel.max + v * kLanes, max[v]);
    Floats sum{};
    const auto weight = [&](std::size_t k) {
      return exp2(load(weights + (k * kVectors + v) * kLanes) - shift);
    };
    for (std::size_t k = 0; k < seen.keys[v]; k += kPair) {
      const Floats first = weight(k);
      const bool alone = kPair == 1 || k + 1 == seen.keys[v];
      const Floats second = alone ? Floats{} : weight(k + 1);
      sum += alone ? first : first + second;
      store(weights + (k / kPair * kVectors + v) * kLanes, joined(first, second));
    }
    float* at = panel.sum + v * kLanes;
    store(at, load(at) * alpha[v] + sum);
  }
  weigh_all<kBlock, kVectors>(panel, tile, seen, 0, weights, alpha);
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

#include "attention_gather.inl"

#include "attention_few.inl"

#include "attention_half.inl"

}  // namespace

const AttentionKernels ASTRA_ATTENTION = {
    ASTRA_NAME,       kLanes, load_panel, absorb_panel, store_panel, absorb_few,
    absorb_codewords, gather, compose,    widen,        narrow,      kRound,
};

}  // namespace astra::detail
