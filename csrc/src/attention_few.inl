// Few queries: channels side by side, and every key and value is read once for all of them. Part of
// attention_loop.inl.

// Vectors of values in registers: enough sums to hide the latency of an addition.
constexpr std::size_t chunk_of(std::size_t rows) {
  return rows > 2 ? kBlock / 2 : rows == 2 ? kBlock : 8;
}
constexpr std::size_t kFewRows = 4;  // queries in registers

inline std::size_t value_channel(const FewRows& few, std::size_t vector) {
  const std::size_t c = vector * kLanes;
  return c + kLanes <= few.value_width ? c : few.value_width - kLanes;
}

template <std::size_t... kLane>
inline Ints numbers_of(std::index_sequence<kLane...>) {
  return Ints{static_cast<std::int32_t>(kLane)...};
}

// Every lane's number.
inline Ints lane_numbers() { return numbers_of(std::make_index_sequence<kLanes>()); }

// The sums of kCount vectors: lane l has those of the lanes of vector l % kCount whose number
// differs from l by a multiple of kCount.
template <std::size_t kCount, std::size_t kStep = 1>
inline Floats partial_sums(Floats (&x)[kCount]) {
  if constexpr (kStep < kCount) {
    each<kCount>([&](auto i) {
      if constexpr (i.value % (2 * kStep) == 0) {
        trade<kStep>(x[i.value], x[i.value + kStep]);
        x[i.value] += x[i.value + kStep];
      }
    });
    return partial_sums<kCount, kStep * 2>(x);
  }
  return x[0];
}

// The sums of kLanes vectors, one a lane, from those of kCount each.
template <std::size_t kCount>
inline Floats sums_of(Floats (&x)[kLanes / kCount]) {
  if constexpr (kCount < kLanes) {
    Floats pairs[kLanes / kCount / 2];
    each<kLanes / kCount / 2>([&](auto i) {
      trade<kCount>(x[2 * i.value], x[2 * i.value + 1]);
      pairs[i.value] = x[2 * i.value] + x[2 * i.value + 1];
    });
    return sums_of<kCount * 2>(pairs);
  }
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

// Keys whose sums with so many queries stay in registers beside so many vectors of each query.
constexpr std::size_t keys_of(std::size_t rows) { return kBlock == 8 || rows == 1 ? 4 : 2; }
constexpr std::size_t step_of(std::size_t rows) {
  if (kBlock == 8) return rows <= 3 ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

// Rows where a list says.
struct ListedRows {
  const float* const* rows;

  const float* operator[](std::size_t k) const { return rows[k]; }
};

// Keys that are rotated on the way.
struct RotatedRows {
  const float* const* keys;
  const float* const* cos;
  const float* const* sin;
};

// The rows from `start` on, and behind the last of `count` rows that one again.
template <class Rows>
inline void list_last(const Rows& rows, std::size_t start, std::size_t count,
                      const float* (&list)[kLanes]) {
  for (std::size_t i = 0; i < kLanes; ++i) {
    list[i] = rows[start + i < count ? start + i : count - 1];
  }
}

template <std::size_t kRows, std::size_t kKeys>
using Sums = Floats[kRows][kKeys];

// Adds products of queries and keys from `first` on: kStep vectors, from channel c on. A key is
// read in the order of memory.
template <std::size_t kStep, std::size_t kRows, std::size_t kKeys, class Keys>
ASTRA_INLINE void multiply(const FewRows& few, const float* queries, const Keys& keys,
                           std::size_t first, std::size_t c, Sums<kRows, kKeys>& sums) {
  Floats query[kRows][kStep];
  each<kRows>([&](auto r) {
    each<kStep>([&](auto s) {
      query[r.value][s.value] = load(queries + r.value * few.stride + c + s.value * kLanes);
    });
  });
  each<kKeys>([&](auto k) {
    const float* key = keys[first + k.value] + c;
    each<kStep>([&](auto s) {
      const Floats x = load(key + s.value * kLanes);
      each<kRows>([&](auto r) { sums[r.value][k.value] += x * query[r.value][s.value]; });
    });
  });
}

// The same of the last channels, where they fill no vector: the last vector of a row repeats some,
// which are left out, as what hides in them may be no number.
template <std::size_t kRows, std::size_t kKeys, class Keys>
__attribute__((noinline)) void multiply_last(const FewRows& few, const float* queries,
                                             const Keys& keys, std::size_t first,
                                             Sums<kRows, kKeys>& products) {
  const Ints fresh = lane_numbers() >= static_cast<std::int32_t>(few.stride - few.width);
  each<kKeys>([&](auto k) {
    const float* key = keys[first + k.value] + few.width - kLanes;
    const Floats x = (Floats)((Ints)load(key) & fresh);
    each<kRows>([&](auto r) {
      const float* query = queries + (r.value + 1) * few.stride - kLanes;
      products[r.value][k.value] = x * load(query);
    });
  });
}

template <std::size_t kRows, std::size_t kKeys, class Keys>
ASTRA_INLINE void dot(const FewRows& few, const float* queries, const Keys& keys, std::size_t first,
                      Sums<kRows, kKeys>& sums) {
  constexpr std::size_t kStep = step_of(kRows);
  std::size_t c = 0;
  for (; c + kStep * kLanes <= few.width; c += kStep * kLanes) {
    multiply<kStep, kRows, kKeys>(few, queries, keys, first, c, sums);
  }
  for (; kStep > 1 && c + kLanes <= few.width; c += kLanes) {
    multiply<1, kRows, kKeys>(few, queries, keys, first, c, sums);
  }
  if (c == few.width) return;
  Floats products[kRows][kKeys];
  multiply_last<kRows, kKeys>(few, queries, keys, first, products);
  each<kRows>([&](auto r) {
    each<kKeys>([&](auto k) { sums[r.value][k.value] += products[r.value][k.value]; });
  });
}

template <std::size_t kRows, std::size_t kKeys>
ASTRA_INLINE void dot(const FewRows& few, const float* queries, const RotatedRows& rows,
                      std::size_t first, Sums<kRows, kKeys>& sums) {
  const std::size_t half = few.width / 2;
  for (std::size_t c = 0; c < half; c += kLanes) {
    Floats near[kRows], far[kRows];
    each<kRows>([&](auto r) {
      near[r.value] = load(queries + r.value * few.stride + c);
      far[r.value] = load(queries + r.value * few.stride + half + c);
    });
    each<kKeys>([&](auto k) {
      const float* key = rows.keys[first + k.value] + c;
      const float* cos = rows.cos[first + k.value] + c;
      const float* sin = rows.sin[first + k.value] + c;
      const Floats low = load(key), high = load(key + half);
      const Floats x = low * load(cos) - high * load(sin);
      const Floats y = high * load(cos + half) + low * load(sin + half);
      each<kRows>([&](auto r) {
        sums[r.value][k.value] += x * near[r.value];
        sums[r.value][k.value] += y * far[r.value];
      });
    });
  }
}

// Scores of kLanes keys from `first` on; those from `end` of them on are -inf.
template <std::size_t kRows, class Keys>
ASTRA_INLINE void score_group(const FewRows& few, std::size_t first_row, const Keys& keys,
                              std::size_t first, std::size_t place, std::size_t count,
                              float* weights) {
  constexpr std::size_t kKeys = keys_of(kRows);
  constexpr std::size_t kParts = kLanes / kKeys;
  const float* queries = few.queries + first_row * few.stride;
  Floats parts[kRows][kParts];
  for (std::size_t part = 0; part < kParts; ++part) {
    Floats sums[kRows][kKeys];
    each<kRows>([&](auto r) { each<kKeys>([&](auto k) { sums[r.value][k.value] = Floats{}; }); });
    dot<kRows, kKeys>(few, queries, keys, first + part * kKeys, sums);
    each<kRows>([&](auto r) { parts[r.value][part] = partial_sums<kKeys>(sums[r.value]); });
  }
  const Ints lane = lane_numbers();
  each<kRows>([&](auto r) {
    const std::size_t limit = static_cast<std::size_t>(few.limits[first_row + r.value]);
    const std::size_t seen = limit > place ? limit - place : 0;
    const auto end = static_cast<std::int32_t>(seen < count ? seen : count);
    const Floats scores = sums_of<kKeys>(parts[r.value]);
    store(weights + r.value * kTileKeys, lane < end ? scores : all(-kInfinity));
  });
}

// Rows in no order are asked for before their turn; what lies evenly comes by itself.
inline void fetch(const EvenRows& /*keys*/, std::size_t /*first*/, std::size_t /*end*/,
                  std::size_t /*width*/) {}
inline void fetch(const ListedRows& rows, std::size_t first, std::size_t end, std::size_t width) {
  for (std::size_t k = first; k < end; ++k) fetch_row(rows[k], width);
}
inline void fetch(const RotatedRows& rows, std::size_t first, std::size_t end, std::size_t width) {
  fetch(ListedRows{rows.keys}, first, end, width);
}

// Of all keys of a tile. `last`: of the last ones, as many as there are lanes.
template <std::size_t kRows, class Keys, class Last>
void score_few(const FewRows& few, std::size_t first_row, const Keys& keys, const Last& last,
               std::size_t tile, std::size_t count, float* weights) {
  std::size_t k = 0;
  weights += first_row * kTileKeys;
  for (; k + kLanes <= count; k += kLanes) {
    const std::size_t next = k + 2 * kLanes < count ? k + 2 * kLanes : count;
    if (first_row == 0) fetch(keys, k + kLanes, next, few.width);
    score_group<kRows>(few, first_row, keys, k, tile + k, kLanes, weights + k);
  }
  if (k < count) score_group<kRows>(few, first_row, last, 0, tile + k, count - k, weights + k);
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
template <class Values>
struct TileWeights {
  Values values;
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

template <std::size_t kRows, class Keys, class Last>
void score_rows(const FewRows& few, std::size_t row, const Keys& keys, const Last& last,
                std::size_t tile, std::size_t count, float* weights) {
  for (; row + kRows <= few.rows; row += kRows) {
    score_few<kRows>(few, row, keys, last, tile, count, weights);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) score_rows<kRows - 1>(few, row, keys, last, tile, count, weights);
  }
}

void score_tile(const FewRows& few, const KeyRows& rows, std::size_t count, float* weights) {
  const float *keys[kLanes], *cos[kLanes], *sin[kLanes];
  const std::size_t whole = count / kLanes * kLanes;
  if (rows.keys == nullptr) {
    if (whole < count) list_last(rows.even_keys, whole, count, keys);
    score_rows<kFewRows>(few, 0, rows.even_keys, ListedRows{keys}, rows.first, count, weights);
    return;
  }
  if (whole < count) list_last(rows.keys, whole, count, keys);
  if (rows.cos == nullptr) {
    const ListedRows listed{rows.keys};
    score_rows<kFewRows>(few, 0, listed, ListedRows{keys}, rows.first, count, weights);
    return;
  }
  if (whole < count) {
    list_last(rows.cos, whole, count, cos);
    list_last(rows.sin, whole, count, sin);
  }
  const RotatedRows rotated{rows.keys, rows.cos, rows.sin};
  const RotatedRows last{keys, cos, sin};
  score_rows<kFewRows>(few, 0, rotated, last, rows.first, count, weights);
}

template <std::size_t kRows, class Values>
void weigh_rows(const FewRows& few, std::size_t row, const Values& values, std::size_t count,
                const float* weights, const float* alpha) {
  for (; row + kRows <= few.rows; row += kRows) {
    const TileWeights<Values> from{values, weights + row * kTileKeys};
    weigh_few<kRows, chunk_of(kRows)>(few, row, from, count, 0, alpha + row);
  }
  if constexpr (kRows > 1) {
    if (row < few.rows) weigh_rows<kRows - 1>(few, row, values, count, weights, alpha);
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
  score_tile(few, rows, count, weights);
  for (std::size_t r = 0; r < few.rows; ++r) {
    alpha[r] = soften(few, r, count, weights + r * kTileKeys);
    grew = grew || !(alpha[r] == 1.0F);
  }
  if (rows.value_codes != nullptr) {
    if (grew) rescale(few, alpha);
    sum_by_codeword(few, rows, count, weights);
  } else if (rows.values != nullptr) {
    weigh_rows<kFewRows>(few, 0, ListedRows{rows.values}, count, weights, alpha);
  } else {
    weigh_rows<kFewRows>(few, 0, rows.even_values, count, weights, alpha);
  }
}
