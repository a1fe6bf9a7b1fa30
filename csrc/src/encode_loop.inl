// The inner loop of encode, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension) and compiled for each instruction set as ASTRA_ENCODE. A tile of rows by panels of
// codewords stays in registers; the running minimum and its place are kept for each lane and
// compared across lanes once a row.

#include "encode_kernel.hpp"

namespace astra::detail {
namespace {

constexpr int kLanes = ASTRA_LANES;
constexpr int kVectors = static_cast<int>(kPanel) / kLanes;  // of a panel
// Sums that stay in registers, of rows by panels: 8 by 2 with 32 registers, else 12 vectors.
constexpr bool kMany = kLanes == 16;
constexpr int kRows = kMany ? 8 : 12 / kVectors;
constexpr int kTogether = kMany ? 2 : 1;  // panels
constexpr float kInfinity = __builtin_inff();

// aligned(4): they are loaded from anywhere.
typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

// Scores of kTile rows by kPanels panels, and what of them is the smallest so far.
template <int kTile, int kPanels>
inline void panels_of(const float* vectors, std::size_t stride, std::size_t width,
                      const float* column, const float* norms, std::int32_t first, Floats* best,
                      Ints* place) {
  constexpr int kAll = kPanels * kVectors;
  Floats sums[kTile][kAll];
  for (int v = 0; v < kAll; ++v) {
    const Floats norm = *reinterpret_cast<const Floats*>(norms + v * kLanes);
    for (int r = 0; r < kTile; ++r) sums[r][v] = norm;
  }
  for (std::size_t j = 0; j < width; ++j, column += kPanel) {
    Floats words[kAll];
    for (int v = 0; v < kAll; ++v) {
      const std::size_t panel = static_cast<std::size_t>(v / kVectors) * width * kPanel;
      words[v] = *reinterpret_cast<const Floats*>(column + panel + v % kVectors * kLanes);
    }
    for (int r = 0; r < kTile; ++r) {
      const Floats x = Floats{} + vectors[static_cast<std::size_t>(r) * stride + j];
      for (int v = 0; v < kAll; ++v) sums[r][v] -= x * words[v];
    }
  }
  Ints lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = first + l;
  for (int v = 0; v < kAll; ++v) {
    const Ints here = lane + v * kLanes;
    for (int r = 0; r < kTile; ++r) {
      const Ints closer = sums[r][v] < best[r];  // never with NaN
      best[r] = closer ? sums[r][v] : best[r];
      place[r] = closer ? here : place[r];
    }
  }
}

template <int kTile>
void tile(const float* vectors, std::size_t stride, std::size_t width, const float* panels,
          const float* half_norms, std::size_t panel_count, float* best_out,
          std::int32_t* codes_out) {
  Floats best[kTile];
  Ints place[kTile];
  for (int r = 0; r < kTile; ++r) {
    best[r] = Floats{} + kInfinity;
    place[r] = Ints{};
  }
  std::size_t panel = 0;
  for (; panel + kTogether <= panel_count; panel += kTogether) {
    panels_of<kTile, kTogether>(vectors, stride, width, panels + panel * width * kPanel,
                                half_norms + panel * kPanel,
                                static_cast<std::int32_t>(panel * kPanel), best, place);
  }
  for (; panel < panel_count; ++panel) {
    panels_of<kTile, 1>(vectors, stride, width, panels + panel * width * kPanel,
                        half_norms + panel * kPanel, static_cast<std::int32_t>(panel * kPanel),
                        best, place);
  }
  for (int r = 0; r < kTile; ++r) {
    float least = kInfinity;
    std::int32_t code = 0;
    for (int l = 0; l < kLanes; ++l) {
      const bool closer =
          best[r][l] < least || (best[r][l] == least && least < kInfinity && place[r][l] < code);
      least = closer ? best[r][l] : least;
      code = closer ? place[r][l] : code;
    }
    best_out[r] = least;
    codes_out[r] = code;
  }
}

}  // namespace

void ASTRA_ENCODE(const float* vectors, std::size_t stride, std::size_t rows, std::size_t width,
                  const float* panels, const float* half_norms, std::size_t panel_count,
                  float* best, std::int32_t* codes) {
  std::size_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    tile<kRows>(vectors + row * stride, stride, width, panels, half_norms, panel_count, best + row,
                codes + row);
  }
  for (; row < rows; ++row) {
    tile<1>(vectors + row * stride, stride, width, panels, half_norms, panel_count, best + row,
            codes + row);
  }
}

}  // namespace astra::detail
