// Frame headers. Input: the header that has to come, then what comes.
//
// Promised: what is accepted is what had to come, bit for bit (no forgery), what had to come is
// accepted, and the field that is named differs while those named before it do not.

#include <algorithm>
#include <cstring>

#include "astra/frame.hpp"
#include "fuzz.hpp"

using namespace astra::wire;

namespace {

void check_name(const Header& came, const Expected& expected, Field named) {
  const bool same[] = {came.source == expected.source, came.sequence == expected.sequence,
                       came.call == expected.call,     came.request == expected.request,
                       came.plan == expected.plan,     came.block == expected.block,
                       came.length == expected.length};
  const auto* first = std::find(std::begin(same), std::end(same), false);
  const auto place = static_cast<int>(first - std::begin(same));
  PROMISE(place < 7 && static_cast<int>(named) == static_cast<int>(Field::kSource) + place);
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kHeaderSize) {
    PROMISE(check_header(data, size, {}) == Field::kSize);
    return 0;
  }
  const Header wanted = read_header(data);
  const Expected expected{wanted.length, wanted.sequence, wanted.plan,   wanted.block,
                          wanted.source, wanted.call,     wanted.request};
  std::uint8_t written[kHeaderSize];
  write_header(wanted, written);
  PROMISE(std::memcmp(written, data, kHeaderSize) == 0);

  const std::uint8_t* came = data + kHeaderSize;
  const std::size_t bytes = size - kHeaderSize;
  const Field named = check_header(came, bytes, expected);
  if (bytes < kHeaderSize) {
    PROMISE(named == Field::kSize);
    return 0;
  }
  const bool equal = std::memcmp(came, data, kHeaderSize) == 0;
  PROMISE((named == Field::kNone) == equal);
  if (!equal) check_name(read_header(came), expected, named);

  std::uint8_t bye[kHeaderSize];
  write_header({0, read_header(came).sequence, 0, kBye, wanted.source}, bye);
  PROMISE(is_bye(came, bytes, wanted.source) == (std::memcmp(bye, came, kHeaderSize) == 0));
  return 0;
}
