// Where tiles of keys and values come from: dense memory, or codes and their tables.

#pragma once

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
  DenseSource(const DenseKeys& dense, std::size_t width) : dense_(dense), width_(width) {}

  std::size_t count() const override { return dense_.count; }
  const std::uint8_t* mask() const override { return dense_.mask; }
  bool is_causal() const override { return dense_.is_causal; }
  KeyTile tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
               std::size_t first, std::size_t count, bool in_place, float* scratch) const override;

 private:
  const DenseKeys& dense_;
  std::size_t width_;
};

}  // namespace astra::detail
