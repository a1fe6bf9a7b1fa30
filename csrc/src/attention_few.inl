// Few queries: channels side by side, and every key and value is read once for all of them. Part of
// attention_loop.inl.

// Vectors of values in registers: enough sums to hide the latency of an addition.
constexpr std::size_t chunk_of(std::size_t rows) {
  return rows > 2 ? kBlock / 2 : rows == 2 ? kBlock : 8;
}
constexpr std::size_t kFewRows = 4;  // queries in registers
// Scattered rows are asked for so many keys before their turn.
constexpr std::size_t kAhead = 12;

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
  each<kLanes>([&](auto i) {
    if constexpr (i.value % (2 * kStep) == 0) {
      trade<kStep>(x[i.value], x[i.value + kStep]);
      x[i.value] += x[i.value + kStep];
    }
  });
  if constexpr (kStep * 2 < kLanes) return sums_of<kStep * 2>(x);
  return x[0];
}

template <std::size_t kStep = kLanes / 2>
inline float largest(Floats x) {
  x = larger(x, across<kStep>(x));
  if constexpr (kStep > 1) return largest<kStep / 2>(x);
  return x[0];
}

template <std::size_t kStep = kLanes / 2>
inline float total_of(Floats x) {
  x += across<kStep>(x);
  if constexpr (kStep > 1) return total_of<kStep / 2>(x);
  return x[0];
}

template <std::size_t kRows>
inline void dot(const FewRows& few, const float* queries, const float* key, Ints fresh,
                Floats (&sums)[kRows]) {
  const std::size_t stride = few.stride;
  const std::size_t last = stride - kLanes;
  const Floats end = (Floats)((Ints)load(key + few.width - kLanes) & fresh);
  each<kRows>([&](auto r) { sums[r.value] = end * load(queries + r.value * stride + last); });
  for (std::size_t c = 0; c < last; c += kLanes) {
    const Floats x = load(key + c);
    each<kRows>([&](auto r) { sums[r.value] += x * load(queries + r.value * stride + c); });
  }
}

// The same of a key that is rotated on the way.
template <std::size_t kRows>
inline void dot_rotated(const FewRows& few, const float* queries, const float* key,
                        const float* cos, const float* sin, Floats (&sums)[kRows]) {
  const std::size_t stride = few.stride;
  const std::size_t half = few.width / 2;
  Floats others[kRows];
  each<kRows>([&](auto r) { others[r.value] = sums[r.value] = Floats{}; });
  for (std::size_t c = 0; c < half; c += kLanes) {
    const Floats low = load(key + c);
    const Floats high = load(key + half + c);
    const Floats first = low * load(cos + c) - high * load(sin + c);
    const Floats second = high * load(cos + half + c) + low * load(sin + half + c);
    each<kRows>([&](auto r) {
      sums[r.value] += first * load(queries + r.value * stride + c);
      others[r.value] += second * load(queries + r.value * stride + half + c);
    });
  }
  each<kRows>([&](auto r) { sums[r.value] += others[r.value]; });
}

template <std::size_t kRows, bool kRotated>
void score_few(const FewRows& few, std::size_t first_row, const KeyRows& rows, std::size_t count,
               float* weights) {
  const Ints fresh = fresh_lanes(few);
  const float* queries = few.queries + first_row * few.stride;
  const std::size_t fetched = rows.scattered && first_row == 0 ? count : 0;
  const std::size_t values_fetched = rows.values == nullptr ? 0 : fetched;
  Ints lane;
  for (std::size_t l = 0; l < kLanes; ++l) lane[l] = static_cast<std::int32_t>(l);
  for (std::size_t start = 0; start < count; start += kLanes) {
    Floats parts[kRows][kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      // Behind the last key, its scores again; they are masked below.
      const std::size_t k = start + i < count ? start + i : count - 1;
      if (k + kAhead < fetched) fetch_row(rows.keys[k + kAhead], few.width);
      if (k < values_fetched) fetch_row(rows.values[k], few.value_width);
      Floats sums[kRows];
      if constexpr (kRotated) {
        dot_rotated<kRows>(few, queries, rows.keys[k], rows.cos[k], rows.sin[k], sums);
      } else {
        dot<kRows>(few, queries, rows.keys[k], fresh, sums);
      }
      each<kRows>([&](auto r) { parts[r.value][i] = sums[r.value]; });
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      const std::size_t seen = static_cast<std::size_t>(few.limits[first_row + r]);
      const std::size_t end = seen < rows.first + count ? seen : rows.first + count;
      const auto here =
          static_cast<std::int32_t>(end) - static_cast<std::int32_t>(rows.first + start);
      const Floats scores = sums_of<1>(parts[r]);
      store(weights + (first_row + r) * kTileKeys + start, lane < here ? scores : all(-kInfinity));
    }
  }
}

// The maximum that is subtracted follows scores only where they are larger by this much: sums are
// then seldom rescaled, and weights stay below 2^8.
constexpr float kSlack = 8.0F;

// Scores to weights, in place; gives alpha, by which the row's former sums are multiplied.
inline float soften(const FewRows& few, std::size_t row, std::size_t count, float* weights) {
  const float before = few.max[row];
  Floats max = all(before);
  for (std::size_t k = 0; k < count; k += kLanes) max = larger(max, load(weights + k));
  const float most = largest(max);
  const float top = most > before + kSlack ? most : before;
  const float shift = top == -kInfinity ? 0.0F : top;
  const float alpha = top == before ? 1.0F : exp2(all(before - shift))[0];
  Floats sum{};
  for (std::size_t k = 0; k < count; k += kLanes) {
    const Floats weight = exp2(load(weights + k) - shift);
    sum += weight;
    store(weights + k, weight);
  }
  few.sum[row] = few.sum[row] * alpha + total_of(sum);
  few.max[row] = top;
  return alpha;
}

// Weights of the keys of a tile.
struct TileWeights {
  const float* const* values;
  const float* weights;

  const float* value(std::size_t k) const { return values[k]; }
  float weight(std::size_t k, std::size_t r) const { return weights[r * kTileKeys + k]; }
};

// Summed weights of codewords, of up to four rows.
struct CodewordWeights {
  const std::uint32_t* list;
  const float* values;
  std::size_t width;
  const float* weights;

  const float* value(std::size_t k) const { return values + list[k] * width; }
  float weight(std::size_t k, std::size_t r) const { return weights[list[k] * 4 + r]; }
};

// out = out * alpha + the sum of weights times values, from vector `vector` of the row on.
template <std::size_t kRows, std::size_t kVectors, class Weights>
void weigh_few(const FewRows& few, std::size_t first_row, const Weights& from, std::size_t count,
               std::size_t vector, const float* alpha) {
  const std::size_t vectors = few.out_stride / kLanes;
  for (; vector + kVectors <= vectors; vector += kVectors) {
    std::size_t channel[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) channel[v] = value_channel(few, vector + v);
    Floats sums[kRows][kVectors];
    each<kRows>(
        [&](auto r) { each<kVectors>([&](auto v) { sums[r.value][v.value] = Floats{}; }); });
    for (std::size_t k = 0; k < count; ++k) {
      const float* values = from.value(k);
      Floats value[kVectors];
      each<kVectors>([&](auto v) { value[v.value] = load(values + channel[v.value]); });
      each<kRows>([&](auto r) {
        const Floats weight = all(from.weight(k, r.value));
        each<kVectors>([&](auto v) { sums[r.value][v.value] += value[v.value] * weight; });
      });
    }
    float* out = few.out + first_row * few.out_stride + vector * kLanes;
    each<kRows>([&](auto r) {
      each<kVectors>([&](auto v) {
        float* at = out + r.value * few.out_stride + v.value * kLanes;
        store(at, load(at) * alpha[r.value] + sums[r.value][v.value]);
      });
    });
  }
  if constexpr (kVectors > 1) {
    if (vector < vectors) {
      weigh_few<kRows, kVectors / 2>(few, first_row, from, count, vector, alpha);
    }
  }
}

template <std::size_t kRows>
void score_rows(const FewRows& few, std::size_t row, const KeyRows& rows, std::size_t count,
                float* weights) {
  for (; row + kRows <= few.rows; row += kRows) {
    if (rows.cos != nullptr) {
      score_few<kRows, true>(few, row, rows, count, weights);
    } else {
      score_few<kRows, false>(few, row, rows, count, weights);
    }
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) score_rows<kRows - 1>(few, row, rows, count, weights);
  }
}

template <std::size_t kRows>
void weigh_rows(const FewRows& few, std::size_t row, const KeyRows& rows, std::size_t count,
                const float* weights, const float* alpha) {
  for (; row + kRows <= few.rows; row += kRows) {
    const TileWeights from{rows.values, weights + row * kTileKeys};
    weigh_few<kRows, chunk_of(kRows)>(few, row, from, count, 0, alpha + row);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) weigh_rows<kRows - 1>(few, row, rows, count, weights, alpha);
  }
}

// What was summed before is rescaled where a maximum grew.
inline void rescale(const FewRows& few, const float* alpha) {
  for (std::size_t r = 0; r < few.rows; ++r) {
    for (std::size_t c = 0; c < few.out_stride; c += kLanes) {
      float* at = few.out + r * few.out_stride + c;
      store(at, load(at) * alpha[r]);
    }
  }
  for (std::size_t row = 0; row < few.rows; row += 4) {
    float* by_codeword = few.by_codeword + row * few.codewords;
    Floats factor;
    for (std::size_t l = 0; l < kLanes; ++l) factor[l] = alpha[row + l % 4];
    const std::size_t count = few.codewords * 4;
    std::size_t c = 0;
    for (; c + kLanes <= count; c += kLanes) {
      store(by_codeword + c, load(by_codeword + c) * factor);
    }
    for (; c < count; ++c) by_codeword[c] *= alpha[row + c % 4];
  }
}

inline void add_to(float* by_codeword, std::uint32_t code, Four weights) {
  Four* at = reinterpret_cast<Four*>(by_codeword + code * 4);
  *at += weights;
}

// Adds the weights of a tile to those of their codewords; those of rows that are not there are 0.
void sum_by_codeword(const FewRows& few, const KeyRows& rows, std::size_t count,
                     const float* weights) {
  const std::uint32_t* codes = rows.value_codes;
  for (std::size_t k = 0; k < count; ++k) few.used[codes[k]] = 1;
  for (std::size_t row = 0; row < few.rows; row += 4) {
    float* by_codeword = few.by_codeword + row * few.codewords;
    const float* weight = weights + row * kTileKeys;
    std::size_t k = 0;
    for (; k + 4 <= count; k += 4) {
      Four x[4];
      for (std::size_t r = 0; r < 4; ++r) {
        x[r] = *reinterpret_cast<const Four*>(weight + r * kTileKeys + k);
      }
      const Four a = shuffled<0, 4, 1, 5>(x[0], x[1]);
      const Four b = shuffled<2, 6, 3, 7>(x[0], x[1]);
      const Four c = shuffled<0, 4, 1, 5>(x[2], x[3]);
      const Four d = shuffled<2, 6, 3, 7>(x[2], x[3]);
      add_to(by_codeword, codes[k], shuffled<0, 1, 4, 5>(a, c));
      add_to(by_codeword, codes[k + 1], shuffled<2, 3, 6, 7>(a, c));
      add_to(by_codeword, codes[k + 2], shuffled<0, 1, 4, 5>(b, d));
      add_to(by_codeword, codes[k + 3], shuffled<2, 3, 6, 7>(b, d));
    }
    for (; k < count; ++k) {
      add_to(by_codeword, codes[k],
             Four{weight[k], weight[kTileKeys + k], weight[2 * kTileKeys + k],
                  weight[3 * kTileKeys + k]});
    }
  }
}

template <std::size_t kRows>
void weigh_codewords(const FewRows& few, std::size_t row, std::size_t count, const float* values) {
  constexpr float kOnes[kMostFew] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (; row + kRows <= few.rows; row += kRows) {
    const CodewordWeights from{few.list, values, few.value_width,
                               few.by_codeword + row * few.codewords};
    weigh_few<kRows, chunk_of(kRows)>(few, row, from, count, 0, kOnes);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) weigh_codewords<kRows - 1>(few, row, count, values);
  }
}

void absorb_codewords(const FewRows& few, const float* values) {
  std::size_t count = 0;
  for (std::size_t c = 0; c < few.codewords; ++c) {
    few.list[count] = static_cast<std::uint32_t>(c);
    count += few.used[c];
  }
  weigh_codewords<4>(few, 0, count, values);
}

void absorb_few(const FewRows& few, const KeyRows& rows, float* weights) {
  if (rows.first >= few.most) return;
  const std::size_t seen = few.most - rows.first;
  const std::size_t count = seen < rows.count ? seen : rows.count;
  float alpha[kMostFew] = {1, 1, 1, 1, 1, 1, 1, 1};
  bool grew = false;
  score_rows<kFewRows>(few, 0, rows, count, weights);
  for (std::size_t r = 0; r < few.rows; ++r) {
    alpha[r] = soften(few, r, count, weights + r * kTileKeys);
    grew = grew || !(alpha[r] == 1.0F);
  }
  if (rows.values != nullptr) {
    weigh_rows<kFewRows>(few, 0, rows, count, weights, alpha);
    return;
  }
  if (grew) rescale(few, alpha);
  sum_by_codeword(few, rows, count, weights);
}
