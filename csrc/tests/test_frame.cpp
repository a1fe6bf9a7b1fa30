// The decoder against its own encoders, at the edges; csrc/fuzz looks for what lies between.

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "astra/bitpack.hpp"
#include "astra/frame.hpp"
#include "expect.hpp"

namespace {

using namespace astra::wire;
using Bytes = std::vector<std::uint8_t>;

void headers() {
  const Header sent{3, 5, 0xDEADBEEF, 3, 1, 7, 9};
  const Expected expected{3, 5, 0xDEADBEEF, 3, 1, 7, 9};
  std::array<std::uint8_t, kHeaderSize> data{};
  write_header(sent, data.data());
  expect(check_header(data.data(), data.size(), expected) == Field::kNone, "the header expected");
  expect(check_header(data.data(), 27, expected) == Field::kSize, "27 bytes are no header");
  expect(check_header(nullptr, 0, expected) == Field::kSize, "nothing is no header");
  const Field of_byte[] = {Field::kLength, Field::kSequence, Field::kPlan,   Field::kBlock,
                           Field::kCall,   Field::kRequest,  Field::kRequest};
  for (std::size_t i = 0; i < kHeaderSize; ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      auto changed = data;
      changed[i] = static_cast<std::uint8_t>(changed[i] ^ 1 << bit);
      const Field named = i == 14 || i == 15 ? Field::kSource : of_byte[i / 4];
      expect(check_header(changed.data(), kHeaderSize, expected) == named,
             "the field that changed");
    }
  }
  expect(check_header(data.data(), kHeaderSize,
                      {3, 5 + (std::int64_t{1} << 32), 0xDEADBEEF, 3, 1, 7, 9}) == Field::kSequence,
         "a sequence number behind the last one is no frame's");
}

void byes() {
  std::array<std::uint8_t, kHeaderSize> data{};
  write_header({0, 9, 0, kBye, 2}, data.data());
  expect(is_bye(data.data(), kHeaderSize, 2), "BYE of rank 2");
  expect(!is_bye(data.data(), kHeaderSize, 1), "no BYE of rank 1");
  expect(!is_bye(data.data(), kHeaderSize - 1, 2), "a part of a BYE is none");
}

void hellos() {
  Hello hello;
  hello.world_size = 4;
  hello.rank = 2;
  hello.reason_size = 512;
  hello.run[15] = 15;
  Bytes data(kHelloSize);
  write_hello(hello, data.data());
  for (std::size_t size = 0; size <= kHelloSize; ++size) {
    expect(judge_prefix(data.data(), size) == Greeting::kFits, "the beginning of a HELLO");
  }
  Hello back;
  expect(read_hello(data.data(), data.size(), back) == Greeting::kFits, "a HELLO");
  expect(back.rank == 2 && back.reason_size == 512 && back.run == hello.run, "its fields");
  expect(read_hello(data.data(), 29, back) == Greeting::kSize, "a HELLO cut short");
  data[12] = 1;  // 513
  expect(read_hello(data.data(), 30, back) == Greeting::kReason, "too long a reason");
  data[4] = 1;
  expect(read_hello(data.data(), 30, back) == Greeting::kVersion, "another version");
  data[3] = 'A';
  expect(read_hello(data.data(), 30, back) == Greeting::kForeign, "something else");
}

// A count of facts, then texts with their lengths, then zeros.
Bytes facts_of(unsigned count, const std::vector<std::string>& texts, std::size_t size) {
  Bytes data = {static_cast<std::uint8_t>(count), static_cast<std::uint8_t>(count >> 8)};
  for (const std::string& text : texts) {
    data.push_back(static_cast<std::uint8_t>(text.size()));
    data.push_back(static_cast<std::uint8_t>(text.size() >> 8));
    data.insert(data.end(), text.begin(), text.end());
  }
  data.resize(size < data.size() ? data.size() : size);
  return data;
}

FactsError judged(const Bytes& data) {
  static std::array<Text, kMaxTexts> texts;
  return read_facts(data.data(), data.size(), texts).error;
}

void facts() {
  expect(judged(facts_of(2, {"a", "x", "b", ""}, kFactsSize)) == FactsError::kNone, "two facts");
  expect(judged(facts_of(0, {}, 2)) == FactsError::kNone, "no facts");
  expect(judged({}) == FactsError::kCut && judged({0}) == FactsError::kCut, "no count");
  expect(judged(facts_of(1, {"a"}, 0)) == FactsError::kCut, "a name without a value");
  expect(judged(facts_of(0xFFFF, {}, kFactsSize)) == FactsError::kOrder, "names alike");
  expect(judged(facts_of(1, {"a", std::string(3000, 'x')}, 0)) == FactsError::kLong, "too long");
  expect(judged(facts_of(2, {"b", "x", "a", "x"}, 64)) == FactsError::kOrder, "not in order");
  expect(judged(facts_of(2, {"a", "x", "a", "x"}, 64)) == FactsError::kOrder, "a name twice");
  expect(judged(facts_of(1, {"a", "\xff"}, 64)) == FactsError::kEncoding, "not UTF-8");
  Bytes padded = facts_of(1, {"a", "x"}, 64);
  padded.back() = 1;
  expect(judged(padded) == FactsError::kPadding, "something behind the last text");
}

bool utf8(const char* text) {
  return is_utf8(reinterpret_cast<const std::uint8_t*>(text), std::strlen(text));
}

void encodings() {
  for (const char* good : {"", "abc", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF",
                           "\xEE\x80\x80", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    expect(utf8(good), good);
  }
  for (const char* bad :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80", "\xC2", "\xE1\x80", "\xC2 "}) {
    expect(!utf8(bad), "what is no UTF-8");
  }
}

void codes_of_every_width() {
  for (int bits = 1; bits <= 16; ++bits) {
    for (std::size_t count = 1; count < 20; ++count) {
      std::vector<std::int32_t> codes(count, (1 << bits) - 1), back(count + 1, -7);
      Bytes data(astra::packed_size(count, bits));
      astra::pack(codes.data(), count, bits, data.data(), data.size());
      const auto judge = [&](std::size_t size, int width, std::int32_t codewords) {
        return read_codes(data.data(), size, width, codewords, back.data(), count).error;
      };
      expect(judge(data.size(), bits, 1 << bits) == CodesError::kNone, "every code fits");
      expect(back.back() == -7, "nothing is written behind the codes");
      expect(judge(data.size(), bits, (1 << bits) - 1) == CodesError::kCode, "a code too large");
      expect(judge(data.size() - 1, bits, 1 << bits) == CodesError::kSize, "a byte too few");
      expect(judge(data.size(), 0, 2) == CodesError::kWidth, "no width");
      expect(judge(data.size(), 17, 2) == CodesError::kWidth, "too wide");
      const std::size_t used = count * static_cast<std::size_t>(bits) % 8;
      if (used == 0) continue;
      data.back() = static_cast<std::uint8_t>(data.back() | 0x80);
      expect(judge(data.size(), bits, 1 << bits) == CodesError::kSpare, "a spare bit");
    }
  }
  const auto endless = read_codes(nullptr, 0, 16, 1, nullptr, SIZE_MAX);
  expect(endless.error == CodesError::kSize, "a count that overflows");
  expect(read_codes(nullptr, 0, 1, 1, nullptr, 0).error == CodesError::kNone, "no codes");
}

}  // namespace

int main() {
  headers();
  byes();
  hellos();
  facts();
  encodings();
  codes_of_every_width();
  if (failures == 0) std::puts("frame: all passed");
  return failures == 0 ? 0 : 1;
}
