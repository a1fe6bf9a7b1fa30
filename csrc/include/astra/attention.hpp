// Softmax attention with sums in fp32, over keys and values that are dense or known by their codes.
// This header is the contract.
//
// For every query q of batch row b and head h, over the keys k_n and values v_n of KV head
// h / (heads / kv_heads) that it sees:
//   out = sum_n exp(scale * q.k_n - lse) v_n,   lse = ln sum_n exp(scale * q.k_n)
// A query that sees nothing has out 0 and lse -inf, with sinks the head's sink. A score that is NaN
// makes out and lse NaN, and so does +inf. What hidden keys and values hold never matters.
//
// Sums are taken in an order that depends on the instruction set and the shape; on one machine the
// same call gives the same bits, whatever the number of threads.
//
// Strides are in numbers; the channels of a row are adjacent. Inputs and outputs must not overlap;
// any alignment will do. Errors are std::invalid_argument with a sentence that names the argument.
// Everything may be called concurrently. Working memory is kept from call to call, some 500 KB a
// thread, so nothing is allocated once it has grown to what a shape needs.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace astra {

struct AttentionShape {
  std::size_t batch;
  std::size_t heads;  // a multiple of kv_heads
  std::size_t kv_heads;
  std::size_t rows;   // queries of a head
  std::size_t width;  // channels of a query and a key
  std::size_t value_width;
};

struct HeadStrides {
  std::size_t batch;
  std::size_t head;
  std::size_t row;
};

// How a call stores queries, outputs, dense keys and values, and angles: halves are read as the
// floats that they are and written rounded to the nearest, ties to even. lse and all that codes
// mean are fp32.
enum class Storage { kFloat32, kBfloat16, kFloat16 };

struct Queries {
  AttentionShape shape;
  const void* query;  // [batch, heads, rows, width]
  HeadStrides query_strides;
  void* out;  // [batch, heads, rows, value_width]
  HeadStrides out_strides;
  float* lse;  // [batch, heads, rows], contiguous
  float scale;
  // [heads], or null: a score of each head that takes part in the softmax with the value 0.
  const float* sinks = nullptr;
  // At most so many work on it, this one among them.
  unsigned threads = 1;
  // One of attention_isas(); empty: the widest.
  const char* isa = "";
  Storage storage = Storage::kFloat32;
  // Queries, keys, values and weights may be rounded to bfloat16 for products, which are summed in
  // fp32 as ever. They are where the processor multiplies pairs of them (AVX512-BF16), at twice the
  // rate, `isa` allows it, and queries are not few.
  bool rounded = false;
};

struct DenseKeys {
  std::size_t count;
  const void* keys;  // [batch, kv_heads, count, width]
  HeadStrides key_strides;
  const void* values;  // [batch, kv_heads, count, value_width]
  HeadStrides value_strides;
  const std::uint8_t* mask;  // [batch, count], 0 = hidden, or null
  // Query m sees keys 0 .. count - rows + m: the last query stands at the last key. Where there are
  // more queries than keys, the first ones see nothing.
  bool is_causal;
};

// Codes of all tokens: int32, or packed as astra/bitpack.hpp has it, every batch row from a byte
// on.
struct TokenCodes {
  const void* data;
  int bits;                // 1 to 16; 0: int32
  std::size_t per_token;   // codes of a token, for all heads or for each
  std::size_t row_stride;  // int32, or bytes, from a batch row to the next
};

// fp32 [stages, kv_heads, groups, codewords, width / groups]; the stages are summed.
struct CodeTable {
  const float* vectors;
  std::size_t stages;
  std::size_t groups;
  std::size_t codewords;
};

// The key of token n and KV head h is, group s by group, the sum over stages r of
// key_table[r, h, s, code i], rotated if there are angles; its value the same from value_table.
// With C0 = kv_heads * groups codes a token and stage, i = r * C0 + h * groups + s; with
// C0 = groups all heads share them, i = r * C0 + s.
struct CodedKeys {
  std::size_t count;
  TokenCodes key_codes;
  CodeTable key_table;
  TokenCodes value_codes;
  CodeTable value_table;
  // [count, width] each, or null: key * cos + rotate_half(key) * sin, which pairs channel c with
  // c + width / 2. Batch rows are rope_stride numbers apart.
  const void* cos;
  const void* sin;
  std::size_t rope_stride;
  const std::uint8_t* mask;  // [batch, count], 0 = hidden, or null
  Storage angles = Storage::kFloat32;
};

// What was found of the codes of visible tokens.
enum class CodesFound { kGood, kBadKeyCode, kBadValueCode };

void attention(const Queries& queries, const DenseKeys& dense);

// Nothing outside a table is read. Unless all codes are below their table's codewords, out and lse
// are not to be used.
CodesFound coded_attention(const Queries& queries, const CodedKeys& coded);

// Both in one softmax: dense keys first, coded ones after them.
CodesFound mixed_attention(const Queries& queries, const DenseKeys& dense, const CodedKeys& coded);

// Names of what this machine runs, narrowest first.
std::vector<std::string> attention_isas();

// Whether this machine multiplies what may be rounded at twice the rate.
bool attention_rounds();

}  // namespace astra
