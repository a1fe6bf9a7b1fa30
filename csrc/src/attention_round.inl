// Tiles of keys and values rounded to pairs. Part of attention_loop.inl.

#ifdef ASTRA_BFLOAT16

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

constexpr KeyTile (*kRound)(const KeyTile&, std::size_t, std::size_t, float*) = nullptr;

#endif
