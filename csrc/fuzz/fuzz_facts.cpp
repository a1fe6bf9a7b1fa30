// The frame of facts.
//
// Promised: accepted facts written again are the same bytes, their names ascend, every text is
// UTF-8 and lies within the frame.

#include <algorithm>
#include <string_view>
#include <vector>

#include "astra/frame.hpp"
#include "fuzz.hpp"

using namespace astra::wire;

namespace {

void put16(std::vector<std::uint8_t>& out, std::size_t value) {
  out.push_back(static_cast<std::uint8_t>(value));
  out.push_back(static_cast<std::uint8_t>(value >> 8));
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static std::array<Text, kMaxTexts> texts;
  static std::vector<std::uint8_t> written;
  const Facts facts = read_facts(data, size, texts);
  PROMISE(facts.position <= size);
  if (facts.error != FactsError::kNone) return 0;
  PROMISE(size <= kFactsSize && facts.count <= kMaxTexts && facts.count % 2 == 0);
  written.clear();
  put16(written, facts.count / 2);
  std::string_view last_name;
  for (std::size_t i = 0; i < facts.count; ++i) {
    const Text text = texts[i];
    PROMISE(std::size_t{text.offset} + text.size <= size);
    const std::uint8_t* start = data + text.offset;
    PROMISE(is_utf8(start, text.size));
    const std::string_view name(reinterpret_cast<const char*>(start), text.size);
    PROMISE(i % 2 == 1 || i == 0 || last_name < name);
    if (i % 2 == 0) last_name = name;
    put16(written, text.size);
    written.insert(written.end(), start, start + text.size);
  }
  PROMISE(written.size() <= size);
  written.resize(size);
  PROMISE(std::equal(written.begin(), written.end(), data));
  return 0;
}
