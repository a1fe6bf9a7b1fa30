// Rows of keys and values put together from tables. Part of attention_loop.inl.

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Rows that are not there yet are asked for so many rows before their turn.
constexpr std::size_t kRowsAhead = 8;

inline void fetch_row(const float* row, std::size_t width) {
  for (std::size_t c = 0; c < width; c += 16) __builtin_prefetch(row + c);
}

inline void copy_row(const float* from, std::size_t width, float* to) {
  std::size_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(to + c, load(from + c));
  for (; c < width; ++c) to[c] = from[c];
}

// `from` may be `to`.
inline void rotate_row(const float* from, const float* cos, const float* sin, std::size_t width,
                       float* to) {
  const std::size_t half = width / 2;
  std::size_t c = 0;
  for (; c + kLanes <= half; c += kLanes) {
    const Floats low = load(from + c);
    const Floats high = load(from + half + c);
    store(to + c, low * load(cos + c) - high * load(sin + c));
    store(to + half + c, high * load(cos + half + c) + low * load(sin + half + c));
  }
  for (; c < half; ++c) {
    const float low = from[c];
    const float high = from[half + c];
    to[c] = low * cos[c] - high * sin[c];
    to[half + c] = high * cos[half + c] + low * sin[half + c];
  }
}

void gather(const KeyRows& rows, std::size_t width, std::size_t value_width, float* keys,
            float* values) {
  for (std::size_t k = 0; k < rows.count; ++k) {
    if (k + kRowsAhead < rows.count) {
      fetch_row(rows.keys[k + kRowsAhead], width);
      if (rows.values != nullptr) fetch_row(rows.values[k + kRowsAhead], value_width);
    }
    float* key = keys + k * width;
    if (rows.cos != nullptr) {
      rotate_row(rows.keys[k], rows.cos[k], rows.sin[k], width, key);
    } else if (rows.keys[k] != key) {
      copy_row(rows.keys[k], width, key);
    }
    float* value = values + k * value_width;
    if (rows.values != nullptr && rows.values[k] != value) {
      copy_row(rows.values[k], value_width, value);
    }
  }
}

void compose(const float* const* words, std::size_t stages, std::size_t parts, std::size_t width,
             float* to) {
  for (std::size_t part = 0; part < parts; ++part, to += width) {
    const float* const* word = words + part;
    std::size_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
      Floats sum = load(word[0] + c);
      for (std::size_t s = 1; s < stages; ++s) sum += load(word[s * parts] + c);
      store(to + c, sum);
    }
    for (; c + 4 <= width; c += 4) {
      Four sum = *reinterpret_cast<const Four*>(word[0] + c);
      for (std::size_t s = 1; s < stages; ++s) {
        sum += *reinterpret_cast<const Four*>(word[s * parts] + c);
      }
      *reinterpret_cast<Four*>(to + c) = sum;
    }
    for (; c < width; ++c) {
      float sum = word[0][c];
      for (std::size_t s = 1; s < stages; ++s) sum += word[s * parts][c];
      to[c] = sum;
    }
  }
}
