// The seam between attention.cpp and its inner loops, one table of functions per instruction set.
//
// Queries stand side by side: a panel holds up to three vectors of them, channel after channel, so
// that every product is a vector of queries times one number of a key or a value. Keys and values
// are read as they lie, softmax needs nothing across lanes, and products run at the speed of a
// matrix product. Where there are fewer queries than lanes, `absorb_few` puts channels side by side
// instead and reads every key once for all queries.
//
// Scores are logarithms to the base 2: queries come multiplied by scale * log2(e).

#pragma once

#include <cstddef>
#include <cstdint>

#include "astra/attention.hpp"

namespace astra::detail {

// Keys that are worked on at once; their weights stay in L1.
inline constexpr std::size_t kTileKeys = 64;
// Queries of one `absorb_few`.
inline constexpr std::size_t kMostFew = 8;
inline constexpr std::size_t kMostPanelVectors = 3;
// Lanes of the widest instruction set.
inline constexpr std::size_t kMostLanes = 16;

// Keys and values of consecutive places in the sequence of visible keys.
struct KeyTile {
  const float* keys;  // [count, width], rows `key_stride` floats apart
  std::size_t key_stride;
  const float* values;  // [count, value_width], rows `value_stride` floats apart
  std::size_t value_stride;
  std::size_t first;  // place of the first key
  std::size_t count;  // at most kTileKeys
};

// Rows at one distance from each other. A processor that knows where they are reads them ahead;
// behind a list of addresses it does not.
struct EvenRows {
  const float* first;
  std::size_t stride;

  const float* operator[](std::size_t k) const { return first + k * stride; }
};

// The same as rows, each read as a whole.
struct KeyRows {
  const float* const* keys;  // [count], or null: `even_keys`
  // [count], or null: `even_values`, unless there are codes.
  const float* const* values;
  // [count], or null. If not, weights are summed by codeword, as FewRows has it.
  const std::uint32_t* value_codes;
  // [count] each, or null: angles by which keys are still to be rotated, as `gather` does.
  const float* const* cos;
  const float* const* sin;
  std::size_t first;
  std::size_t count;
  EvenRows even_keys;
  EvenRows even_values;
};

// The online-softmax state of queries that stand side by side.
struct Panel {
  std::size_t vectors;  // 1 to kMostPanelVectors
  std::size_t width;    // channels of queries and keys
  std::size_t value_width;
  float* queries;        // [width, vectors * lanes]; pairs of channels, where keys are rounded
  float* out;            // [value_width, vectors * lanes], not yet divided by `sum`
  float* max;            // m_i: [vectors * lanes]
  float* sum;            // l_i: [vectors * lanes]
  std::int32_t* limits;  // [vectors * lanes]: query r sees the first limits[r] keys
  std::size_t least;     // of the limits
  std::size_t most;      // of the limits
};

// The same for at most kMostFew queries whose channels stand side by side.
struct FewRows {
  std::size_t rows;
  std::size_t width;
  std::size_t value_width;
  std::size_t stride;      // `width` rounded up to whole vectors
  std::size_t out_stride;  // `value_width` rounded up to whole vectors
  // Vectors of `lanes` channels; the last one of a row ends at its last channel, and what it
  // repeats of the one before is 0 in queries.
  float* queries;  // [rows, stride]
  float* out;      // [rows, out_stride]
  float* max;      // [rows]
  float* sum;      // [rows]
  std::int32_t* limits;
  std::size_t most;
  // Where keys outnumber codewords, the weights of equal values are summed before these are read.
  float* by_codeword;   // [rows / 4 rounded up, codewords, 4], scaled as `out` is
  std::uint8_t* used;   // [codewords]: not 0 if a visible key has it
  std::uint32_t* list;  // room for `codewords` of them
  std::size_t codewords;
};

struct AttentionKernels {
  const char* name;
  std::size_t lanes;
  // rows[r] points at query r; `factor` is multiplied in. Starts the state too, but for limits.
  void (*load)(const float* const* rows, std::size_t count, float factor, const Panel& panel);
  // One step of online softmax. `weights` has room for kTileKeys * vectors * lanes floats.
  void (*absorb)(const Panel& panel, const KeyTile& tile, float* weights);
  // out[r] points at the value_width channels of query r's output.
  void (*store)(const Panel& panel, std::size_t count, float* const* out);
  // `weights` has room for kMostFew * kTileKeys floats. Keys are rotated only if half their width
  // is a multiple of `lanes`.
  void (*absorb_few)(const FewRows& few, const KeyRows& rows, float* weights);
  // out += the weights by codeword times `values`, [codewords, value_width].
  void (*absorb_codewords)(const FewRows& few, const float* values);
  // Rows one after another in `keys` and `values`, where they may be already; values only if they
  // are rows. Keys become
  // key * cos + rotate_half(key) * sin; rotate_half pairs channel c with c + width / 2.
  void (*gather)(const KeyRows& rows, std::size_t width, std::size_t value_width, float* keys,
                 float* values);
  // to = the sums of `stages` vectors each, `parts` side by side: words[stage * parts + part].
  void (*compose)(const float* const* words, std::size_t stages, std::size_t parts,
                  std::size_t width, float* to);
  // `count` numbers of half precision as floats, and floats rounded to them; bf16, or fp16.
  void (*widen)(const std::uint16_t* from, std::size_t count, bool is_bfloat16, float* to);
  void (*narrow)(const float* from, std::size_t count, bool is_bfloat16, std::uint16_t* to);
  // Null, or what makes a tile that `absorb` takes of one of floats: `room` has rounded_floats().
  KeyTile (*round)(const KeyTile& tile, std::size_t width, std::size_t value_width, float* room);
};

// Pairs of adjacent channels of keys, and of the same channel of adjacent values; and of each a
// vector more.
inline std::size_t rounded_floats(std::size_t width, std::size_t value_width) {
  return kTileKeys * ((width + 1) / 2) + kTileKeys / 2 * value_width + 2 * kMostLanes;
}

// Rows of a call's queries, outputs, dense keys and values, as they are stored.
struct Rows {
  const AttentionKernels& kernels;
  Storage storage;

  bool are_floats() const { return storage == Storage::kFloat32; }

  // `width` numbers from `offset` on: where they are, or in `room` if they are no floats.
  const float* read(const void* from, std::size_t offset, std::size_t width, float* room) const {
    if (are_floats()) return static_cast<const float*>(from) + offset;
    const auto* halves = static_cast<const std::uint16_t*>(from) + offset;
    kernels.widen(halves, width, storage == Storage::kBfloat16, room);
    return room;
  }

  // Where to write a row: in its place, or in `room`, from where `finish` takes it there.
  float* start(void* to, std::size_t offset, float* room) const {
    return are_floats() ? static_cast<float*>(to) + offset : room;
  }
  void finish(const float* row, std::size_t width, void* to, std::size_t offset) const {
    if (are_floats()) return;
    auto* halves = static_cast<std::uint16_t*>(to) + offset;
    kernels.narrow(row, width, storage == Storage::kBfloat16, halves);
  }
};

// As in bitpack_kernel.hpp, each has a translation unit and flags of its own, and no inline code in
// common.
extern const AttentionKernels kAttentionPortable;
#ifdef ASTRA_HAVE_AVX2
extern const AttentionKernels kAttentionAvx2;
#endif
#ifdef ASTRA_HAVE_AVX512
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionBfloat16;
#endif

}  // namespace astra::detail
