// Bit packing of vector-quantization codes. This header is the contract.
//
// Layout. Code i of width `bits` occupies the stream bits [i*bits, (i+1)*bits). Stream bit j is bit
// j%8 of byte j/8, the least significant bit first. There is no padding between codes; the unused
// high bits of the last byte are zero. So `count` codes take ceil(count*bits/8) bytes, and eight
// codes always take exactly `bits` bytes: a stream may be cut and joined at any multiple of eight.
// The layout does not depend on the machine, its byte order or the instruction set in use.
// It is that of numpy.packbits(bitorder="little") over the codes' bits, and of
// faiss::BitstringWriter.
//
// Buffers. Any alignment will do. A buffer may be longer than needed; nothing beyond the needed
// part is read or written. Inputs and outputs must not overlap. Counts start from 0; null is a
// valid address for an empty buffer.
//
// Errors are std::invalid_argument with a sentence that names the argument, what was expected and
// what came. After an error the needed part of the output holds unspecified values.
//
// Threads. Everything may be called concurrently; `set_isa` included, though it is meant for tests.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace astra {

inline constexpr int kMinBits = 1;
inline constexpr int kMaxBits = 16;

// A code that is negative or at least 2^bits.
class CodeError : public std::invalid_argument {
 public:
  CodeError(std::size_t index, std::int32_t value, int bits);

  std::size_t index;   // of the first such code
  std::int32_t value;  // what it is
};

// Bytes that `count` codes of `bits` (1..16) take.
std::size_t packed_size(std::size_t count, int bits);

// Writes the packed codes[0..count) to out[0..packed_size(count, bits)); `out_size` bytes are
// there. Throws CodeError for a code outside 0..2^bits-1.
void pack(const std::int32_t* codes, std::size_t count, int bits, std::uint8_t* out,
          std::size_t out_size);

// Reads data[0..packed_size(count, bits)), of `data_size` bytes there, and writes codes[0..count).
// Every bit pattern is a valid stream, so the codes written are always within 0..2^bits-1.
void unpack(const std::uint8_t* data, std::size_t data_size, int bits, std::int32_t* codes,
            std::size_t count);

// Instruction sets. All give identical bytes; the widest that this machine runs is chosen at start.
std::string_view isa();                     // the one in use: "portable", "avx2" or "avx512"
std::vector<std::string> available_isas();  // those that run here, "portable" first
void set_isa(std::string_view name);        // throws where it does not run here

}  // namespace astra
