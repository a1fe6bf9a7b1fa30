// Where tiles of keys and values come from: dense memory, or codes and their tables.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "astra/attention.hpp"
#include "attention_kernel.hpp"

namespace astra::detail {

// The visible keys of a batch row, in order.
struct VisibleKeys {
  const std::int32_t* places;  // null: all
  std::size_t count;

  std::size_t place(std::size_t key) const {
    return places == nullptr ? key : static_cast<std::size_t>(places[key]);
  }
};

// Which visible keys of which head: at most kTileKeys from `first` on.
struct TilePlace {
  std::size_t batch;
  std::size_t kv_head;
  const VisibleKeys* visible;
  std::size_t first;
  std::size_t count;
};

// Room for a tile.
struct TileMemory {
  float* scratch;  // scratch_floats() of the source
  const float* keys[kTileKeys];
  const float* values[kTileKeys];
  const float* cos[kTileKeys];
  const float* sin[kTileKeys];
  std::uint32_t codes[kTileKeys];
  std::uint32_t value_codes[kTileKeys];
};

class KeySource {
 public:
  virtual ~KeySource() = default;

  virtual std::size_t count() const = 0;
  virtual const std::uint8_t* mask() const = 0;
  virtual bool is_causal() const = 0;
  // Whether heads read the same memory: a tile is then read for all of them before the next one.
  virtual bool is_shared() const = 0;
  virtual std::size_t scratch_floats() const = 0;
  virtual KeyTile tile(const TilePlace& place, TileMemory& memory) const = 0;
  // `as_codes`: values by their codes, where by_codeword() allows it.
  virtual KeyRows rows(const TilePlace& place, TileMemory& memory, bool as_codes) const = 0;
  // How many values there are if it pays to sum the weights of equal ones, for `keys` visible keys;
  // else 0.
  virtual std::size_t by_codeword(std::size_t keys) const = 0;
  // All values of a head that codes mean.
  virtual const float* codewords(std::size_t kv_head) const = 0;
};

class DenseSource final : public KeySource {
 public:
  DenseSource(const DenseKeys& dense, const AttentionShape& shape, const Rows& stored)
      : dense_(dense), shape_(shape), stored_(stored) {}

  std::size_t count() const override { return dense_.count; }
  const std::uint8_t* mask() const override { return dense_.mask; }
  bool is_causal() const override { return dense_.is_causal; }
  bool is_shared() const override { return false; }
  std::size_t scratch_floats() const override;
  KeyTile tile(const TilePlace& place, TileMemory& memory) const override;
  KeyRows rows(const TilePlace& place, TileMemory& memory, bool as_codes) const override;
  std::size_t by_codeword(std::size_t /*keys*/) const override { return 0; }
  const float* codewords(std::size_t /*kv_head*/) const override { return nullptr; }

 private:
  const DenseKeys& dense_;
  const AttentionShape& shape_;
  Rows stored_;
};

class CodedSource final : public KeySource {
 public:
  // Throws std::invalid_argument if numbers of codes, groups and bits do not fit.
  CodedSource(const CodedKeys& coded, const AttentionShape& shape, const AttentionKernels& kernels);

  std::size_t count() const override { return coded_.count; }
  const std::uint8_t* mask() const override { return coded_.mask; }
  bool is_causal() const override { return false; }
  bool is_shared() const override { return true; }
  std::size_t scratch_floats() const override;
  KeyTile tile(const TilePlace& place, TileMemory& memory) const override;
  KeyRows rows(const TilePlace& place, TileMemory& memory, bool as_codes) const override;
  std::size_t by_codeword(std::size_t keys) const override;
  const float* codewords(std::size_t kv_head) const override;

  CodesFound found() const { return found_.load(); }

 private:
  KeyRows find(const TilePlace& place, TileMemory& memory, bool as_codes) const;
  std::size_t angle_of(const TilePlace& place, std::size_t k) const;
  std::size_t floats_of_rows() const;
  std::size_t floats_of_angles() const;
  KeyRows with_angles(KeyRows rows, const TilePlace& place, TileMemory& memory) const;

  const CodedKeys& coded_;
  const AttentionShape& shape_;
  const AttentionKernels& kernels_;
  Rows angles_;
  // Set by whichever thread meets a code that no table has.
  mutable std::atomic<CodesFound> found_{CodesFound::kGood};
};

}  // namespace astra::detail
