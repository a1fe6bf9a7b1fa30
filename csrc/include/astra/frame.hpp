// What ranks tell each other, judged byte by byte. docs/wire.md describes the bytes; this header is
// the contract of the functions that read them before anything is believed.
//
// Nothing here throws, allocates or does I/O. A function reads its `size` bytes and no others,
// whatever they claim. All numbers on the wire are little-endian, any alignment will do, null is a
// valid address for no bytes.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace astra::wire {

inline constexpr std::uint16_t kProtocolVersion = 2;
inline constexpr std::uint16_t kBye = 0xFFFF;  // block number of a rank's last frame
inline constexpr std::size_t kHeaderSize = 28;
inline constexpr std::int64_t kNoRequest = -1;  // of a call that was given no number
inline constexpr std::size_t kPrefixSize = 6;   // magic and version, what no version may change
inline constexpr std::size_t kHelloSize = 30;
inline constexpr std::size_t kRunSize = 16;
inline constexpr std::size_t kMaxReason = 512;
inline constexpr std::size_t kFactsSize = 2048;
inline constexpr std::size_t kMaxTexts = (kFactsSize - 2) / 2;  // of no bytes but their lengths

// --- frames

// A frame's first bytes. `length`: bytes of payload. `call` counts the sender's calls, `request` is
// the host's own number for one; frames outside of calls have 0 and kNoRequest.
struct Header {
  std::uint32_t length = 0, sequence = 0, plan = 0;
  std::uint16_t block = 0, source = 0;
  std::uint32_t call = 0;
  std::int64_t request = kNoRequest;
};

// The header that has to come. Wider than the wire: a sequence number behind the last one fits no
// frame.
struct Expected {
  std::int64_t length = 0, sequence = 0, plan = 0, block = 0, source = 0, call = 0;
  std::int64_t request = kNoRequest;
};

enum class Field : int {
  kNone,
  kSize,
  kSource,
  kSequence,
  kCall,
  kRequest,
  kPlan,
  kBlock,
  kLength
};

Header read_header(const std::uint8_t* data) noexcept;  // data: kHeaderSize bytes
void write_header(const Header& header, std::uint8_t* out) noexcept;

// The field to name to whoever sent another header than `expected`; kNone: it is that header. What
// follows from another field goes behind it: another call has other requests and plans, another
// plan other lengths and blocks. kSize: `size` is less than a header.
Field check_header(const std::uint8_t* data, std::size_t size, const Expected& expected) noexcept;

// Whether `data` starts with the last frame of rank `source`, whatever its sequence number.
bool is_bye(const std::uint8_t* data, std::size_t size, std::int64_t source) noexcept;

// --- HELLO

// `reason_size`: bytes of UTF-8 that follow; 0 accepts.
struct Hello {
  std::uint16_t version = kProtocolVersion, world_size = 0, rank = 0, to = 0, reason_size = 0;
  std::array<std::uint8_t, kRunSize> run{};
};

// kForeign: no HELLO at all; kVersion: of another protocol version; kSize: not kHelloSize bytes;
// kReason: a reason longer than kMaxReason is announced.
enum class Greeting : int { kFits, kForeign, kVersion, kSize, kReason };

// What the first bytes of a caller can still become, however few there are: kFits, or one of the
// first two refusals.
Greeting judge_prefix(const std::uint8_t* data, std::size_t size) noexcept;
std::uint16_t prefix_version(const std::uint8_t* data) noexcept;  // data: kPrefixSize bytes

// Reads a HELLO of exactly kHelloSize bytes into `hello`, which is written only where it fits or
// announces too long a reason.
Greeting read_hello(const std::uint8_t* data, std::size_t size, Hello& hello) noexcept;
void write_hello(const Hello& hello, std::uint8_t* out) noexcept;  // out: kHelloSize bytes

// --- FACTS

// UTF-8 of `size` bytes from `offset` on.
struct Text {
  std::uint16_t offset = 0, size = 0;
};

// kLong: more than kFactsSize bytes; kCut: a text reaches beyond them; kEncoding: no UTF-8; kOrder:
// names are not strictly ascending; kPadding: something stands behind the last text.
enum class FactsError : int { kNone, kLong, kCut, kEncoding, kOrder, kPadding };

// `count` texts, names and values in turns; `position`: where the error is.
struct Facts {
  FactsError error = FactsError::kNone;
  std::size_t count = 0, position = 0;
};

// Reads a count of facts, then name and value of each with its length in front, then zeros. So
// there is one encoding of any set of facts, and no name comes twice.
Facts read_facts(const std::uint8_t* data, std::size_t size,
                 std::array<Text, kMaxTexts>& texts) noexcept;

// Whether these bytes are UTF-8 as Unicode defines it: nothing overlong, no surrogates.
bool is_utf8(const std::uint8_t* data, std::size_t size) noexcept;

// --- payloads of codes

// kWidth: `bits` outside 1..16; kSize: not exactly the bytes that so many codes take; kCode:
// codes[index] is not below `codewords`; kSpare: a bit behind the last code is set.
enum class CodesError : int { kNone, kWidth, kSize, kCode, kSpare };

struct Codes {
  CodesError error = CodesError::kNone;
  std::size_t index = 0;
};

// Unpacks `count` codes as bitpack.hpp says and refuses what no rank would have packed: packed
// again, accepted codes give the same bytes. After an error `codes` holds unspecified values.
Codes read_codes(const std::uint8_t* data, std::size_t size, int bits, std::int32_t codewords,
                 std::int32_t* codes, std::size_t count) noexcept;

}  // namespace astra::wire
