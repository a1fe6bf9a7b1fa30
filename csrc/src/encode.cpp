#include "astra/encode.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "encode_kernel.hpp"

namespace astra {
namespace {

using detail::EncodeKernel;
using detail::kPanel;

constexpr std::size_t kMaxCodewords = 65536;
constexpr std::size_t kBlock = 96;     // rows at a time: what is known of them stays in L1
constexpr double kWorthAThread = 4e6;  // multiplications; a thread costs some 20 us

EncodeKernel choose() {
#ifdef ASTRA_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f")) return detail::encode_avx512;
#endif
#ifdef ASTRA_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return detail::encode_avx2;
#endif
  return detail::encode_portable;
}

// One group's codewords as the kernel reads them.
struct Table {
  std::vector<float> panels;
  std::vector<float> half_norms;
  std::size_t panel_count = 0;
};

Table arranged(const float* codewords, std::size_t count, std::size_t width) {
  Table table;
  table.panel_count = (count + kPanel - 1) / kPanel;
  table.panels.assign(table.panel_count * kPanel * width, 0.0F);
  table.half_norms.assign(table.panel_count * kPanel, std::numeric_limits<float>::infinity());
  for (std::size_t k = 0; k < count; ++k) {
    const float* word = codewords + k * width;
    float* column = table.panels.data() + k / kPanel * kPanel * width + k % kPanel;
    float norm = 0.0F;
    for (std::size_t j = 0; j < width; ++j) {
      column[j * kPanel] = word[j];
      norm += word[j] * word[j];
    }
    table.half_norms[k] = 0.5F * norm;
  }
  return table;
}

// The same where NaN or infinity occurs: such a distance counts as infinite.
std::int32_t nearest_of_any(const float* x, const float* codewords, std::size_t count,
                            std::size_t width) {
  float least = std::numeric_limits<float>::infinity();
  std::size_t code = 0;
  for (std::size_t k = 0; k < count; ++k) {
    float distance = 0.0F;
    for (std::size_t j = 0; j < width; ++j) {
      const float difference = codewords[k * width + j] - x[j];
      distance += difference * difference;
    }
    if (distance < least) {
      least = distance;
      code = k;
    }
  }
  return static_cast<std::int32_t>(code);
}

void encode_rows(const float* vectors, const float* codebook, const EncodeShape& shape,
                 const std::vector<Table>& tables, std::size_t first, std::size_t last,
                 std::int32_t* codes) {
  const EncodeKernel kernel = choose();
  const std::size_t stride = shape.groups * shape.width;
  float best[kBlock];
  std::int32_t found[kBlock];
  for (std::size_t row = first; row < last; row += kBlock) {
    const std::size_t rows = std::min(kBlock, last - row);
    for (std::size_t group = 0; group < shape.groups; ++group) {
      const Table& table = tables[group];
      const float* x = vectors + row * stride + group * shape.width;
      kernel(x, stride, rows, shape.width, table.panels.data(), table.half_norms.data(),
             table.panel_count, best, found);
      for (std::size_t r = 0; r < rows; ++r) {
        if (!std::isfinite(best[r])) {
          found[r] =
              nearest_of_any(x + r * stride, codebook + group * shape.codewords * shape.width,
                             shape.codewords, shape.width);
        }
        codes[(row + r) * shape.groups + group] = found[r];
      }
    }
  }
}

}  // namespace

void encode(const float* vectors, const float* codebook, EncodeShape shape, std::int32_t* codes,
            unsigned threads) {
  if (shape.codewords < 1 || shape.codewords > kMaxCodewords) {
    throw std::invalid_argument("codewords must be 1 to " + std::to_string(kMaxCodewords) +
                                ", got " + std::to_string(shape.codewords));
  }
  if (shape.rows == 0 || shape.groups == 0) return;
  std::vector<Table> tables;
  tables.reserve(shape.groups);
  for (std::size_t group = 0; group < shape.groups; ++group) {
    tables.push_back(
        arranged(codebook + group * shape.codewords * shape.width, shape.codewords, shape.width));
  }
  const double work = static_cast<double>(shape.rows) * static_cast<double>(shape.groups) *
                      static_cast<double>(shape.codewords) * static_cast<double>(shape.width);
  const auto useful = static_cast<std::size_t>(std::min(work / kWorthAThread, 256.0)) + 1;
  const std::size_t parts =
      std::max<std::size_t>(1, std::min({static_cast<std::size_t>(threads), useful, shape.rows}));
  const std::size_t share = (shape.rows + parts - 1) / parts;
  std::vector<std::thread> others;
  for (std::size_t part = 1; part < parts; ++part) {
    const std::size_t first = std::min(part * share, shape.rows);
    const std::size_t last = std::min(first + share, shape.rows);
    others.emplace_back(
        [&, first, last] { encode_rows(vectors, codebook, shape, tables, first, last, codes); });
  }
  encode_rows(vectors, codebook, shape, tables, 0, std::min(share, shape.rows), codes);
  for (std::thread& other : others) other.join();
}

}  // namespace astra
