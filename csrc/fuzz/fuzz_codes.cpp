// Payloads of codes. Input: width, codewords (2 bytes), count, instruction set, then the payload.
//
// Promised: accepted codes are below the number of codewords and packed again are the same bytes;
// nothing is written behind them; every instruction set reads the same.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "astra/bitpack.hpp"
#include "astra/frame.hpp"
#include "fuzz.hpp"

using namespace astra::wire;

namespace {

constexpr std::size_t kSettings = 5;
constexpr std::int32_t kPoison = -7;

void choose_isa(std::uint8_t number) {
  static const std::vector<std::string> isas = astra::available_isas();
  static std::size_t current = isas.size();
  const std::size_t wanted = number % isas.size();
  if (wanted != current) astra::set_isa(isas[current = wanted]);
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kSettings) return 0;
  const int bits = data[0] % 18;
  const std::int32_t codewords = data[1] | data[2] << 8;
  const std::size_t count = data[3];
  choose_isa(data[4]);
  const std::uint8_t* payload = data + kSettings;
  const std::size_t bytes = size - kSettings;

  static std::vector<std::int32_t> codes;
  codes.assign(count + 1, kPoison);
  const Codes found = read_codes(payload, bytes, bits, codewords, codes.data(), count);
  PROMISE(codes[count] == kPoison);
  if (found.error == CodesError::kWidth) {
    PROMISE(bits < astra::kMinBits || bits > astra::kMaxBits);
    return 0;
  }
  PROMISE((found.error == CodesError::kSize) == (astra::packed_size(count, bits) != bytes));
  if (found.error == CodesError::kCode) {
    PROMISE(found.index < count && codes[found.index] >= codewords);
    PROMISE(std::all_of(codes.begin(), codes.begin() + static_cast<std::ptrdiff_t>(found.index),
                        [&](std::int32_t code) { return code >= 0 && code < codewords; }));
  }
  if (found.error == CodesError::kSize || found.error == CodesError::kCode) return 0;
  static std::vector<std::uint8_t> packed;
  packed.assign(bytes, 0xAA);
  for (std::size_t i = 0; i < count; ++i) PROMISE(codes[i] >= 0 && codes[i] < codewords);
  astra::pack(codes.data(), count, bits, packed.data(), packed.size());
  const bool same = bytes == 0 || std::memcmp(packed.data(), payload, bytes) == 0;
  PROMISE(same == (found.error == CodesError::kNone));
  return 0;
}
