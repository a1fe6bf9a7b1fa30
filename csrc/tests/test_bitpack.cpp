// Every width x length x instruction set against a bit-by-bit codec, between canaries.

#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "astra/bitpack.hpp"
#include "expect.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;
using Codes = std::vector<std::int32_t>;

// The layout, spelled out.
Bytes reference_pack(const Codes& codes, int bits) {
  Bytes out((codes.size() * static_cast<std::size_t>(bits) + 7) / 8, 0);
  std::size_t j = 0;
  for (const std::int32_t code : codes) {
    for (int bit = 0; bit < bits; ++bit, ++j) {
      if (code >> bit & 1) out[j / 8] = static_cast<std::uint8_t>(out[j / 8] | 1u << (j % 8));
    }
  }
  return out;
}

Codes random_codes(std::mt19937& random, std::size_t count, int bits) {
  Codes codes(count);
  for (auto& code : codes) code = static_cast<std::int32_t>(random() & ((1u << bits) - 1));
  if (count > 0) codes.back() = (1 << bits) - 1;
  return codes;
}

// `size` elements at an odd offset between canary bytes, so that loads and stores are unaligned.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t size) : bytes_(kGuard + size * sizeof(T) + kGuard, kCanary) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kGuard); }

  bool intact_from(std::size_t used) const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (bytes_[i] != kCanary) return false;
    }
    for (std::size_t i = kGuard + used * sizeof(T); i < bytes_.size(); ++i) {
      if (bytes_[i] != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 68;
  static constexpr std::uint8_t kCanary = 0xA5;
  Bytes bytes_;
};

void check_length(const std::string& isa, std::mt19937& random, std::size_t count, int bits) {
  const std::string where =
      isa + ", " + std::to_string(bits) + " bits, " + std::to_string(count) + " codes";
  const Codes codes = random_codes(random, count, bits);
  const Bytes expected = reference_pack(codes, bits);
  expect(astra::packed_size(count, bits) == expected.size(), "packed_size: " + where);

  // Exactly as long as needed, on the heap: the sanitizer sees a byte read beyond the end.
  const std::unique_ptr<std::int32_t[]> source(new std::int32_t[count]);
  std::copy(codes.begin(), codes.end(), source.get());
  Guarded<std::uint8_t> packed(expected.size());
  astra::pack(source.get(), count, bits, packed.data(), expected.size());
  expect(std::equal(expected.begin(), expected.end(), packed.data()), "pack: " + where);
  expect(packed.intact_from(expected.size()), "pack writes outside: " + where);

  const std::unique_ptr<std::uint8_t[]> data(new std::uint8_t[expected.size()]);
  std::copy(expected.begin(), expected.end(), data.get());
  Guarded<std::int32_t> unpacked(count);
  astra::unpack(data.get(), expected.size(), bits, unpacked.data(), count);
  expect(std::equal(codes.begin(), codes.end(), unpacked.data()), "unpack: " + where);
  expect(unpacked.intact_from(count), "unpack writes outside: " + where);

  // Exact heap buffers on the writing side too.
  const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[expected.size()]);
  astra::pack(source.get(), count, bits, out.get(), expected.size());
  const std::unique_ptr<std::int32_t[]> back(new std::int32_t[count]);
  astra::unpack(out.get(), expected.size(), bits, back.get(), count);
  expect(std::equal(codes.begin(), codes.end(), back.get()), "round trip: " + where);
}

void expect_error(const std::function<void()>& call, const std::string& message) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    expect(error.what() == message, "expected '" + message + "', got '" + error.what() + "'");
    return;
  }
  expect(false, "no error: " + message);
}

// A bad code anywhere: in the vector part, in the ragged end, negative or just too large.
void check_bad_codes(const std::string& isa, int bits) {
  constexpr std::size_t kCount = 331;
  for (std::size_t index = 0; index < kCount; ++index) {
    for (const std::int32_t bad : {1 << bits, -1, INT32_MIN, INT32_MAX}) {
      Codes codes(kCount, (1 << bits) - 1);
      codes[index] = bad;
      codes[kCount - 1] = index + 1 < kCount ? -5 : bad;  // the first bad one is named
      const std::size_t size = astra::packed_size(kCount, bits);
      Guarded<std::uint8_t> out(size);
      try {
        astra::pack(codes.data(), kCount, bits, out.data(), size);
        expect(false, isa + ": bad code accepted at " + std::to_string(index));
      } catch (const astra::CodeError& error) {
        expect(error.index == index && error.value == bad, isa + ": wrong code named");
      }
      expect(out.intact_from(size), isa + ": bad code written outside");
    }
  }
}

void check_errors() {
  const Codes codes{1, 2, 1024};
  Bytes bytes(16);
  Codes out(16);
  expect_error([&] { astra::pack(codes.data(), 3, 10, bytes.data(), 4); },
               "codes[2] is 1024, which does not fit 10 bits (0..1023)");
  expect_error([&] { astra::pack(codes.data(), 2, 1, bytes.data(), 1); },
               "codes[1] is 2, which does not fit 1 bit (0..1)");
  expect_error([&] { astra::pack(codes.data(), 3, 11, bytes.data(), 4); },
               "out must hold at least 5 bytes for 3 codes of 11 bits, got 4");
  expect_error([&] { astra::unpack(bytes.data(), 4, 11, out.data(), 3); },
               "data must hold at least 5 bytes for 3 codes of 11 bits, got 4");
  expect_error([] { astra::packed_size(1, 0); }, "bits must be within 1..16, got 0");
  expect_error([] { astra::packed_size(1, 17); }, "bits must be within 1..16, got 17");
  expect(astra::packed_size(SIZE_MAX / 8, 16) == SIZE_MAX / 8 * 2, "the largest packed_size");
  expect_error([] { astra::packed_size(SIZE_MAX, 1); }, "count must be at most " +
                                                            std::to_string(SIZE_MAX / 8) +
                                                            ", got " + std::to_string(SIZE_MAX));
  astra::pack(nullptr, 0, 16, nullptr, 0);
  astra::unpack(nullptr, 0, 16, nullptr, 0);
  try {
    astra::set_isa("quantum");
    expect(false, "an unknown isa was accepted");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  expect(astra::isa() == astra::available_isas().back(), "the widest isa is not the default");
  check_errors();
  for (const std::string& isa : astra::available_isas()) {
    astra::set_isa(isa);
    expect(astra::isa() == isa, "set_isa");
    std::mt19937 random(7);
    for (int bits = astra::kMinBits; bits <= astra::kMaxBits; ++bits) {
      for (std::size_t count = 0; count <= 700; ++count) check_length(isa, random, count, bits);
      for (std::size_t count : {1023, 1024, 4095, 4096, 15360, 65537, 100003}) {
        check_length(isa, random, count, bits);
      }
      check_bad_codes(isa, bits);
    }
    std::printf("%s: %s\n", isa.c_str(), failures == 0 ? "ok" : "FAILED");
  }
  // With an argument: the instruction set that must have been among them.
  if (argc > 1) expect(astra::isa() == argv[1], std::string("not tested: ") + argv[1]);
  return failures == 0 ? 0 : 1;
}
