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

#include "attention_call.hpp"
#include "attention_kernel.hpp"
#include "attention_source.hpp"
#include "pool.hpp"
#include "processor.hpp"

namespace astra {
namespace {

using detail::Arena;
using detail::AttentionKernels;
using detail::Call;
using detail::floats_for;
using detail::in_lines;
using detail::KeySource;
using detail::kMostFew;
using detail::kMostPanelVectors;
using detail::Pieces;
using detail::VisibleKeys;

// Floats of queries and outputs that go through the keys together: they stay in L2.
constexpr std::size_t kBlockFloats = 96 * 1024;
constexpr double kWorthAThread = 4e6;  // multiplications; waking a thread costs some 20 us

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

// Of the call's instruction set, or where it may round the quicker ones that do.
const AttentionKernels& kernels_for(const Queries& queries) {
  const AttentionKernels& kernels = choose(queries.isa);
#ifdef ASTRA_HAVE_AVX512
  if (queries.rounded && &kernels == &detail::kAttentionAvx512 && attention_rounds()) {
    return detail::kAttentionBfloat16;
  }
#endif
  return kernels;
}

// One query a KV head waits for memory, which an EPYC reads up to a third faster with vectors of
// half the width (12 heads of 64 channels, 8k keys).
const AttentionKernels& kernels_for_few(const Queries& queries, const KeySource& source,
                                        const AttentionKernels& kernels) {
#ifdef ASTRA_HAVE_AVX512
  const bool alone = queries.shape.heads == queries.shape.kv_heads && queries.shape.rows == 1;
  const bool chosen = *queries.isa != '\0';
  if (alone && !chosen && !source.is_shared() && kernels.lanes == detail::kAttentionAvx512.lanes) {
    return detail::kAttentionAvx2;
  }
#else
  static_cast<void>(queries);
  static_cast<void>(source);
#endif
  return kernels;
}

void attend_unit(void* context, std::size_t unit) {
  Call& call = *static_cast<Call*>(context);
  thread_local Arena arena;
  const std::size_t kv_heads = call.queries.shape.kv_heads;
  const std::size_t parts = (kv_heads + call.heads_of_unit - 1) / call.heads_of_unit;
  const std::size_t part = unit / call.blocks;
  const std::size_t batch = part / parts;
  const std::size_t head = part % parts * call.heads_of_unit;
  try {
    if (call.few) {
      attend_few(call, batch, head, std::min(call.heads_of_unit, kv_heads - head), arena);
    } else {
      attend_block(call, batch, head, unit % call.blocks, arena);
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
  const std::size_t lists = floats_for(source_count * batch, sizeof(VisibleKeys));
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
  const AttentionKernels& kernels =
      source_count > 1 ? kernels_for(queries)
                       : kernels_for_few(queries, *sources[0], kernels_for(queries));
  if (shape.batch == 0 || shape.heads == 0 || shape.rows == 0) return;

  thread_local Arena arena;
  Call call{queries,
            kernels,
            sources,
            source_count,
            find_visible(queries, sources, source_count, arena),
            shape.heads / shape.kv_heads,
            false,
            0,
            1,
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
  if (call.few) {
    const std::size_t parts = std::min<std::size_t>(threads, shape.kv_heads);
    call.heads_of_unit = (shape.kv_heads + parts - 1) / parts;
  } else {
    call.panels = detail::panel_count(folded, kernels.lanes);
    const std::size_t panel = kMostPanelVectors * kernels.lanes * (shape.width + shape.value_width);
    call.panels_of_block =
        std::clamp<std::size_t>(kBlockFloats / std::max<std::size_t>(panel, 1), 1, call.panels);
    call.blocks = (call.panels + call.panels_of_block - 1) / call.panels_of_block;
  }
  const std::size_t parts = (shape.kv_heads + call.heads_of_unit - 1) / call.heads_of_unit;
  detail::run_units(threads, shape.batch * parts * call.blocks, attend_unit, &call);
  if (call.out_of_memory) throw std::bad_alloc();
}

}  // namespace

void attention(const Queries& queries, const DenseKeys& dense) {
  const detail::Rows stored{choose(queries.isa), queries.storage};
  const detail::DenseSource source(dense, queries.shape, stored);
  const KeySource* const sources[] = {&source};
  attend(queries, sources, 1);
}

CodesFound coded_attention(const Queries& queries, const CodedKeys& coded) {
  const detail::CodedSource source(coded, queries.shape, choose(queries.isa));
  const KeySource* const sources[] = {&source};
  attend(queries, sources, 1);
  return source.found();
}

CodesFound mixed_attention(const Queries& queries, const DenseKeys& dense, const CodedKeys& coded) {
  const detail::Rows stored{choose(queries.isa), queries.storage};
  const detail::DenseSource local(dense, queries.shape, stored);
  const detail::CodedSource remote(coded, queries.shape, stored.kernels);
  const KeySource* const sources[] = {&local, &remote};
  attend(queries, sources, 2);
  return remote.found();
}

bool attention_rounds() { return detail::has_bfloat16(); }

std::vector<std::string> attention_isas() {
  std::vector<std::string> names;
  for (const AttentionKernels* kernel : runnable()) names.emplace_back(kernel->name);
  return names;
}

}  // namespace astra
