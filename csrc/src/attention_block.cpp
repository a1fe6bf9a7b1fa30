// Queries in panels: a block of them goes through all tiles of keys together.

#include <algorithm>

#include "attention_call.hpp"

namespace astra::detail {

std::size_t panel_count(std::size_t rows, std::size_t lanes) {
  const std::size_t vectors = (rows + lanes - 1) / lanes;
  return (vectors + kMostPanelVectors - 1) / kMostPanelVectors;
}

namespace {

// The vectors of panel `index`: full ones, and at the end 2 and 2 rather than 3 and 1.
struct PanelRange {
  std::size_t first;  // query
  std::size_t count;
  std::size_t vectors;
};

PanelRange panel_range(std::size_t rows, std::size_t lanes, std::size_t index) {
  const std::size_t vectors = (rows + lanes - 1) / lanes;
  const std::size_t panels = panel_count(rows, lanes);
  const bool split = vectors % kMostPanelVectors == 1 && panels > 1;
  std::size_t first = index * kMostPanelVectors;
  std::size_t wide = std::min(kMostPanelVectors, vectors - first);
  if (split && index + 2 >= panels) {
    first -= index + 1 == panels ? 1 : 0;
    wide = 2;
  }
  const std::size_t row = first * lanes;
  return {row, std::min(wide * lanes, rows - row), wide};
}

struct BlockState {
  Panel* panels;
  PanelRange* ranges;
  float* weights;
  float* scratch;
  float* rounded;
};

BlockState lay_out(const Call& call, Pieces& pieces) {
  const std::size_t width = call.queries.shape.width;
  const std::size_t value_width = call.queries.shape.value_width;
  const std::size_t most = kMostPanelVectors * call.kernels.lanes;
  BlockState state{};
  state.panels =
      reinterpret_cast<Panel*>(pieces.floats(floats_for(call.panels_of_block, sizeof(Panel))));
  state.ranges = reinterpret_cast<PanelRange*>(
      pieces.floats(floats_for(call.panels_of_block, sizeof(PanelRange))));
  for (std::size_t i = 0; i < call.panels_of_block; ++i) {
    Panel panel{};
    panel.queries = pieces.floats(width * most);
    panel.out = pieces.floats(value_width * most);
    panel.max = pieces.floats(most);
    panel.sum = pieces.floats(most);
    panel.limits = pieces.integers(most);
    if (state.panels != nullptr) new (state.panels + i) Panel(panel);
  }
  state.weights = pieces.floats(kTileKeys * most);
  state.scratch = pieces.floats(scratch_floats(call));
  const bool rounds = call.kernels.round != nullptr;
  state.rounded = pieces.floats(rounds ? rounded_floats(width, value_width) : 0);
  return state;
}

constexpr std::size_t kMostPanelRows = kMostPanelVectors * kMostLanes;
static_assert(kMostPanelRows <= kTileKeys, "a tile's scratch has room for the rows of a panel");

void start_panel(const Call& call, std::size_t batch, std::size_t kv_head, const PanelRange& range,
                 Panel& panel, float* scratch) {
  const Rows stored = call.stored();
  const float* rows[kMostPanelRows];
  panel.vectors = range.vectors;
  panel.width = call.queries.shape.width;
  panel.value_width = call.queries.shape.value_width;
  Places place(call, batch, kv_head, range.first);
  for (std::size_t i = 0; i < range.count; ++i, ++place) {
    const std::size_t at = offset(call.queries.query_strides, *place);
    rows[i] = stored.read(call.queries.query, at, panel.width, scratch + i * panel.width);
  }
  call.kernels.load(rows, range.count, score_factor(call), panel);
  if (call.queries.sinks == nullptr) return;
  Places place_again(call, batch, kv_head, range.first);
  for (std::size_t i = 0; i < range.count; ++i, ++place_again) {
    start_at_sink(call.queries.sinks[(*place_again).head], panel.max[i], panel.sum[i]);
  }
}

void limit_panel(const Call& call, const KeySource& source, const VisibleKeys& visible,
                 const PanelRange& range, Panel& panel) {
  const std::size_t rows = call.queries.shape.rows;
  const std::size_t wide = panel.vectors * call.kernels.lanes;
  Places place(call, 0, 0, range.first);
  panel.least = seen_by(source, visible, rows, (*place).row);
  std::size_t limit = panel.least;
  std::size_t row = (*place).row;
  for (std::size_t i = 0; i < range.count; ++i, ++place) {
    if ((*place).row != row) {
      row = (*place).row;
      limit = seen_by(source, visible, rows, row);
    }
    panel.limits[i] = static_cast<std::int32_t>(limit);
  }
  panel.most = limit;
  std::fill(panel.limits + range.count, panel.limits + wide, static_cast<std::int32_t>(limit));
}

void finish_panel(const Call& call, std::size_t batch, std::size_t kv_head, const PanelRange& range,
                  const Panel& panel, float* scratch) {
  const Rows stored = call.stored();
  float* out[kMostPanelRows];
  std::size_t places[kMostPanelRows];
  Places place(call, batch, kv_head, range.first);
  for (std::size_t i = 0; i < range.count; ++i, ++place) {
    places[i] = offset(call.queries.out_strides, *place);
    out[i] = stored.start(call.queries.out, places[i], scratch + i * panel.value_width);
    store_lse(call, *place, panel.max[i], panel.sum[i]);
  }
  call.kernels.store(panel, range.count, out);
  for (std::size_t i = 0; i < range.count; ++i) {
    stored.finish(out[i], panel.value_width, call.queries.out, places[i]);
  }
}

}  // namespace

void attend_block(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t block,
                  Arena& arena) {
  Pieces size(nullptr);
  lay_out(call, size);
  Pieces pieces(arena.reserve(size.bytes()));
  const BlockState state = lay_out(call, pieces);
  const std::size_t first = block * call.panels_of_block;
  const std::size_t count = std::min(call.panels_of_block, call.panels - first);
  for (std::size_t i = 0; i < count; ++i) {
    state.ranges[i] = panel_range(call.folded_rows(), call.kernels.lanes, first + i);
    start_panel(call, batch, kv_head, state.ranges[i], state.panels[i], state.scratch);
  }
  TileMemory memory;
  memory.scratch = state.scratch;
  for (std::size_t s = 0; s < call.source_count; ++s) {
    const KeySource& source = *call.sources[s];
    const VisibleKeys& visible = call.visible[s * call.queries.shape.batch + batch];
    std::size_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
      limit_panel(call, source, visible, state.ranges[i], state.panels[i]);
      most = std::max(most, state.panels[i].most);
    }
    for (std::size_t key = 0; key < most; key += kTileKeys) {
      const TilePlace place{batch, kv_head, &visible, key, std::min(kTileKeys, most - key)};
      KeyTile tile = source.tile(place, memory);
      if (call.kernels.round != nullptr) {
        const AttentionShape& shape = call.queries.shape;
        tile = call.kernels.round(tile, shape.width, shape.value_width, state.rounded);
      }
      for (std::size_t i = 0; i < count; ++i) {
        call.kernels.absorb(state.panels[i], tile, state.weights);
      }
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    finish_panel(call, batch, kv_head, state.ranges[i], state.panels[i], state.scratch);
  }
}

}  // namespace astra::detail
