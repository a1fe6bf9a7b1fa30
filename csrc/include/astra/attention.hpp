// Softmax attention in fp32, over keys and values that are dense or known by their codes. This
// header is the contract.
//
// For every query q of batch row b and head h, over the keys k_n and values v_n of KV head
// h / (heads / kv_heads) that it sees:
//   out = sum_n exp(scale * q.k_n - lse) v_n,   lse = ln sum_n exp(scale * q.k_n)
// A query that sees nothing has out 0 and lse -inf. A score that is NaN makes out and lse NaN, and
// so does +inf. What hidden keys and values hold never matters.
//
// Sums are taken in an order that depends on the instruction set and the shape; on one machine the
// same call gives the same bits, whatever the number of threads.
//
// Strides are in floats; the channels of a row are adjacent. Inputs and outputs must not overlap;
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
  std::size_t width;  // channels of a query, a key, a value
};

struct HeadStrides {
  std::size_t batch;
  std::size_t head;
  std::size_t row;
};

struct Queries {
  AttentionShape shape;
  const float* query;  // [batch, heads, rows, width]
  HeadStrides query_strides;
  float* out;  // [batch, heads, rows, width]
  HeadStrides out_strides;
  float* lse;  // [batch, heads, rows], contiguous
  float scale;
  // At most so many work on it, this one among them.
  unsigned threads = 1;
  // One of attention_isas(); empty: the widest.
  const char* isa = "";
};

struct DenseKeys {
  std::size_t count;
  const float* keys;  // [batch, kv_heads, count, width]
  HeadStrides key_strides;
  const float* values;  // as keys
  HeadStrides value_strides;
  const std::uint8_t* mask;  // [batch, count], 0 = hidden, or null
  // Query m sees keys 0 .. count - rows + m (bottom-right aligned); needs rows <= count.
  bool is_causal;
};

void attention(const Queries& queries, const DenseKeys& dense);

// Names of what this machine runs, narrowest first.
std::vector<std::string> attention_isas();

}  // namespace astra
