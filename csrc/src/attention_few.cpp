// Few queries, as in decoding: every key is read once for all queries of its KV head.

#include <algorithm>

#include "attention_call.hpp"

namespace astra::detail {
namespace {

// The KV heads of a unit.
struct FewState {
  FewRows* heads;
  float* weights;
  float* scratch;
};

// `codewords`: the most of any source.
FewState lay_out(const Call& call, std::size_t heads, std::size_t codewords, Pieces& pieces) {
  const AttentionShape& shape = call.queries.shape;
  const std::size_t lanes = call.kernels.lanes;
  FewState state{};
  state.heads = reinterpret_cast<FewRows*>(pieces.floats(floats_for(heads, sizeof(FewRows))));
  auto* list = reinterpret_cast<std::uint32_t*>(pieces.integers(codewords));
  for (std::size_t h = 0; h < heads; ++h) {
    FewRows few{};
    few.rows = call.folded_rows();
    few.width = shape.width;
    few.value_width = shape.value_width;
    few.stride = (shape.width + lanes - 1) / lanes * lanes;
    few.out_stride = (shape.value_width + lanes - 1) / lanes * lanes;
    few.queries = pieces.floats(few.rows * few.stride);
    few.out = pieces.floats(few.rows * few.out_stride);
    few.max = pieces.floats(few.rows);
    few.sum = pieces.floats(few.rows);
    few.limits = pieces.integers(few.rows);
    if (codewords > 0) {
      few.by_codeword = pieces.floats((few.rows + 3) / 4 * codewords * 4);
      few.used = reinterpret_cast<std::uint8_t*>(pieces.floats(floats_for(codewords, 1)));
      few.list = list;
    }
    if (state.heads != nullptr) new (state.heads + h) FewRows(few);
  }
  state.weights = pieces.floats(kMostFew * kTileKeys);
  state.scratch = pieces.floats(scratch_floats(call));
  return state;
}

void start_few(const Call& call, std::size_t batch, std::size_t kv_head, const FewRows& few,
               float* scratch) {
  const std::size_t whole = few.stride - call.kernels.lanes;
  const std::size_t repeated = few.stride - few.width;
  const float factor = score_factor(call);
  Places place(call, batch, kv_head, 0);
  for (std::size_t r = 0; r < few.rows; ++r, ++place) {
    const std::size_t at = offset(call.queries.query_strides, *place);
    const float* query = call.stored().read(call.queries.query, at, few.width, scratch);
    float* row = few.queries + r * few.stride;
    for (std::size_t c = 0; c < whole; ++c) row[c] = query[c] * factor;
    std::fill_n(row + whole, repeated, 0.0F);
    for (std::size_t c = whole; c < few.width; ++c) row[c + repeated] = query[c] * factor;
    std::fill_n(few.out + r * few.out_stride, few.out_stride, 0.0F);
    start_at_sink(call.queries.sinks == nullptr ? -kInfinity : call.queries.sinks[(*place).head],
                  few.max[r], few.sum[r]);
  }
}

void limit_few(const Call& call, const KeySource& source, const VisibleKeys& visible,
               FewRows& few) {
  few.most = 0;
  for (std::size_t r = 0; r < few.rows; ++r) {
    const std::size_t limit = seen_by(source, visible, call.queries.shape.rows, r / call.group);
    few.limits[r] = static_cast<std::int32_t>(limit);
    few.most = std::max(few.most, limit);
  }
}

void finish_few(const Call& call, std::size_t batch, std::size_t kv_head, const FewRows& few,
                float* scratch) {
  const Rows stored = call.stored();
  Places place(call, batch, kv_head, 0);
  for (std::size_t r = 0; r < few.rows; ++r, ++place) {
    const std::size_t at = offset(call.queries.out_strides, *place);
    float* out = stored.start(call.queries.out, at, scratch);
    const float* row = few.out + r * few.out_stride;
    const float share = few.sum[r] == 0.0F ? 1.0F : 1.0F / few.sum[r];
    const std::size_t end = few.out_stride - call.kernels.lanes;
    const std::size_t skipped = few.out_stride - few.value_width;
    for (std::size_t c = 0; c < end; ++c) out[c] = row[c] * share;
    for (std::size_t c = end; c < few.value_width; ++c) out[c] = row[c + skipped] * share;
    stored.finish(out, few.value_width, call.queries.out, at);
    store_lse(call, *place, few.max[r], few.sum[r]);
  }
}

void start_codewords(const FewRows& few) {
  std::fill_n(few.by_codeword, (few.rows + 3) / 4 * few.codewords * 4, 0.0F);
  std::fill_n(few.used, few.codewords, std::uint8_t{0});
}

// Keys of one source for the unit's KV heads, from place.kv_head on. All of them see as much.
void absorb_source(const Call& call, const KeySource& source, TilePlace place, std::size_t heads,
                   const FewState& state) {
  TileMemory memory;
  memory.scratch = state.scratch;
  const std::size_t first_head = place.kv_head;
  const std::size_t together = source.is_shared() ? heads : 1;
  const std::size_t most = state.heads[0].most;
  const std::size_t codewords = source.by_codeword(most);
  for (std::size_t h = 0; h < heads; ++h) {
    state.heads[h].codewords = codewords;
    if (codewords > 0) start_codewords(state.heads[h]);
  }
  for (std::size_t begin = 0; begin < heads; begin += together) {
    for (place.first = 0; place.first < most; place.first += kTileKeys) {
      place.count = std::min(kTileKeys, most - place.first);
      for (std::size_t h = begin; h < begin + together; ++h) {
        place.kv_head = first_head + h;
        const KeyRows rows = source.rows(place, memory, codewords > 0);
        call.kernels.absorb_few(state.heads[h], rows, state.weights);
      }
    }
  }
  for (std::size_t h = 0; h < heads && codewords > 0; ++h) {
    call.kernels.absorb_codewords(state.heads[h], source.codewords(first_head + h));
  }
}

// The most codewords whose weights any source sums.
std::size_t codewords_of(const Call& call, std::size_t batch) {
  std::size_t most = 0;
  for (std::size_t s = 0; s < call.source_count; ++s) {
    const VisibleKeys& visible = call.visible[s * call.queries.shape.batch + batch];
    most = std::max(most, call.sources[s]->by_codeword(visible.count));
  }
  return most;
}

}  // namespace

void attend_few(const Call& call, std::size_t batch, std::size_t kv_head, std::size_t heads,
                Arena& arena) {
  const std::size_t codewords = codewords_of(call, batch);
  Pieces size(nullptr);
  lay_out(call, heads, codewords, size);
  Pieces pieces(arena.reserve(size.bytes()));
  const FewState state = lay_out(call, heads, codewords, pieces);
  std::fill_n(state.weights, kMostFew * kTileKeys, 0.0F);
  for (std::size_t h = 0; h < heads; ++h) {
    start_few(call, batch, kv_head + h, state.heads[h], state.scratch);
  }
  for (std::size_t s = 0; s < call.source_count; ++s) {
    const KeySource& source = *call.sources[s];
    const VisibleKeys& visible = call.visible[s * call.queries.shape.batch + batch];
    for (std::size_t h = 0; h < heads; ++h) limit_few(call, source, visible, state.heads[h]);
    absorb_source(call, source, {batch, kv_head, &visible, 0, 0}, heads, state);
  }
  for (std::size_t h = 0; h < heads; ++h) {
    finish_few(call, batch, kv_head + h, state.heads[h], state.scratch);
  }
}

}  // namespace astra::detail
