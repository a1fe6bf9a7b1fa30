// The first bytes of a caller.
//
// Promised: an accepted HELLO written again is the same 30 bytes, a beginning that is refused is
// never accepted when more of it has come, and a reason is bounded.

#include <algorithm>
#include <cstring>

#include "astra/frame.hpp"
#include "fuzz.hpp"

using namespace astra::wire;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  bool refused = false;
  for (std::size_t seen = 0; seen <= std::min(size, kHelloSize); ++seen) {
    const bool fits = judge_prefix(data, seen) == Greeting::kFits;
    PROMISE(!(refused && fits));
    refused = !fits;
  }
  Hello hello;
  const Greeting greeting = read_hello(data, size, hello);
  PROMISE(greeting != Greeting::kFits || (size == kHelloSize && !refused));
  PROMISE(greeting != Greeting::kReason || hello.reason_size > kMaxReason);
  if (greeting != Greeting::kFits) return 0;
  PROMISE(hello.version == kProtocolVersion && hello.reason_size <= kMaxReason);
  std::uint8_t written[kHelloSize];
  write_hello(hello, written);
  PROMISE(std::memcmp(written, data, kHelloSize) == 0);
  return 0;
}
