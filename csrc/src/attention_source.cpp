#include "attention_source.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

namespace astra::detail {
namespace {

// Rows at this distance fall on few sets of the L1 cache; the products read eight at once.
constexpr std::size_t kCrowding = 2048;

bool crowds(std::size_t stride, std::size_t width) {
  return stride != width && stride * sizeof(float) % kCrowding == 0;
}

void copy_rows(const float* from, std::size_t stride, const VisibleKeys& visible, std::size_t first,
               std::size_t count, std::size_t width, float* to) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t place =
        visible.places == nullptr ? first + k : static_cast<std::size_t>(visible.places[first + k]);
    std::memcpy(to + k * width, from + place * stride, width * sizeof(float));
  }
}

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

  std::uint32_t operator()(std::size_t token, std::size_t index) const {
    const std::size_t at = token * per_token_ + index;
    if (integers_ != nullptr) return static_cast<std::uint32_t>(integers_[at]);
    const std::size_t bit = at * bits_;
    const std::size_t byte = bit / 8;
    std::uint32_t word = bytes_[byte];
    if (byte + 1 < size_) word |= static_cast<std::uint32_t>(bytes_[byte + 1]) << 8;
    if (byte + 2 < size_) word |= static_cast<std::uint32_t>(bytes_[byte + 2]) << 16;
    return word >> bit % 8 & ((1U << bits_) - 1);
  }

 private:
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

// The vector of a token; false if it has a code that the table lacks.
bool look_up(const HeadTable& table, const CodeReader& codes, std::size_t token, float* to) {
  bool good = true;
  for (std::size_t group = 0; group < table.groups; ++group, to += table.width) {
    for (std::size_t stage = 0; stage < table.stages; ++stage) {
      std::uint32_t code = codes(token, stage * table.codes_of_stage + table.first_code + group);
      good = good && code < table.codewords;
      if (code >= table.codewords) code = 0;
      const float* word = table.vectors + stage * table.stage_stride +
                          (group * table.codewords + code) * table.width;
      if (stage == 0) {
        std::memcpy(to, word, table.width * sizeof(float));
      } else {
        for (std::size_t c = 0; c < table.width; ++c) to[c] += word[c];
      }
    }
  }
  return good;
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

KeyTile DenseSource::tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
                          std::size_t first, std::size_t count, bool in_place,
                          float* scratch) const {
  const float* bases[2] = {dense_.keys, dense_.values};
  const HeadStrides* strides[2] = {&dense_.key_strides, &dense_.value_strides};
  const float* rows[2];
  std::size_t row_strides[2];
  for (std::size_t i = 0; i < 2; ++i) {
    const float* base = bases[i] + batch * strides[i]->batch + kv_head * strides[i]->head;
    const std::size_t stride = strides[i]->row;
    const std::size_t width = i == 0 ? shape_.width : shape_.value_width;
    if (visible.places != nullptr || (!in_place && crowds(stride, width))) {
      float* to = scratch + i * kTileKeys * shape_.width;
      copy_rows(base, stride, visible, first, count, width, to);
      rows[i] = to;
      row_strides[i] = width;
    } else {
      rows[i] = base + first * stride;
      row_strides[i] = stride;
    }
  }
  return {rows[0], row_strides[0], rows[1], row_strides[1], first, count};
}

CodedSource::CodedSource(const CodedKeys& coded, const AttentionShape& shape, Rotate rotate)
    : coded_(coded), shape_(shape), rotate_(rotate) {
  check("key_codes", coded.key_codes, coded.key_table, shape.kv_heads, shape.width);
  check("value_codes", coded.value_codes, coded.value_table, shape.kv_heads, shape.value_width);
  if (coded.cos != nullptr && shape.width % 2 != 0) {
    throw std::invalid_argument("width must be even where keys are rotated, got " +
                                std::to_string(shape.width));
  }
}

KeyTile CodedSource::tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
                          std::size_t first, std::size_t count, bool /*in_place*/,
                          float* scratch) const {
  const CodeReader key_codes(coded_.key_codes, coded_.count, batch);
  const CodeReader value_codes(coded_.value_codes, coded_.count, batch);
  const HeadTable key_table =
      head_table(coded_.key_table, coded_.key_codes, shape_.kv_heads, kv_head, shape_.width);
  const HeadTable value_table = head_table(coded_.value_table, coded_.value_codes, shape_.kv_heads,
                                           kv_head, shape_.value_width);
  float* key = scratch;
  float* value = scratch + kTileKeys * shape_.width;
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t token =
        visible.places == nullptr ? first + k : static_cast<std::size_t>(visible.places[first + k]);
    if (!look_up(key_table, key_codes, token, key)) found_ = CodesFound::kBadKeyCode;
    if (!look_up(value_table, value_codes, token, value)) found_ = CodesFound::kBadValueCode;
    if (coded_.cos != nullptr) {
      const std::size_t angle = batch * coded_.rope_stride + token * shape_.width;
      rotate_(key, coded_.cos + angle, coded_.sin + angle, shape_.width);
    }
    key += shape_.width;
    value += shape_.value_width;
  }
  return {scratch, shape_.width, scratch + kTileKeys * shape_.width, shape_.value_width,
          first,   count};
}

}  // namespace astra::detail
