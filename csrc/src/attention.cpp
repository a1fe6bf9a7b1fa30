// Checks, the split into units of work, and the states; the loops are in attention_loop.inl.

#include "astra/attention.hpp"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "attention_kernel.hpp"
#include "attention_source.hpp"
#include "pool.hpp"

namespace astra {
namespace {

using detail::AttentionKernels;
using detail::FewRows;
using detail::KeySource;
using detail::KeyTile;
using detail::kMostFew;
using detail::kMostPanelVectors;
using detail::kTileKeys;
using detail::Panel;
using detail::VisibleKeys;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Floats of queries and outputs that go through the keys together: they stay in L2.
constexpr std::size_t kBlockFloats = 48 * 1024;
constexpr double kWorthAThread = 4e6;  // multiplications; waking a thread costs some 20 us
constexpr std::size_t kLine = 64;

std::vector<const AttentionKernels*> runnable() {
  std::vector<const AttentionKernels*> kernels{&detail::kAttentionPortable};
#ifdef ASTRA_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back(&detail::kAttentionAvx2);
  }
#endif
#ifdef ASTRA_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f")) kernels.push_back(&detail::kAttentionAvx512);
#endif
  return kernels;
}

const AttentionKernels& choose(const std::string& isa) {
  static const std::vector<const AttentionKernels*> kernels = runnable();
  if (isa.empty()) return *kernels.back();
  for (const AttentionKernels* kernel : kernels) {
    if (isa == kernel->name) return *kernel;
  }
  throw std::invalid_argument("isa must be one of attention_isas(), got '" + isa + "'");
}

// Memory that only grows, for one thread.
class Arena {
 public:
  // Aligned to a cache line. What was in it is lost.
  void* reserve(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kLine))));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(kLine)); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

constexpr std::size_t in_lines(std::size_t floats) { return (floats + 15) / 16 * 16; }

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

// Everything that the units of one call share.
struct Call {
  const Queries& queries;
  const AttentionKernels& kernels;
  const KeySource* const* sources;
  std::size_t source_count;
  // Of every source and batch row; the places of masked ones.
  const VisibleKeys* visible;
  bool few;
  std::size_t panels;           // of a KV head
  std::size_t panels_of_block;  // of a unit
  std::size_t blocks;           // of a KV head
  std::atomic<bool> out_of_memory{false};

  std::size_t group() const { return queries.shape.heads / queries.shape.kv_heads; }
  std::size_t folded_rows() const { return group() * queries.shape.rows; }
};

// Query number `index` of a KV head: heads vary fastest, so that under a causal mask the queries of
// a panel see much the same keys.
struct Place {
  std::size_t batch;
  std::size_t head;
  std::size_t row;
};

Place place_of(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t index) {
  const std::size_t group = call.group();
  return {batch, kv_head * group + index % group, index / group};
}

std::size_t offset(const HeadStrides& strides, const Place& place) {
  return place.batch * strides.batch + place.head * strides.head + place.row * strides.row;
}

std::size_t seen_by(const KeySource& source, const VisibleKeys& visible, std::size_t rows,
                    std::size_t row) {
  if (!source.is_causal()) return visible.count;
  const std::size_t reach = source.count() + row + 1 > rows ? source.count() + row + 1 - rows : 0;
  if (visible.places == nullptr) return reach;
  const std::int32_t* end = visible.places + visible.count;
  const auto bound = static_cast<std::int32_t>(reach);
  return static_cast<std::size_t>(std::lower_bound(visible.places, end, bound) - visible.places);
}

float lse_of(float max, float sum) {
  if (sum == 0.0F) return -kInfinity;
  return static_cast<float>(kLn2 * static_cast<double>(max) + std::log(static_cast<double>(sum)));
}

void store_lse(const Call& call, const Place& place, float max, float sum) {
  const AttentionShape& shape = call.queries.shape;
  call.queries.lse[(place.batch * shape.heads + place.head) * shape.rows + place.row] =
      lse_of(max, sum);
}

float score_factor(const Call& call) {
  return static_cast<float>(static_cast<double>(call.queries.scale) * kLog2E);
}

// The vectors of panel `index`: full ones, and at the end 2 and 2 rather than 3 and 1.
struct PanelRange {
  std::size_t first;  // query
  std::size_t count;
  std::size_t vectors;
};

std::size_t panel_count(std::size_t rows, std::size_t lanes) {
  const std::size_t vectors = (rows + lanes - 1) / lanes;
  return (vectors + kMostPanelVectors - 1) / kMostPanelVectors;
}

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
};

std::size_t bytes_of(std::size_t count, std::size_t size) {
  return (count * size + sizeof(float) - 1) / sizeof(float);
}

BlockState lay_out(const Call& call, Pieces& pieces) {
  const std::size_t width = call.queries.shape.width;
  const std::size_t value_width = call.queries.shape.value_width;
  const std::size_t most = kMostPanelVectors * call.kernels.lanes;
  BlockState state{};
  state.panels =
      reinterpret_cast<Panel*>(pieces.floats(bytes_of(call.panels_of_block, sizeof(Panel))));
  state.ranges = reinterpret_cast<PanelRange*>(
      pieces.floats(bytes_of(call.panels_of_block, sizeof(PanelRange))));
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
  state.scratch = pieces.floats(kTileKeys * (width + value_width));
  return state;
}

void start_at_sink(float sink, float& max, float& sum) {
  max = static_cast<float>(static_cast<double>(sink) * kLog2E);
  sum = sink == -kInfinity ? 0.0F : 1.0F;
}

void start_panel(const Call& call, std::size_t batch, std::size_t kv_head, const PanelRange& range,
                 Panel& panel) {
  const float* rows[kMostPanelVectors * 16];
  panel.vectors = range.vectors;
  panel.width = call.queries.shape.width;
  panel.value_width = call.queries.shape.value_width;
  for (std::size_t i = 0; i < range.count; ++i) {
    const Place place = place_of(call, batch, kv_head, range.first + i);
    rows[i] = call.queries.query + offset(call.queries.query_strides, place);
  }
  call.kernels.load(rows, range.count, score_factor(call), panel);
  if (call.queries.sinks == nullptr) return;
  for (std::size_t i = 0; i < range.count; ++i) {
    const Place place = place_of(call, batch, kv_head, range.first + i);
    start_at_sink(call.queries.sinks[place.head], panel.max[i], panel.sum[i]);
  }
}

void limit_panel(const Call& call, const KeySource& source, const VisibleKeys& visible,
                 const PanelRange& range, Panel& panel) {
  const std::size_t rows = call.queries.shape.rows;
  const std::size_t group = call.group();
  panel.least = seen_by(source, visible, rows, range.first / group);
  panel.most = seen_by(source, visible, rows, (range.first + range.count - 1) / group);
  const std::size_t wide = panel.vectors * call.kernels.lanes;
  for (std::size_t i = 0; i < wide; ++i) {
    std::size_t limit = panel.most;
    if (panel.least != panel.most && i < range.count) {
      limit = seen_by(source, visible, rows, (range.first + i) / group);
    }
    panel.limits[i] = static_cast<std::int32_t>(limit);
  }
}

void finish_panel(const Call& call, std::size_t batch, std::size_t kv_head, const PanelRange& range,
                  const Panel& panel) {
  float* out[kMostPanelVectors * 16];
  for (std::size_t i = 0; i < range.count; ++i) {
    const Place place = place_of(call, batch, kv_head, range.first + i);
    out[i] = call.queries.out + offset(call.queries.out_strides, place);
    store_lse(call, place, panel.max[i], panel.sum[i]);
  }
  call.kernels.store(panel, range.count, out);
}

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
    start_panel(call, batch, kv_head, state.ranges[i], state.panels[i]);
  }
  for (std::size_t s = 0; s < call.source_count; ++s) {
    const KeySource& source = *call.sources[s];
    const VisibleKeys& visible = call.visible[s * call.queries.shape.batch + batch];
    std::size_t most = 0;
    for (std::size_t i = 0; i < count; ++i) {
      limit_panel(call, source, visible, state.ranges[i], state.panels[i]);
      most = std::max(most, state.panels[i].most);
    }
    for (std::size_t key = 0; key < most; key += kTileKeys) {
      const KeyTile tile = source.tile(batch, kv_head, visible, key,
                                       std::min(kTileKeys, most - key), false, state.scratch);
      for (std::size_t i = 0; i < count; ++i) {
        call.kernels.absorb(state.panels[i], tile, state.weights);
      }
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    finish_panel(call, batch, kv_head, state.ranges[i], state.panels[i]);
  }
}

// All queries of a KV head, where they are few.
void attend_few(const Call& call, std::size_t batch, std::size_t kv_head, Arena& arena) {
  const AttentionShape& shape = call.queries.shape;
  const std::size_t lanes = call.kernels.lanes;
  FewRows few{};
  few.rows = call.folded_rows();
  few.width = shape.width;
  few.value_width = shape.value_width;
  few.stride = (shape.width + lanes - 1) / lanes * lanes;
  few.out_stride = (shape.value_width + lanes - 1) / lanes * lanes;
  const auto lay = [&](Pieces& pieces) {
    few.queries = pieces.floats(few.rows * few.stride);
    few.out = pieces.floats(few.rows * few.out_stride);
    few.max = pieces.floats(few.rows);
    few.sum = pieces.floats(few.rows);
    few.limits = pieces.integers(few.rows);
    float* weights = pieces.floats(kMostFew * kTileKeys);
    return std::pair(weights, pieces.floats(kTileKeys * (shape.width + shape.value_width)));
  };
  Pieces size(nullptr);
  lay(size);
  Pieces pieces(arena.reserve(size.bytes()));
  const auto [weights, scratch] = lay(pieces);

  const std::size_t whole = few.stride - lanes;
  const std::size_t repeated = few.stride - few.width;
  const float factor = score_factor(call);
  for (std::size_t r = 0; r < few.rows; ++r) {
    const Place place = place_of(call, batch, kv_head, r);
    const float* query = call.queries.query + offset(call.queries.query_strides, place);
    float* row = few.queries + r * few.stride;
    for (std::size_t c = 0; c < whole; ++c) row[c] = query[c] * factor;
    std::fill_n(row + whole, repeated, 0.0F);
    for (std::size_t c = whole; c < shape.width; ++c) row[c + repeated] = query[c] * factor;
    std::fill_n(few.out + r * few.out_stride, few.out_stride, 0.0F);
    start_at_sink(call.queries.sinks == nullptr ? -kInfinity : call.queries.sinks[place.head],
                  few.max[r], few.sum[r]);
  }
  for (std::size_t s = 0; s < call.source_count; ++s) {
    const KeySource& source = *call.sources[s];
    const VisibleKeys& visible = call.visible[s * shape.batch + batch];
    few.most = 0;
    for (std::size_t r = 0; r < few.rows; ++r) {
      const std::size_t limit = seen_by(source, visible, shape.rows, r / call.group());
      few.limits[r] = static_cast<std::int32_t>(limit);
      few.most = std::max(few.most, limit);
    }
    for (std::size_t key = 0; key < few.most; key += kTileKeys) {
      const std::size_t count = std::min(kTileKeys, few.most - key);
      call.kernels.absorb_few(few, source.tile(batch, kv_head, visible, key, count, true, scratch),
                              weights);
    }
  }
  for (std::size_t r = 0; r < few.rows; ++r) {
    const Place place = place_of(call, batch, kv_head, r);
    float* out = call.queries.out + offset(call.queries.out_strides, place);
    const float* row = few.out + r * few.out_stride;
    const float share = few.sum[r] == 0.0F ? 1.0F : 1.0F / few.sum[r];
    const std::size_t end = few.out_stride - lanes;
    const std::size_t skipped = few.out_stride - few.value_width;
    for (std::size_t c = 0; c < end; ++c) out[c] = row[c] * share;
    for (std::size_t c = end; c < shape.value_width; ++c) out[c] = row[c + skipped] * share;
    store_lse(call, place, few.max[r], few.sum[r]);
  }
}

void attend_unit(void* context, std::size_t unit) {
  Call& call = *static_cast<Call*>(context);
  thread_local Arena arena;
  const std::size_t head = unit / call.blocks;
  const std::size_t kv_heads = call.queries.shape.kv_heads;
  try {
    if (call.few) {
      attend_few(call, head / kv_heads, head % kv_heads, arena);
    } else {
      attend_block(call, head / kv_heads, head % kv_heads, unit % call.blocks, arena);
    }
  } catch (const std::bad_alloc&) {
    call.out_of_memory = true;
  }
}

void check(const Queries& queries, const KeySource& source) {
  const AttentionShape& shape = queries.shape;
  if (shape.kv_heads == 0 || shape.heads % shape.kv_heads != 0) {
    throw std::invalid_argument("heads must be a multiple of kv_heads, got " +
                                std::to_string(shape.heads) + " and " +
                                std::to_string(shape.kv_heads));
  }
  if (source.count() > INT32_MAX) {
    throw std::invalid_argument("count must be at most 2^31 - 1 keys, got " +
                                std::to_string(source.count()));
  }
}

// The visible keys of every source and batch row, in `arena`.
const VisibleKeys* find_visible(const Queries& queries, const KeySource* const* sources,
                                std::size_t source_count, Arena& arena) {
  const std::size_t batch = queries.shape.batch;
  const std::size_t lists = bytes_of(source_count * batch, sizeof(VisibleKeys));
  std::size_t floats = in_lines(lists);
  for (std::size_t s = 0; s < source_count; ++s) {
    if (sources[s]->mask() != nullptr) floats += batch * in_lines(sources[s]->count());
  }
  Pieces pieces(arena.reserve(floats * sizeof(float)));
  auto* visible = reinterpret_cast<VisibleKeys*>(pieces.floats(lists));
  for (std::size_t s = 0; s < source_count; ++s) {
    const std::size_t count = sources[s]->count();
    for (std::size_t b = 0; b < batch; ++b) {
      VisibleKeys* list = new (visible + s * batch + b) VisibleKeys{nullptr, count};
      if (sources[s]->mask() == nullptr) continue;
      const std::uint8_t* mask = sources[s]->mask() + b * count;
      std::int32_t* places = pieces.integers(count);
      list->count = 0;
      for (std::size_t k = 0; k < count; ++k) {
        places[list->count] = static_cast<std::int32_t>(k);
        list->count += mask[k] != 0 ? 1 : 0;
      }
      // Where nothing is hidden, keys are read as they lie.
      if (list->count < count) list->places = places;
    }
  }
  return visible;
}

void attend(const Queries& queries, const KeySource* const* sources, std::size_t source_count) {
  const AttentionShape& shape = queries.shape;
  std::size_t keys = 0;
  for (std::size_t s = 0; s < source_count; ++s) {
    check(queries, *sources[s]);
    keys += sources[s]->count();
  }
  const AttentionKernels& kernels = choose(queries.isa);
  if (shape.batch == 0 || shape.heads == 0 || shape.rows == 0) return;

  thread_local Arena arena;
  Call call{queries,
            kernels,
            sources,
            source_count,
            find_visible(queries, sources, source_count, arena),
            false,
            0,
            1,
            1};
  const std::size_t folded = call.folded_rows();
  call.few = folded <= std::min(kMostFew, kernels.lanes / 2) &&
             std::min(shape.width, shape.value_width) >= kernels.lanes;
  const double work =
      static_cast<double>(shape.batch * shape.heads) * static_cast<double>(shape.rows) *
      static_cast<double>(shape.width + shape.value_width) * static_cast<double>(keys);
  const auto useful = static_cast<unsigned>(std::min(work / kWorthAThread, 256.0)) + 1;
  const unsigned threads = std::clamp(queries.threads, 1U, useful);
  if (!call.few) {
    call.panels = panel_count(folded, kernels.lanes);
    const std::size_t panel = kMostPanelVectors * kernels.lanes * (shape.width + shape.value_width);
    call.panels_of_block =
        std::clamp<std::size_t>(kBlockFloats / std::max<std::size_t>(panel, 1), 1, call.panels);
    call.blocks = (call.panels + call.panels_of_block - 1) / call.panels_of_block;
  }
  detail::run_units(threads, shape.batch * shape.kv_heads * call.blocks, attend_unit, &call);
  if (call.out_of_memory) throw std::bad_alloc();
}

}  // namespace

void attention(const Queries& queries, const DenseKeys& dense) {
  const detail::DenseSource source(dense, queries.shape);
  const KeySource* const sources[] = {&source};
  attend(queries, sources, 1);
}

CodesFound coded_attention(const Queries& queries, const CodedKeys& coded) {
  const detail::CodedSource source(coded, queries.shape, choose(queries.isa).rotate);
  const KeySource* const sources[] = {&source};
  attend(queries, sources, 1);
  return source.found();
}

CodesFound mixed_attention(const Queries& queries, const DenseKeys& dense, const CodedKeys& coded) {
  const detail::DenseSource local(dense, queries.shape);
  const detail::CodedSource remote(coded, queries.shape, choose(queries.isa).rotate);
  const KeySource* const sources[] = {&local, &remote};
  attend(queries, sources, 2);
  return remote.found();
}

std::vector<std::string> attention_isas() {
  std::vector<std::string> names;
  for (const AttentionKernels* kernel : runnable()) names.emplace_back(kernel->name);
  return names;
}

}  // namespace astra
