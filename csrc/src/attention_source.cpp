#include "attention_source.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace astra::detail {
namespace {

// Rows at this distance fall on few sets of the L1 cache; the products read eight at once.
constexpr std::size_t kCrowding = 2048;
// Weights of so many codewords stay in L2.
constexpr std::size_t kMostCodewords = 4096;

bool crowds(std::size_t stride, std::size_t width) {
  return stride != width && stride * sizeof(float) % kCrowding == 0;
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr bool kLittleEndian = true;
#else
constexpr bool kLittleEndian = false;
#endif

// The codes of one batch row.
class CodeReader {
 public:
  CodeReader(const TokenCodes& codes, std::size_t count, std::size_t batch)
      : integers_(codes.bits == 0
                      ? static_cast<const std::int32_t*>(codes.data) + batch * codes.row_stride
                      : nullptr),
        bytes_(codes.bits == 0
                   ? nullptr
                   : static_cast<const std::uint8_t*>(codes.data) + batch * codes.row_stride),
        bits_(static_cast<std::size_t>(codes.bits)),
        size_((count * codes.per_token * bits_ + 7) / 8),
        per_token_(codes.per_token) {}

  // Code number `index` of the tokens of a tile.
  void operator()(const TilePlace& place, std::size_t index, std::uint32_t* to) const {
    if (place.visible->places != nullptr) {
      const std::int32_t* places = place.visible->places + place.first;
      for (std::size_t k = 0; k < place.count; ++k) {
        to[k] = code(static_cast<std::size_t>(places[k]) * per_token_ + index);
      }
      return;
    }
    std::size_t at = place.first * per_token_ + index;
    std::size_t k = 0;
    if (integers_ != nullptr) {
      for (; k < place.count; ++k, at += per_token_) {
        to[k] = static_cast<std::uint32_t>(integers_[at]);
      }
      return;
    }
    const std::uint32_t mask = (1U << bits_) - 1;
    const std::size_t step = per_token_ * bits_;
    std::size_t bit = at * bits_;
    // As many as can be read by words.
    const std::size_t words =
        kLittleEndian && size_ > bit / 8 + 3 ? ((size_ - 4) * 8 + 7 - bit) / step + 1 : 0;
    for (; k < std::min(words, place.count); ++k, bit += step) {
      std::uint32_t word = 0;
      std::memcpy(&word, bytes_ + bit / 8, sizeof(word));
      to[k] = word >> bit % 8 & mask;
    }
    for (at += k * per_token_; k < place.count; ++k, at += per_token_) to[k] = code(at);
  }

 private:
  std::uint32_t code(std::size_t at) const {
    if (integers_ != nullptr) return static_cast<std::uint32_t>(integers_[at]);
    const std::size_t bit = at * bits_;
    std::uint32_t word = 0;
    for (std::size_t i = 0; i < 3 && bit / 8 + i < size_; ++i) {
      word |= std::uint32_t{bytes_[bit / 8 + i]} << 8 * i;
    }
    return word >> bit % 8 & ((1U << bits_) - 1);
  }

  const std::int32_t* integers_;
  const std::uint8_t* bytes_;
  std::size_t bits_;
  std::size_t size_;
  std::size_t per_token_;
};

// One head's part of a table and of a token's codes.
struct HeadTable {
  const float* vectors;
  std::size_t stages, groups, codewords, width;
  std::size_t stage_stride;  // floats from a stage to the next
  std::size_t first_code, codes_of_stage;
};

HeadTable head_table(const CodeTable& table, const TokenCodes& codes, std::size_t kv_heads,
                     std::size_t head, std::size_t width) {
  const bool shared = codes.per_token == table.stages * table.groups;
  const std::size_t words = table.groups * table.codewords * (width / table.groups);
  return {table.vectors + head * words,
          table.stages,
          table.groups,
          table.codewords,
          width / table.groups,
          kv_heads * words,
          shared ? 0 : head * table.groups,
          shared ? table.groups : kv_heads * table.groups};
}

const float* vectors_of(const HeadTable& table, std::size_t stage, std::size_t group) {
  return table.vectors + stage * table.stage_stride + group * table.codewords * table.width;
}

std::size_t words_of(const CodeTable& table) { return table.stages * table.groups; }

// The codes of a tile for one stage and group; false if one is not in the table, which becomes 0.
bool read_codes(const HeadTable& table, const CodeReader& codes, const TilePlace& place,
                std::size_t stage, std::size_t group, std::uint32_t* to) {
  codes(place, stage * table.codes_of_stage + table.first_code + group, to);
  std::uint32_t most = 0;
  for (std::size_t k = 0; k < place.count; ++k) most = std::max(most, to[k]);
  if (most < table.codewords) return true;
  for (std::size_t k = 0; k < place.count; ++k) {
    if (to[k] >= table.codewords) to[k] = 0;
  }
  return false;
}

// Rows of a tile, put together in `to`. `words` has room for the pointers of a whole tile, which
// are all found before any is followed.
bool compose_rows(const HeadTable& table, const CodeReader& codes, const TilePlace& place,
                  const AttentionKernels& kernels, const float** words, float* to,
                  TileMemory& memory, const float** rows) {
  const std::size_t parts = table.stages * table.groups;
  bool good = true;
  for (std::size_t part = 0; part < parts; ++part) {
    const std::size_t stage = part / table.groups;
    const std::size_t group = part % table.groups;
    good = read_codes(table, codes, place, stage, group, memory.codes) && good;
    const float* vectors = vectors_of(table, stage, group);
    for (std::size_t k = 0; k < place.count; ++k) {
      words[k * parts + part] = vectors + memory.codes[k] * table.width;
      __builtin_prefetch(words[k * parts + part]);
    }
  }
  for (std::size_t k = 0; k < place.count; ++k, to += table.groups * table.width) {
    kernels.compose(words + k * parts, table.stages, table.groups, table.width, to);
    rows[k] = to;
  }
  return good;
}

void point(const HeadTable& table, const std::uint32_t* codes, std::size_t count,
           const float** rows) {
  for (std::size_t k = 0; k < count; ++k) rows[k] = table.vectors + codes[k] * table.width;
}

bool alike(const TokenCodes& a, const TokenCodes& b) {
  return a.data == b.data && a.bits == b.bits && a.per_token == b.per_token;
}

void check(const char* name, const TokenCodes& codes, const CodeTable& table, std::size_t kv_heads,
           std::size_t width) {
  if (codes.bits < 0 || codes.bits > 16) {
    throw std::invalid_argument(std::string(name) + " must have 1 to 16 bits, or 0 as int32, got " +
                                std::to_string(codes.bits));
  }
  if (table.groups == 0 || width % table.groups != 0 || table.stages == 0 || table.codewords == 0) {
    throw std::invalid_argument(std::string(name) + " must have groups that divide the width of " +
                                std::to_string(width) + ", got " + std::to_string(table.groups));
  }
  const std::size_t shared = table.stages * table.groups;
  if (codes.per_token != shared && codes.per_token != shared * kv_heads) {
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(shared) + " or " +
                                std::to_string(shared * kv_heads) + " a token, got " +
                                std::to_string(codes.per_token));
  }
}

}  // namespace

std::size_t DenseSource::scratch_floats() const {
  return kTileKeys * (shape_.width + shape_.value_width);
}

KeyTile DenseSource::tile(const TilePlace& place, TileMemory& memory) const {
  const void* bases[2] = {dense_.keys, dense_.values};
  const HeadStrides* strides[2] = {&dense_.key_strides, &dense_.value_strides};
  const float* rows[2];
  std::size_t row_strides[2];
  for (std::size_t i = 0; i < 2; ++i) {
    const std::size_t head = place.batch * strides[i]->batch + place.kv_head * strides[i]->head;
    const std::size_t stride = strides[i]->row;
    const std::size_t width = i == 0 ? shape_.width : shape_.value_width;
    if (!stored_.are_floats() || place.visible->places != nullptr || crowds(stride, width)) {
      float* to = memory.scratch + i * kTileKeys * shape_.width;
      for (std::size_t k = 0; k < place.count; ++k) {
        const std::size_t at = head + place.visible->place(place.first + k) * stride;
        const float* row = stored_.read(bases[i], at, width, to + k * width);
        if (row != to + k * width) std::memcpy(to + k * width, row, width * sizeof(float));
      }
      rows[i] = to;
      row_strides[i] = width;
    } else {
      rows[i] = static_cast<const float*>(bases[i]) + head + place.first * stride;
      row_strides[i] = stride;
    }
  }
  return {rows[0], row_strides[0], rows[1], row_strides[1], place.first, place.count};
}

KeyRows DenseSource::rows(const TilePlace& place, TileMemory& memory, bool /*as_codes*/) const {
  const HeadStrides& by_key = dense_.key_strides;
  const HeadStrides& by_value = dense_.value_strides;
  std::size_t keys = place.batch * by_key.batch + place.kv_head * by_key.head;
  std::size_t values = place.batch * by_value.batch + place.kv_head * by_value.head;
  KeyRows rows{};
  rows.first = place.first;
  rows.count = place.count;
  const std::int32_t* places = place.visible->places;
  if (places == nullptr) {
    keys += place.first * by_key.row;
    values += place.first * by_value.row;
  }
  if (places == nullptr && stored_.are_floats()) {
    rows.even_keys = {static_cast<const float*>(dense_.keys) + keys, by_key.row};
    rows.even_values = {static_cast<const float*>(dense_.values) + values, by_value.row};
    return rows;
  }
  rows.even_keys = {memory.scratch, shape_.width};
  rows.even_values = {memory.scratch + kTileKeys * shape_.width, shape_.value_width};
  const bool are_floats = stored_.are_floats();
  for (std::size_t k = 0; k < place.count; ++k) {
    const auto row = places == nullptr ? k : static_cast<std::size_t>(places[place.first + k]);
    float* to = memory.scratch + k * shape_.width;
    float* value_to = memory.scratch + kTileKeys * shape_.width + k * shape_.value_width;
    memory.keys[k] = stored_.read(dense_.keys, keys + row * by_key.row, shape_.width, to);
    memory.values[k] =
        stored_.read(dense_.values, values + row * by_value.row, shape_.value_width, value_to);
  }
  if (are_floats) {
    rows.keys = memory.keys;
    rows.values = memory.values;
  }
  return rows;
}

CodedSource::CodedSource(const CodedKeys& coded, const AttentionShape& shape,
                         const AttentionKernels& kernels)
    : coded_(coded), shape_(shape), kernels_(kernels), angles_{kernels, coded.angles} {
  check("key_codes", coded.key_codes, coded.key_table, shape.kv_heads, shape.width);
  check("value_codes", coded.value_codes, coded.value_table, shape.kv_heads, shape.value_width);
  if (coded.cos != nullptr && shape.width % 2 != 0) {
    throw std::invalid_argument("width must be even where keys are rotated, got " +
                                std::to_string(shape.width));
  }
}

// Keys and values of a tile, and pointers to what they are put together from.
std::size_t CodedSource::floats_of_rows() const {
  const std::size_t words = std::max(words_of(coded_.key_table), words_of(coded_.value_table));
  return kTileKeys *
         (shape_.width + shape_.value_width + words * (sizeof(const float*) / sizeof(float)));
}

// Angles of a tile, where they are no floats.
std::size_t CodedSource::floats_of_angles() const {
  return coded_.cos == nullptr || angles_.are_floats() ? 0 : 2 * kTileKeys * shape_.width;
}

std::size_t CodedSource::scratch_floats() const { return floats_of_rows() + floats_of_angles(); }

std::size_t CodedSource::by_codeword(std::size_t keys) const {
  const std::size_t codewords = coded_.value_table.codewords;
  const bool pays =
      words_of(coded_.value_table) == 1 && codewords <= std::min(keys, kMostCodewords);
  return pays ? codewords : 0;
}

const float* CodedSource::codewords(std::size_t kv_head) const {
  return head_table(coded_.value_table, coded_.value_codes, shape_.kv_heads, kv_head,
                    shape_.value_width)
      .vectors;
}

// Keys that are not yet rotated, and values.
KeyRows CodedSource::find(const TilePlace& place, TileMemory& memory, bool as_codes) const {
  float* to = memory.scratch;
  float* value_to = to + kTileKeys * shape_.width;
  auto* words = reinterpret_cast<const float**>(value_to + kTileKeys * shape_.value_width);
  const CodeReader key_codes(coded_.key_codes, coded_.count, place.batch);
  const CodeReader value_codes(coded_.value_codes, coded_.count, place.batch);
  const HeadTable keys =
      head_table(coded_.key_table, coded_.key_codes, shape_.kv_heads, place.kv_head, shape_.width);
  const HeadTable values = head_table(coded_.value_table, coded_.value_codes, shape_.kv_heads,
                                      place.kv_head, shape_.value_width);
  KeyRows rows{};
  rows.keys = memory.keys;
  rows.values = memory.values;
  rows.first = place.first;
  rows.count = place.count;

  const bool single = words_of(coded_.key_table) == 1;
  const bool single_value = words_of(coded_.value_table) == 1;
  bool good = single
                  ? read_codes(keys, key_codes, place, 0, 0, memory.codes)
                  : compose_rows(keys, key_codes, place, kernels_, words, to, memory, memory.keys);
  if (!good) found_ = CodesFound::kBadKeyCode;
  if (single) point(keys, memory.codes, place.count, memory.keys);

  const std::uint32_t* used = memory.codes;
  if (single_value && !(single && alike(coded_.key_codes, coded_.value_codes) &&
                        keys.codewords == values.codewords)) {
    used = memory.value_codes;
    good = read_codes(values, value_codes, place, 0, 0, memory.value_codes);
  } else if (!single_value) {
    good =
        compose_rows(values, value_codes, place, kernels_, words, value_to, memory, memory.values);
  }
  if (!good) found_ = CodesFound::kBadValueCode;
  if (as_codes) {
    rows.values = nullptr;
    rows.value_codes = used;
  } else if (single_value) {
    point(values, used, place.count, memory.values);
  }
  return with_angles(rows, place, memory);
}

// Where the angles of key k of a tile begin.
std::size_t CodedSource::angle_of(const TilePlace& place, std::size_t k) const {
  const std::size_t token = place.visible->place(place.first + k);
  return place.batch * coded_.rope_stride + token * shape_.width;
}

KeyRows CodedSource::with_angles(KeyRows rows, const TilePlace& place, TileMemory& memory) const {
  if (coded_.cos == nullptr) return rows;
  const std::size_t width = shape_.width;
  float* cos = memory.scratch + floats_of_rows();
  float* sin = cos + kTileKeys * width;
  for (std::size_t k = 0; k < place.count; ++k) {
    const std::size_t angle = angle_of(place, k);
    memory.cos[k] = angles_.read(coded_.cos, angle, width, cos + k * width);
    memory.sin[k] = angles_.read(coded_.sin, angle, width, sin + k * width);
  }
  rows.cos = memory.cos;
  rows.sin = memory.sin;
  return rows;
}

KeyRows CodedSource::rows(const TilePlace& place, TileMemory& memory, bool as_codes) const {
  KeyRows rows = find(place, memory, as_codes);
  if (rows.cos == nullptr || shape_.width % (2 * kernels_.lanes) == 0) return rows;
  float* keys = memory.scratch;
  kernels_.gather(rows, shape_.width, shape_.value_width, keys, keys + kTileKeys * shape_.width);
  for (std::size_t k = 0; k < place.count; ++k) memory.keys[k] = keys + k * shape_.width;
  rows.cos = rows.sin = nullptr;
  return rows;
}

KeyTile CodedSource::tile(const TilePlace& place, TileMemory& memory) const {
  const KeyRows rows = find(place, memory, false);
  float* keys = memory.scratch;
  float* values = keys + kTileKeys * shape_.width;
  kernels_.gather(rows, shape_.width, shape_.value_width, keys, values);
  return {keys, shape_.width, values, shape_.value_width, place.first, place.count};
}

}  // namespace astra::detail
