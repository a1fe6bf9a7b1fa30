// The wire format's decoder; see frame.hpp.

#include "astra/frame.hpp"

#include <algorithm>
#include <cstring>

#include "astra/bitpack.hpp"
#include "bitpack_kernel.hpp"

namespace astra::wire {
namespace {

constexpr std::array<std::uint8_t, 4> kMagic = {'A', 'S', 'T', 'R'};

std::uint16_t read16(const std::uint8_t* data) noexcept {
  return static_cast<std::uint16_t>(data[0] | data[1] << 8);
}

std::uint32_t read32(const std::uint8_t* data) noexcept {
  return read16(data) | static_cast<std::uint32_t>(read16(data + 2)) << 16;
}

void write16(std::uint16_t value, std::uint8_t* out) noexcept {
  out[0] = static_cast<std::uint8_t>(value);
  out[1] = static_cast<std::uint8_t>(value >> 8);
}

void write32(std::uint32_t value, std::uint8_t* out) noexcept {
  write16(static_cast<std::uint16_t>(value), out);
  write16(static_cast<std::uint16_t>(value >> 16), out + 2);
}

std::int64_t read64(const std::uint8_t* data) noexcept {
  return static_cast<std::int64_t>(read32(data) | static_cast<std::uint64_t>(read32(data + 4))
                                                      << 32);
}

void write64(std::int64_t value, std::uint8_t* out) noexcept {
  const auto bits = static_cast<std::uint64_t>(value);
  write32(static_cast<std::uint32_t>(bits), out);
  write32(static_cast<std::uint32_t>(bits >> 32), out + 4);
}

// Bytes of the character that begins with `lead`, and its least code point; 0: none begins so.
struct Shape {
  std::size_t bytes;
  std::uint32_t least;
};

Shape shape_of(std::uint8_t lead) noexcept {
  if (lead < 0x80) return {1, 0};
  if (lead >> 5 == 0x6) return {2, 0x80};
  if (lead >> 4 == 0xE) return {3, 0x800};
  if (lead >> 3 == 0x1E) return {4, 0x10000};
  return {0, 0};
}

// Whether the text at `second` comes behind the one at `first`, byte by byte.
bool ascending(const std::uint8_t* data, const Text& first, const Text& second) noexcept {
  const std::size_t shared = std::min(first.size, second.size);
  const int order = std::memcmp(data + first.offset, data + second.offset, shared);
  return order < 0 || (order == 0 && first.size < second.size);
}

}  // namespace

Header read_header(const std::uint8_t* data) noexcept {
  return {read32(data),      read32(data + 4),  read32(data + 8), read16(data + 12),
          read16(data + 14), read32(data + 16), read64(data + 20)};
}

void write_header(const Header& header, std::uint8_t* out) noexcept {
  write32(header.length, out);
  write32(header.sequence, out + 4);
  write32(header.plan, out + 8);
  write16(header.block, out + 12);
  write16(header.source, out + 14);
  write32(header.call, out + 16);
  write64(header.request, out + 20);
}

Field check_header(const std::uint8_t* data, std::size_t size, const Expected& expected) noexcept {
  if (size < kHeaderSize) return Field::kSize;
  const Header came = read_header(data);
  if (came.source != expected.source) return Field::kSource;
  if (came.sequence != expected.sequence) return Field::kSequence;
  if (came.call != expected.call) return Field::kCall;
  if (came.request != expected.request) return Field::kRequest;
  if (came.plan != expected.plan) return Field::kPlan;
  if (came.block != expected.block) return Field::kBlock;
  if (came.length != expected.length) return Field::kLength;
  return Field::kNone;
}

bool is_bye(const std::uint8_t* data, std::size_t size, std::int64_t source) noexcept {
  if (size < kHeaderSize) return false;
  const Header came = read_header(data);
  return came.block == kBye && came.source == source && came.length == 0 && came.plan == 0 &&
         came.call == 0 && came.request == kNoRequest;
}

Greeting judge_prefix(const std::uint8_t* data, std::size_t size) noexcept {
  const auto seen = static_cast<std::ptrdiff_t>(std::min(size, kMagic.size()));
  if (!std::equal(kMagic.begin(), kMagic.begin() + seen, data)) return Greeting::kForeign;
  if (size >= kPrefixSize && prefix_version(data) != kProtocolVersion) return Greeting::kVersion;
  return Greeting::kFits;
}

std::uint16_t prefix_version(const std::uint8_t* data) noexcept {
  return read16(data + kMagic.size());
}

Greeting read_hello(const std::uint8_t* data, std::size_t size, Hello& hello) noexcept {
  const Greeting prefix = judge_prefix(data, size);
  if (prefix != Greeting::kFits) return prefix;
  if (size != kHelloSize) return Greeting::kSize;
  hello.version = prefix_version(data);
  hello.world_size = read16(data + 6);
  hello.rank = read16(data + 8);
  hello.to = read16(data + 10);
  hello.reason_size = read16(data + 12);
  std::copy_n(data + 14, kRunSize, hello.run.begin());
  return hello.reason_size > kMaxReason ? Greeting::kReason : Greeting::kFits;
}

void write_hello(const Hello& hello, std::uint8_t* out) noexcept {
  std::copy(kMagic.begin(), kMagic.end(), out);
  write16(hello.version, out + 4);
  write16(hello.world_size, out + 6);
  write16(hello.rank, out + 8);
  write16(hello.to, out + 10);
  write16(hello.reason_size, out + 12);
  std::copy(hello.run.begin(), hello.run.end(), out + 14);
}

Facts read_facts(const std::uint8_t* data, std::size_t size,
                 std::array<Text, kMaxTexts>& texts) noexcept {
  if (size > kFactsSize) return {FactsError::kLong, 0, kFactsSize};
  if (size < 2) return {FactsError::kCut, 0, size};
  const std::size_t count = 2 * std::size_t{read16(data)};
  std::size_t position = 2;
  for (std::size_t i = 0; i < count; ++i) {
    if (size - position < 2) return {FactsError::kCut, i, position};
    const std::size_t bytes = read16(data + position);
    position += 2;
    if (bytes > size - position) return {FactsError::kCut, i, position};
    // A text takes at least the two bytes of its length: no more than kMaxTexts come so far.
    texts[i] = {static_cast<std::uint16_t>(position), static_cast<std::uint16_t>(bytes)};
    if (!is_utf8(data + position, bytes)) return {FactsError::kEncoding, i, position};
    if (i >= 2 && i % 2 == 0 && !ascending(data, texts[i - 2], texts[i])) {
      return {FactsError::kOrder, i, position};
    }
    position += bytes;
  }
  for (; position < size; ++position) {
    if (data[position] != 0) return {FactsError::kPadding, count, position};
  }
  return {FactsError::kNone, count, position};
}

bool is_utf8(const std::uint8_t* data, std::size_t size) noexcept {
  for (std::size_t i = 0; i < size;) {
    const Shape shape = shape_of(data[i]);
    if (shape.bytes == 0 || shape.bytes > size - i) return false;
    std::uint32_t point = data[i] & (shape.bytes == 1 ? 0x7Fu : 0x7Fu >> shape.bytes);
    for (std::size_t j = 1; j < shape.bytes; ++j) {
      if (data[i + j] >> 6 != 0x2) return false;
      point = point << 6 | (data[i + j] & 0x3Fu);
    }
    const bool surrogate = point >= 0xD800 && point < 0xE000;
    if (point < shape.least || point > 0x10FFFF || surrogate) return false;
    i += shape.bytes;
  }
  return true;
}

Codes read_codes(const std::uint8_t* data, std::size_t size, int bits, std::int32_t codewords,
                 std::int32_t* codes, std::size_t count) noexcept {
  if (bits < kMinBits || bits > kMaxBits) return {CodesError::kWidth, 0};
  // Of a count that overflows, no payload has the size: eight codes take at least a byte.
  if (count / 8 > size || size != detail::stream_bytes(count, bits)) return {CodesError::kSize, 0};
  detail::unpack(data, bits, codes, count);
  std::int32_t largest = -1;  // found first, in a loop without a branch
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, codes[i]);
  if (largest >= codewords) {
    const auto* bad = std::find_if(codes, codes + count, [&](auto c) { return c >= codewords; });
    return {CodesError::kCode, static_cast<std::size_t>(bad - codes)};
  }
  const auto used = static_cast<int>(count % 8 * static_cast<std::size_t>(bits) % 8);
  if (used != 0 && data[size - 1] >> used != 0) return {CodesError::kSpare, count};
  return {CodesError::kNone, 0};
}

}  // namespace astra::wire
