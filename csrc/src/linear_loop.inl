// The loops of quantized_linear, written once with vectors.inl. The file that includes this says
// what one instruction does:
//   Input            a rounded input; kStep of them are 32 bits
//   kOffset, kFlip   what is added to a weight to make it unsigned, and how to do so to four
//   kRows, kVectors  a block of sums in registers
//   load_weights     kStep weights of each of kLanes outputs, as multiply_add takes them
//   repeated         kStep inputs in every lane
//   multiply_add     sums + the kStep products of each lane
//   scaled_add       sums + x * scale
//   store_inputs     kLanes integers as inputs
//   partial          kPartial sums of products, of as many whole chunks of kChunk as there are;
//                    the argument of the template is added to the weights

#include <array>

namespace astra::detail {
namespace {

constexpr std::size_t kTile = kLanes * kVectors;
constexpr std::size_t kTogether = 4;  // weights of an output that are laid out at a time
constexpr std::size_t kCached = 256 * 1024;  // bytes of tiles that are used together
constexpr float kNaN = __builtin_nanf("");

inline float scale_at(const void* scales, bool half, std::size_t i) {
  if (!half) return static_cast<const float*>(scales)[i];
  // bfloat16 is the upper half of a float
  const std::uint32_t bits =
      static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(scales)[i]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::int32_t bits_of(float value) {
  std::int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline Floats load_some(const void* from, std::size_t bytes) {
  Floats x{};
  __builtin_memcpy(&x, from, bytes);
  return x;
}

// Lane i is what `combine` makes of all lanes of x[i]; x is used up.
template <std::size_t kWidth = 1, class Combine>
inline Ints combined(Ints (&x)[kLanes], Combine combine) {
  each<kLanes>([&](auto i) {
    if constexpr (i.value % (2 * kWidth) == 0) {
      auto a = (Floats)x[i.value], b = (Floats)x[i.value + kWidth];
      trade<kWidth>(a, b);
      x[i.value] = combine((Ints)a, (Ints)b);
    }
  });
  if constexpr (kWidth * 2 < kLanes) return combined<kWidth * 2>(x, combine);
  return x[0];
}

constexpr auto larger = [](Ints a, Ints b) { return a > b ? a : b; };

// The bits of the largest magnitudes of a group, in any lanes. They are ordered as magnitudes are,
// infinity and NaN above all.
inline Ints largest_of(const float* x, std::size_t count) {
  constexpr std::int32_t kMagnitude = 0x7fffffff;
  Ints most{};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = larger(most, (Ints)load(x + i) & kMagnitude);
  if (i == count) return most;
  return larger(most, (Ints)load_some(x + i, (count - i) * sizeof(float)) & kMagnitude);
}

// round(x * inverse) of a group; the sum of what is returned is theirs.
inline Ints round_group(const float* x, std::size_t count, float inverse, Input* to) {
  // Adding 1.5 * 2^23 leaves a whole number in the lowest bits.
  constexpr float kMagic = 12582912.0F;
  const std::int32_t magic = bits_of(kMagic);
  const auto rounded = [&](Floats some) { return (Ints)(some * inverse + kMagic) - magic; };
  Ints sums{};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Ints integers = rounded(load(x + i));
    sums += integers;
    store_inputs(to + i, integers);
  }
  if (i == count) return sums;
  const Ints integers = rounded(load_some(x + i, (count - i) * sizeof(float)));
  Input last[kLanes];
  store_inputs(last, integers);
  __builtin_memcpy(to + i, last, (count - i) * sizeof(Input));
  return sums + integers;
}

// kLanes groups of all rows from group `at` on, or as many as there are.
void round_groups(const LinearCall& call, const float* x, std::size_t at, std::size_t count) {
  constexpr std::int32_t kInfinity = 0x7f800000;
  const std::int32_t least = bits_of(0x1p-119F);  // below, 127 / m may be infinite
  auto* to = static_cast<Input*>(call.x.integers) + at * call.padded;
  x += at * call.width;
  Ints sums[kLanes] = {};
  for (std::size_t i = 0; i < count; ++i) sums[i] = largest_of(x + i * call.width, call.width);
  const Ints bits = combined(sums, larger);
  const Floats largest = (Floats)bits;
  const Floats inverse = (bits >= least) & (bits < kInfinity) ? 127.0F / largest : Floats{};
  const Floats step = bits < kInfinity ? largest / 127.0F : all(kNaN);
  for (std::size_t i = 0; i < kLanes; ++i) sums[i] = Ints{};
  for (std::size_t i = 0; i < count; ++i, x += call.width, to += call.padded) {
    if (inverse[i] > 0.0F) {
      sums[i] = round_group(x, call.width, inverse[i], to);
    } else {
      __builtin_memset(to, 0, call.width * sizeof(Input));
    }
    for (std::size_t k = call.width; k < call.padded; ++k) to[k] = 0;
  }
  const Ints sum = combined(sums, [](Ints a, Ints b) { return a + b; });
  store(call.x.steps + at, step);
  store(call.x.sums + at, __builtin_convertvector(sum, Floats) * step);
  *reinterpret_cast<LooseInts*>(call.x.offsets + at) = sum * -kOffset;
}

void round_rows(const LinearCall& call, const float* x) {
  const std::size_t groups = call.rows * call.groups;
  for (std::size_t at = 0; at < groups; at += kLanes) {
    round_groups(call, x, at, groups - at < kLanes ? groups - at : kLanes);
  }
}

// Weights of 4 bits as bytes, in order.
inline void spread(const std::uint8_t* pairs, std::size_t count, std::int8_t* to) {
  std::size_t i = 0;
#ifdef __SSE2__
  const __m128i low = _mm_set1_epi8(15);
  for (; i + 16 <= count; i += 16) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs + i));
    const __m128i even = _mm_and_si128(both, low);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(both, 4), low);
    auto* out = reinterpret_cast<__m128i*>(to + 2 * i);
    _mm_storeu_si128(out, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi8(even, odd));
  }
#endif
  for (; i < count; ++i) {
    to[2 * i] = static_cast<std::int8_t>(pairs[i] & 15);
    to[2 * i + 1] = static_cast<std::int8_t>(pairs[i] >> 4);
  }
}

// The weights of one output, as bytes in order: those of the call, or spread out.
inline const std::int8_t* weights_of(const LinearCall& call, std::size_t output,
                                     std::int8_t* space) {
  if (call.values != nullptr) return call.values + output * call.inputs;
  spread(call.halves + output * (call.inputs / 2), call.inputs / 2, space);
  return space;
}

// One output of one row: sums stay in their lanes until the last group.
template <std::int32_t kAdded>
inline float one_output(const LinearCall& call, const std::int8_t* weights, std::size_t n,
                        std::size_t row) {
  typedef float Lanes __attribute__((vector_size(4 * kPartial)));
  const std::size_t chunks = call.width / kChunk * kChunk;
  Lanes lanes{};
  float sum = 0.0F;
  for (std::size_t g = 0; g < call.groups; ++g, weights += call.width) {
    const std::size_t at = row * call.groups + g, here = n * call.groups + g;
    const Input* inputs = static_cast<const Input*>(call.x.integers) + at * call.padded;
    const float scale = scale_at(call.scales, call.half_scales, here) * call.x.steps[at];
    const Partial products = partial<kAdded>(weights, inputs, call.width);
    std::int32_t rest = kAdded == 0 ? 0 : call.x.offsets[at];
    for (std::size_t i = chunks; i < call.width; ++i) rest += (weights[i] + kAdded) * inputs[i];
    lanes += __builtin_convertvector(products, Lanes) * scale;
    if (kAdded != 0 || chunks < call.width) sum += static_cast<float>(rest) * scale;
    if (call.minima != nullptr) {
      sum += call.x.sums[at] * scale_at(call.minima, call.half_scales, here);
    }
  }
  for (std::size_t l = 0; l < kPartial; ++l) sum += lanes[l];
  return call.bias == nullptr ? sum : sum + call.bias[n];
}

void few_rows(const LinearCall& call, std::size_t first, std::size_t last, void* space) {
  for (std::size_t n = first; n < last; ++n) {
    const std::int8_t* weights = weights_of(call, n, static_cast<std::int8_t*>(space));
    for (std::size_t row = 0; row < call.rows; ++row) {
      // weights of 4 bits are 0 to 15, unsigned as they are
      call.out[row * call.outputs + n] = call.halves != nullptr
                                             ? one_output<0>(call, weights, n, row)
                                             : one_output<kOffset>(call, weights, n, row);
    }
  }
}

// Where a tile's parts lie in the space that the caller gives.
struct Tile {
  std::uint8_t* weights;  // [groups * padded / kStep, kTile, kStep], kOffset added
  float* scales;          // [groups, kTile]
  float* minima;          // [groups, kTile]
  float* bias;            // [kTile]
  float* sums;            // [kRows, kTile], of all tiles
  std::int8_t* spread;    // [kLanes, inputs], with weights of 4 bits, of all tiles
};

std::size_t bytes_of_tile(const LinearCall& call) {
  return call.groups * call.padded * kTile + (2 * call.groups + 1) * kTile * sizeof(float);
}

// So many tiles at a time: every block of rows meets all of them while it is in the cache.
std::size_t tiles_of(const LinearCall& call) {
  const std::size_t most = (call.outputs + kTile - 1) / kTile, fit = kCached / bytes_of_tile(call);
  return fit < 1 ? 1 : fit < most ? fit : most;
}

std::size_t space_of(const LinearCall& call) {
  const std::size_t spread = call.halves == nullptr ? 0 : kLanes * call.inputs;
  return tiles_of(call) * bytes_of_tile(call) + kRows * kTile * sizeof(float) + spread;
}

Tile tile_in(const LinearCall& call, void* space, std::size_t index) {
  const std::size_t bytes = bytes_of_tile(call);
  auto* const memory = static_cast<unsigned char*>(space);
  Tile tile{};
  tile.weights = memory + index * bytes;
  tile.scales = reinterpret_cast<float*>(tile.weights + call.groups * call.padded * kTile);
  tile.minima = tile.scales + call.groups * kTile;
  tile.bias = tile.minima + call.groups * kTile;
  tile.sums = reinterpret_cast<float*>(memory + tiles_of(call) * bytes);
  tile.spread = reinterpret_cast<std::int8_t*>(tile.sums + kRows * kTile);
  return tile;
}

// Weights `rows[n]` of kLanes outputs, `count` of each, side by side: those of a step together.
inline void lay_out(const std::int8_t* const* rows, std::size_t count, std::uint8_t* to) {
  constexpr std::size_t kBytes = kTogether * kLanes, kStride = kTile * kTogether;
  for (std::size_t k = 0; k < count; k += kBytes, to += kLanes * kStride) {
    Floats x[kLanes];
    if (k + kBytes <= count) {
      each<kLanes>([&](auto i) { x[i.value] = load_some(rows[i.value] + k, kBytes); });
    } else {
      each<kLanes>([&](auto i) { x[i.value] = load_some(rows[i.value] + k, count - k); });
    }
    transpose<1>(x);
    each<kLanes>([&](auto i) {
      const std::size_t first = k + i.value * kTogether;
      if (first >= count) return;
      const Ints four = (Ints)((Bits)x[i.value] ^ kFlip);
      if constexpr (kStep == kTogether) {
        *reinterpret_cast<LooseInts*>(to + i.value * kStride) = four;
      } else {
        auto* pair = reinterpret_cast<Input*>(to + i.value * kStride);
        store_inputs(pair, (Ints)((Bits)four << 16) >> 16);
        if (first + kStep < count) store_inputs(pair + kTile, four >> 16);
      }
    });
  }
}

// Lays out the weights of `count` outputs from `first` on; behind the last, it once more.
void fill(const LinearCall& call, std::size_t first, std::size_t count, const Tile& tile) {
  const auto output = [&](std::size_t n) { return first + (n < count ? n : count - 1); };
  for (std::size_t v = 0; v < kVectors; ++v) {
    const std::int8_t* rows[kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      rows[i] = weights_of(call, output(v * kLanes + i), tile.spread + i * call.inputs);
    }
    std::uint8_t* to = tile.weights + v * kLanes * kStep;
    const bool whole = call.width == call.padded;  // groups lie one behind the other
    const std::size_t width = whole ? call.inputs : call.width;
    for (std::size_t g = 0; g < (whole ? 1 : call.groups); ++g) {
      lay_out(rows, width, to + g * call.padded * kTile);
      for (auto& row : rows) row += width;
    }
  }
  for (std::size_t n = 0; n < kTile; ++n) {
    tile.bias[n] = call.bias == nullptr ? 0.0F : call.bias[output(n)];
    const std::size_t at = output(n) * call.groups;
    for (std::size_t g = 0; g < call.groups; ++g) {
      tile.scales[g * kTile + n] = scale_at(call.scales, call.half_scales, at + g);
      if (call.minima != nullptr) {
        tile.minima[g * kTile + n] = scale_at(call.minima, call.half_scales, at + g);
      }
    }
  }
}

// kBlock rows by one tile; only the first `count` outputs are written.
template <std::size_t kBlock>
void block(const LinearCall& call, const Tile& tile, std::size_t row, std::size_t first,
           std::size_t count) {
  const std::size_t groups = call.groups, padded = call.padded, stride = groups * padded;
  const Input* inputs = static_cast<const Input*>(call.x.integers) + row * stride;
  const std::uint8_t* weights = tile.weights;
  const float *steps = call.x.steps + row * groups, *whole = call.x.sums + row * groups;
  const std::int32_t* offsets = call.x.offsets + row * groups;
  const float *scales = tile.scales, *minima = call.minima == nullptr ? nullptr : tile.minima;
  float* const sums = tile.sums;
  each<kVectors>([&](auto v) {
    const Floats bias = load(tile.bias + v.value * kLanes);
    each<kBlock>([&](auto r) { store(sums + r.value * kTile + v.value * kLanes, bias); });
  });
  for (std::size_t g = 0; g < groups; ++g, scales += kTile) {
    Ints products[kBlock][kVectors];
    each<kBlock>([&](auto r) {
      each<kVectors>([&](auto v) {
        products[r.value][v.value] = Ints{} + offsets[r.value * groups + g];
      });
    });
    const auto step = [&] {
      Ints columns[kVectors];
      each<kVectors>([&](auto v) {
        columns[v.value] = load_weights(weights + v.value * kLanes * kStep);
      });
      each<kBlock>([&](auto r) {
        const Ints input = repeated(inputs + r.value * stride);
        each<kVectors>([&](auto v) {
          Ints& sum = products[r.value][v.value];
          sum = multiply_add(sum, columns[v.value], input);
        });
      });
      inputs += kStep;
      weights += kTile * kStep;
    };
    for (std::size_t k = 0; k < padded; k += kStep) step();
    const auto add = [&](auto r, auto v, Floats x, Floats scale) {
      float* sum = sums + r.value * kTile + v.value * kLanes;
      store(sum, scaled_add(load(sum), x, scale));
    };
    each<kBlock>([&](auto r) {
      const Floats factor = all(steps[r.value * groups + g]);
      each<kVectors>([&](auto v) {
        const Floats scale = load(scales + v.value * kLanes) * factor;
        add(r, v, __builtin_convertvector(products[r.value][v.value], Floats), scale);
      });
    });
    if (minima == nullptr) continue;
    each<kBlock>([&](auto r) {
      const Floats sum = all(whole[r.value * groups + g]);
      each<kVectors>([&](auto v) { add(r, v, load(minima + v.value * kLanes), sum); });
    });
    minima += kTile;
  }
  float* to = call.out + row * call.outputs + first;
  if (count < kTile) {
    for (std::size_t r = 0; r < kBlock; ++r, to += call.outputs) {
      __builtin_memcpy(to, sums + r * kTile, count * sizeof(float));
    }
    return;
  }
  each<kBlock>([&](auto r) {
    each<kVectors>([&](auto v) {
      store(to + v.value * kLanes, load(sums + r.value * kTile + v.value * kLanes));
    });
    to += call.outputs;
  });
}

using Block = void (*)(const LinearCall&, const Tile&, std::size_t, std::size_t, std::size_t);

// block<1>, ..., block<kRows>.
template <std::size_t... kBlock>
constexpr std::array<Block, kRows> blocks_of(std::index_sequence<kBlock...>) {
  return {block<kBlock + 1>...};
}

void many_rows(const LinearCall& call, std::size_t first, std::size_t last, void* space) {
  static constexpr auto kBlocks = blocks_of(std::make_index_sequence<kRows>());
  // as few blocks as possible, of about as many rows each
  const std::size_t blocks = (call.rows + kRows - 1) / kRows;
  const std::size_t tiles = tiles_of(call);
  for (std::size_t begin = first; begin < last; begin += tiles * kTile) {
    const std::size_t end = last - begin < tiles * kTile ? last : begin + tiles * kTile;
    const auto tile = [&](std::size_t n) { return tile_in(call, space, (n - begin) / kTile); };
    const auto count = [&](std::size_t n) { return end - n < kTile ? end - n : kTile; };
    for (std::size_t n = begin; n < end; n += kTile) fill(call, n, count(n), tile(n));
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t row = call.rows * b / blocks, next = call.rows * (b + 1) / blocks;
      for (std::size_t n = begin; n < end; n += kTile) {
        kBlocks[next - row - 1](call, tile(n), row, n, count(n));
      }
    }
  }
}

}  // namespace

extern const LinearKernel ASTRA_LINEAR;
const LinearKernel ASTRA_LINEAR = {ASTRA_LINEAR_NAME, kStep,      sizeof(Input), kTile, space_of,
                                   round_rows,        many_rows, few_rows};

}  // namespace astra::detail
