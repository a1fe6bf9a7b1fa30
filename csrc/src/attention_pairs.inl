// What a lane of queries, keys and weights holds: a float or, with ASTRA_BFLOAT16, a pair of
// numbers rounded to bfloat16, whose products are summed by one instruction. Part of
// attention_loop.inl.

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

// `count` numbers, at most kLanes, with zeros behind.
inline Floats load_some(const float* from, std::size_t count) {
  Floats x{};
  __builtin_memcpy(&x, from, count * sizeof(float));
  return x;
}

// Rows of keys as pairs of adjacent channels, and of values as pairs of adjacent rows; what is
// lacking in a pair is 0.
KeyTile round_tile(const KeyTile& tile, std::size_t width, std::size_t value_width, float* room) {
  KeyTile made = tile;
  made.keys = room;
  made.key_stride = (width + 1) / kPair;
  made.value_stride = value_width;
  for (std::size_t k = 0; k < tile.count; ++k) {
    const float* key = tile.keys + k * tile.key_stride;
    for (std::size_t c = 0; c < width; c += kHalves) {
      const std::size_t left = width - c;
      const Floats first = left < kLanes ? load_some(key + c, left) : load(key + c);
      const Floats second = left >= kHalves  ? load(key + c + kLanes)
                            : left <= kLanes ? Floats{}
                                             : load_some(key + c + kLanes, left - kLanes);
      // what is too much is written over by the next key
      store(room + k * made.key_stride + c / kPair, (Floats)rounded(first, second));
    }
  }
  room += kTileKeys * made.key_stride + kLanes;
  made.values = room;
  for (std::size_t k = 0; k < tile.count; k += kPair, room += value_width) {
    const float* value = tile.values + k * tile.value_stride;
    for (std::size_t c = 0; c < value_width; c += kLanes) {
      const std::size_t left = value_width - c < kLanes ? value_width - c : kLanes;
      const bool alone = k + 1 == tile.count;
      const Floats second = alone ? Floats{} : load_some(value + tile.value_stride + c, left);
      store(room + c, joined(load_some(value + c, left), second));
    }
  }
  return made;
}

constexpr auto kRound = round_tile;

#else

constexpr std::size_t kPair = 1;

inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
inline Floats joined(Floats first, Floats /*second*/) { return first; }

constexpr KeyTile (*kRound)(const KeyTile&, std::size_t, std::size_t, float*) = nullptr;

#endif

// Lanes that so many numbers take.
constexpr std::size_t paired(std::size_t count) { return (count + kPair - 1) / kPair; }
