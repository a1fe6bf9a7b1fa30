#include "attention_source.hpp"

#include <cstring>

namespace astra::detail {
namespace {

// Rows at this distance fall on few sets of the L1 cache; the products read eight at once.
constexpr std::size_t kCrowding = 2048;

bool crowds(std::size_t stride, std::size_t width) {
  return stride != width && stride * sizeof(float) % kCrowding == 0;
}

void copy_rows(const float* from, std::size_t stride, const VisibleKeys& visible, std::size_t first,
               std::size_t count, std::size_t width, float* to) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t place =
        visible.places == nullptr ? first + k : static_cast<std::size_t>(visible.places[first + k]);
    std::memcpy(to + k * width, from + place * stride, width * sizeof(float));
  }
}

}  // namespace

KeyTile DenseSource::tile(std::size_t batch, std::size_t kv_head, const VisibleKeys& visible,
                          std::size_t first, std::size_t count, bool in_place,
                          float* scratch) const {
  const float* bases[2] = {dense_.keys, dense_.values};
  const HeadStrides* strides[2] = {&dense_.key_strides, &dense_.value_strides};
  const float* rows[2];
  std::size_t row_strides[2];
  for (std::size_t i = 0; i < 2; ++i) {
    const float* base = bases[i] + batch * strides[i]->batch + kv_head * strides[i]->head;
    const std::size_t stride = strides[i]->row;
    if (visible.places != nullptr || (!in_place && crowds(stride, width_))) {
      float* to = scratch + i * kTileKeys * width_;
      copy_rows(base, stride, visible, first, count, width_, to);
      rows[i] = to;
      row_strides[i] = width_;
    } else {
      rows[i] = base + first * stride;
      row_strides[i] = stride;
    }
  }
  return {rows[0], row_strides[0], rows[1], row_strides[1], first, count};
}

}  // namespace astra::detail
