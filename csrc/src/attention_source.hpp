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
};

class KeySource {
 public:
  virtual ~KeySource() = default;

  virtual std::size_t count() const = 0;
  virtual const std::uint8_t* mask() const = 0;
  virtual bool is_causal() const = 0;
  // Visible keys [first, first + count) of a batch row. `scratch` has room for 2 * kTileKeys *
  // width floats. `in_place`: rows at any distance will do, as each is read as a whole.
  virtual KeyTile tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
                       std::size_t first, std::size_t count, bool in_place,
                       float* scratch) const = 0;
};

class DenseSource final : public KeySource {
 public:
  DenseSource(const DenseKeys& dense, const AttentionShape& shape) : dense_(dense), shape_(shape) {}

  std::size_t count() const override { return dense_.count; }
  const std::uint8_t* mask() const override { return dense_.mask; }
  bool is_causal() const override { return dense_.is_causal; }
  KeyTile tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
               std::size_t first, std::size_t count, bool in_place, float* scratch) const override;

 private:
  const DenseKeys& dense_;
  const AttentionShape& shape_;
};

class CodedSource final : public KeySource {
 public:
  using Rotate = void (*)(float* key, const float* cos, const float* sin, std::size_t width);

  // Throws std::invalid_argument if numbers of codes, groups and bits do not fit.
  CodedSource(const CodedKeys& coded, const AttentionShape& shape, Rotate rotate);

  std::size_t count() const override { return coded_.count; }
  const std::uint8_t* mask() const override { return coded_.mask; }
  bool is_causal() const override { return false; }
  KeyTile tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
               std::size_t first, std::size_t count, bool in_place, float* scratch) const override;

  CodesFound found() const { return found_.load(); }

 private:
  const CodedKeys& coded_;
  const AttentionShape& shape_;
  Rotate rotate_;
  // Set by whichever thread meets a code that no table has.
  mutable std::atomic<CodesFound> found_{CodesFound::kGood};
};

}  // namespace astra::detail
