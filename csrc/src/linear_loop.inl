// The loops of quantized_linear, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension). The file that includes this says what one instruction does:
//   Input            a rounded input; kStep of them are 32 bits
//   kOffset, kFlip   what is added to a weight to make it unsigned, and how to do so to kStep bytes
//   kRows, kVectors  a block of sums in registers
//   load_weights     kStep weights of each of kLanes outputs, as multiply_add takes them
//   repeated         kStep inputs in every lane
//   multiply_add     sums + the kStep products of each lane
//   partial          kPartial sums of products, of as many whole chunks of kChunk as there are;
//                    the argument of the template is added to the weights

namespace astra::detail {
namespace {

constexpr std::size_t kLanes = ASTRA_LANES;
constexpr std::size_t kTile = kLanes * kVectors;
constexpr float kNaN = __builtin_nanf("");

// aligned(4): they are loaded from anywhere.
typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }

inline float scale_at(const void* scales, bool half, std::size_t i) {
  if (!half) return static_cast<const float*>(scales)[i];
  // bfloat16 is the upper half of a float
  const std::uint32_t bits =
      static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(scales)[i]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest magnitude of a group; NaN where a value is not finite.
float largest_of(const float* x, std::size_t count) {
  Floats most{}, check{};
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats value = load(x + i), size = value < 0.0F ? -value : value;
    most = size > most ? size : most;
    check += value * 0.0F;
  }
  float largest = 0.0F, finite = 0.0F;
  for (std::size_t l = 0; l < kLanes; ++l) {
    largest = most[l] > largest ? most[l] : largest;
    finite += check[l];
  }
  for (; i < count; ++i) {
    const float size = x[i] < 0.0F ? -x[i] : x[i];
    largest = size > largest ? size : largest;
    finite += x[i] * 0.0F;
  }
  return finite == 0.0F ? largest : kNaN;
}

void round_rows(const LinearCall& call, const float* x, std::size_t first, std::size_t last) {
  constexpr float kMagic = 12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number
  const float* from = x + first * call.inputs;
  auto* to = static_cast<Input*>(call.x.integers) + first * call.groups * call.padded;
  for (std::size_t at = first * call.groups; at < last * call.groups; ++at) {
    const float largest = largest_of(from, call.width);
    const bool finite = largest == largest;
    const float inverse = finite && largest > 0.0F ? 127.0F / largest : 0.0F;
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < call.width; ++i) {
      const float whole = (finite ? from[i] : 0.0F) * inverse + kMagic;
      const auto integer = static_cast<std::int32_t>(whole - kMagic);
      sum += integer;
      to[i] = static_cast<Input>(integer);
    }
    for (std::size_t i = call.width; i < call.padded; ++i) to[i] = 0;
    call.x.steps[at] = largest / 127.0F;
    call.x.sums[at] = static_cast<float>(sum);
    from += call.width;
    to += call.padded;
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
  const std::size_t chunks = call.width / kChunk * kChunk;
  Floats lanes{};
  float sum = 0.0F;
  for (std::size_t g = 0; g < call.groups; ++g, weights += call.width) {
    const std::size_t at = row * call.groups + g, here = n * call.groups + g;
    const Input* inputs = static_cast<const Input*>(call.x.integers) + at * call.padded;
    const float step = call.x.steps[at];
    const float scale = scale_at(call.scales, call.half_scales, here) * step;
    const Partial products = partial<kAdded>(weights, inputs, call.width);
    std::int32_t rest = -kAdded * static_cast<std::int32_t>(call.x.sums[at]);
    for (std::size_t i = chunks; i < call.width; ++i) rest += (weights[i] + kAdded) * inputs[i];
    lanes += __builtin_convertvector(products, Floats) * scale;
    if (kAdded != 0 || chunks < call.width) sum += static_cast<float>(rest) * scale;
    if (call.minima != nullptr) {
      sum += call.x.sums[at] * step * scale_at(call.minima, call.half_scales, here);
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
  std::int8_t* spread;
};

Tile tile_in(const LinearCall& call, void* space) {
  Tile tile{};
  auto* at = static_cast<unsigned char*>(space);
  tile.weights = at;
  at += call.groups * call.padded * kTile;
  tile.scales = reinterpret_cast<float*>(at);
  tile.minima = tile.scales + call.groups * kTile;
  tile.bias = tile.minima + call.groups * kTile;
  tile.spread = reinterpret_cast<std::int8_t*>(tile.bias + kTile);
  return tile;
}

// Lays out the weights of outputs from `first` on, zeros where there are no more.
void fill(const LinearCall& call, std::size_t first, std::size_t count, const Tile& tile) {
  for (std::size_t n = 0; n < kTile; ++n) {
    const bool there = n < count;
    const std::int8_t* weights = there ? weights_of(call, first + n, tile.spread) : nullptr;
    tile.bias[n] = there && call.bias != nullptr ? call.bias[first + n] : 0.0F;
    for (std::size_t g = 0; g < call.groups; ++g) {
      const std::size_t at = (first + n) * call.groups + g, here = g * kTile + n;
      tile.scales[here] = there ? scale_at(call.scales, call.half_scales, at) : 0.0F;
      tile.minima[here] =
          there && call.minima != nullptr ? scale_at(call.minima, call.half_scales, at) : 0.0F;
      std::uint8_t* to = tile.weights + g * call.padded * kTile + n * kStep;
      std::size_t k = 0;
      for (; there && k + kStep <= call.width; k += kStep, to += kTile * kStep) {
        Together together;
        __builtin_memcpy(&together, weights + g * call.width + k, kStep);
        together ^= kFlip;
        __builtin_memcpy(to, &together, kStep);
      }
      for (; k < call.padded; k += kStep, to += kTile * kStep) {
        for (std::size_t i = 0; i < kStep; ++i) {
          const bool inside = there && k + i < call.width;
          const int weight = inside ? weights[g * call.width + k + i] : 0;
          to[i] = static_cast<std::uint8_t>(weight + kOffset);
        }
      }
    }
  }
}

// kBlock rows by one tile; only the first `count` outputs are written.
template <std::size_t kBlock>
void block(const LinearCall& call, const Tile& tile, std::size_t row, std::size_t first,
           std::size_t count) {
  const std::size_t stride = call.groups * call.padded;
  const Input* x = static_cast<const Input*>(call.x.integers) + row * stride;
  Floats out[kBlock][kVectors] = {};
  for (std::size_t g = 0; g < call.groups; ++g) {
    Ints sums[kBlock][kVectors] = {};
    const std::uint8_t* weights = tile.weights + g * call.padded * kTile;
    const Input* inputs = x + g * call.padded;
    for (std::size_t k = 0; k < call.padded; k += kStep, weights += kTile * kStep) {
      Ints columns[kVectors];
      for (std::size_t v = 0; v < kVectors; ++v) {
        columns[v] = load_weights(weights + v * kLanes * kStep);
      }
      for (std::size_t r = 0; r < kBlock; ++r) {
        const Ints input = repeated(inputs + r * stride + k);
        for (std::size_t v = 0; v < kVectors; ++v) {
          sums[r][v] = multiply_add(sums[r][v], columns[v], input);
        }
      }
    }
    for (std::size_t r = 0; r < kBlock; ++r) {
      const float whole = call.x.sums[(row + r) * call.groups + g];
      const float step = call.x.steps[(row + r) * call.groups + g];
      const Ints offset = Ints{} + kOffset * static_cast<std::int32_t>(whole);
      for (std::size_t v = 0; v < kVectors; ++v) {
        const std::size_t at = g * kTile + v * kLanes;
        const Floats scale = load(tile.scales + at) * step;
        out[r][v] += __builtin_convertvector(sums[r][v] - offset, Floats) * scale;
        if (call.minima != nullptr) out[r][v] += whole * step * load(tile.minima + at);
      }
    }
  }
  for (std::size_t r = 0; r < kBlock; ++r) {
    float* to = call.out + (row + r) * call.outputs + first;
    float last[kTile];
    for (std::size_t v = 0; v < kVectors; ++v) {
      const Floats value = out[r][v] + load(tile.bias + v * kLanes);
      store(count == kTile ? to + v * kLanes : last + v * kLanes, value);
    }
    if (count < kTile) __builtin_memcpy(to, last, count * sizeof(float));
  }
}

void many_rows(const LinearCall& call, std::size_t first, std::size_t last, void* space) {
  const Tile tile = tile_in(call, space);
  for (std::size_t n = first; n < last; n += kTile) {
    const std::size_t count = last - n < kTile ? last - n : kTile;
    fill(call, n, count, tile);
    std::size_t row = 0;
    for (; row + kRows <= call.rows; row += kRows) block<kRows>(call, tile, row, n, count);
    for (; row + 2 <= call.rows; row += 2) block<2>(call, tile, row, n, count);
    if (row < call.rows) block<1>(call, tile, row, n, count);
  }
}

}  // namespace

extern const LinearKernel ASTRA_LINEAR;
const LinearKernel ASTRA_LINEAR = {ASTRA_LINEAR_NAME, kStep,     sizeof(Input), kTile,
                                   round_rows,        many_rows, few_rows};

}  // namespace astra::detail
