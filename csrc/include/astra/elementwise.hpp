// What a Transformer block computes between its products, each in one pass over memory: RMS norm,
// the gate of an MLP, rotary positions, two partial softmaxes that become one, whether values are
// finite, codes that become codewords. This header is the contract.
//
// Everything is fp32. NaN and infinities go through the formulas. An answer depends on its own row
// alone, not on the number of threads; between instruction sets only sums may differ, by rounding.
// Nothing is allocated, any alignment will do, everything may be called concurrently.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace astra {

// out = weight * x / sqrt(mean x^2 + eps), row by row; x and out [rows, width], weight [width].
void rms_norm(const float* x, const float* weight, std::size_t rows, std::size_t width, float eps,
              float* out, unsigned threads = 1);

// out = gate / (1 + exp(-gate)) * up, all [count]. `out` may be `gate` or `up`. Right to a
// relative 3e-7; below a gate of -87 out is 0.
void gated_silu(const float* gate, const float* up, std::size_t count, float* out,
                unsigned threads = 1);

// A tensor [batch, heads, tokens, width]: floats from a batch row, a head and a token to the next.
using RowStrides = std::array<std::size_t, 3>;

struct RotateShape {
  std::size_t batch, heads, tokens;
  std::size_t width;         // even
  std::size_t angle_stride;  // floats from a batch row of cos and sin to the next; 0: one for all
};

// Rotary positions, rotate-half convention, by cos and sin [tokens, width] of each batch row:
// with x = [a, b] in halves, out = x * cos + [-b, a] * sin, every step rounded. `out` may be `x`
// with its strides. Throws std::invalid_argument where the width is odd.
void rotate(const float* x, const RowStrides& x_strides, const float* cos, const float* sin,
            const RotateShape& shape, float* out, const RowStrides& out_strides,
            unsigned threads = 1);

// lse = ln(exp lse_a + exp lse_b), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b, row by
// row; outs [rows, width], lses [rows], natural logarithms. A side whose lse is -inf has no say,
// whatever its out holds; two such sides give out 0 and lse -inf. An lse that is NaN or +inf gives
// NaN.
void merge_state(const float* out_a, const float* lse_a, const float* out_b, const float* lse_b,
                 std::size_t rows, std::size_t width, float* out, float* lse, unsigned threads = 1);

// The outs [batch, heads, tokens, width] and lses [batch, heads, tokens] of a partial softmax.
struct PartialState {
  float* out;
  RowStrides out_strides;
  float* lse;
  RowStrides lse_strides;
};

struct StateShape {
  std::size_t batch, heads, tokens, width;
};

// The same where rows lie anywhere: `one` becomes the merged state, `other` is only read.
void merge_into(const PartialState& one, const PartialState& other, const StateShape& shape,
                unsigned threads = 1);

// Whether x [batch, heads, tokens, width] holds neither NaN nor an infinity.
bool all_finite(const float* x, const RowStrides& strides, const StateShape& shape);

// out[n, g] = tables[g, codes[n, g]] with codes [rows, groups], tables [groups, codewords, width],
// out [rows, groups, width]. Codes below 0 or from `codewords` on: returns false, and what `out`
// holds is unspecified; nothing outside of `tables` is read.
bool look_up(const std::int32_t* codes, const float* tables, std::size_t rows, std::size_t groups,
             std::size_t codewords, std::size_t width, float* out);

// out[n] += the sum over g of tables[g, codes[n, g]], with codes [rows, groups], tables of bfloat16
// [groups, codewords, width] and out [rows, width]. A code below 0 adds nothing. Codes from
// `codewords` on: returns false, and `out` is as it was.
bool add_rows(const std::int32_t* codes, const std::uint16_t* tables, std::size_t rows,
              std::size_t groups, std::size_t codewords, std::size_t width, float* out,
              unsigned threads = 1);

}  // namespace astra
