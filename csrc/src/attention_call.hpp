// What the units of one attention call share: the call, places of queries, working memory.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "arena.hpp"
#include "attention_kernel.hpp"
#include "attention_source.hpp"

namespace astra::detail {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline std::size_t in_lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

// Hands out pieces of an arena, each from a cache line on. Without memory it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<float*>(memory)) {}

  float* floats(std::size_t count) {
    float* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += in_lines(count);
    return piece;
  }
  std::int32_t* integers(std::size_t count) {
    return reinterpret_cast<std::int32_t*>(floats(count));
  }
  std::size_t bytes() const { return used_ * sizeof(float); }

 private:
  float* memory_;
  std::size_t used_ = 0;
};

// Floats that hold `count` things of `size` bytes.
inline std::size_t floats_for(std::size_t count, std::size_t size) {
  return (count * size + sizeof(float) - 1) / sizeof(float);
}

// Everything that the units of one call share.
struct Call {
  const Queries& queries;
  const AttentionKernels& kernels;
  const KeySource* const* sources;
  std::size_t source_count;
  // Of every source and batch row; the places of masked ones.
  const VisibleKeys* visible;
  std::size_t group;  // query heads of a KV head
  bool few;
  std::size_t panels;           // of a KV head
  std::size_t panels_of_block;  // of a unit
  std::size_t blocks;           // of a KV head
  std::size_t heads_of_unit;    // KV heads
  std::atomic<bool> out_of_memory{false};

  std::size_t folded_rows() const { return group * queries.shape.rows; }
  Rows stored() const { return {kernels, queries.storage}; }
};

struct Place {
  std::size_t batch;
  std::size_t head;
  std::size_t row;
};

// The queries of a KV head from number `index` on: heads vary fastest, so that under a causal mask
// the queries of a panel see much the same keys. One division for all of them.
class Places {
 public:
  Places(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t index)
      : group_(call.group),
        in_group_(index % group_),
        place_{batch, kv_head * group_ + in_group_, index / group_} {}

  const Place& operator*() const { return place_; }

  void operator++() {
    ++place_.head;
    if (++in_group_ < group_) return;
    place_.head -= group_;
    ++place_.row;
    in_group_ = 0;
  }

 private:
  std::size_t group_;
  std::size_t in_group_;
  Place place_;
};

inline std::size_t offset(const HeadStrides& strides, const Place& place) {
  return place.batch * strides.batch + place.head * strides.head + place.row * strides.row;
}

// How many of the visible keys a query sees, `row` of `rows`.
inline std::size_t seen_by(const KeySource& source, const VisibleKeys& visible, std::size_t rows,
                           std::size_t row) {
  if (!source.is_causal()) return visible.count;
  const std::size_t reach = source.count() + row + 1 > rows ? source.count() + row + 1 - rows : 0;
  if (visible.places == nullptr) return reach;
  const std::int32_t* end = visible.places + visible.count;
  const auto bound = static_cast<std::int32_t>(reach);
  return static_cast<std::size_t>(std::lower_bound(visible.places, end, bound) - visible.places);
}

inline float lse_of(float max, float sum) {
  if (sum == 0.0F) return -kInfinity;
  return static_cast<float>(kLn2 * static_cast<double>(max) + std::log(static_cast<double>(sum)));
}

inline void store_lse(const Call& call, const Place& place, float max, float sum) {
  const AttentionShape& shape = call.queries.shape;
  call.queries.lse[(place.batch * shape.heads + place.head) * shape.rows + place.row] =
      lse_of(max, sum);
}

inline float score_factor(const Call& call) {
  return static_cast<float>(static_cast<double>(call.queries.scale) * kLog2E);
}

// m_i and l_i of a query that has seen its head's sink alone; without one it is -inf.
inline void start_at_sink(float sink, float& max, float& sum) {
  max = static_cast<float>(static_cast<double>(sink) * kLog2E);
  sum = sink == -kInfinity ? 0.0F : 1.0F;
}

// Of the source that asks for most: each has room for as many queries and outputs as a panel has.
inline std::size_t scratch_floats(const Call& call) {
  std::size_t most = 0;
  for (std::size_t s = 0; s < call.source_count; ++s) {
    most = std::max(most, call.sources[s]->scratch_floats());
  }
  return most;
}

// How many panels so many queries fill.
std::size_t panel_count(std::size_t rows, std::size_t lanes);

// Queries of a KV head in panels: a block of them goes through all keys together.
void attend_block(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t block,
                  Arena& arena);

// All queries of KV heads [kv_head, kv_head + heads), where they are few.
void attend_few(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t heads,
                Arena& arena);

}  // namespace astra::detail
