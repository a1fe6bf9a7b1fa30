// The inner loop of encode, written once with vectors of ASTRA_LANES floats (a GCC and Clang
// extension) and compiled for each instruction set as ASTRA_ENCODE. A tile of rows by one panel of
// codewords stays in registers; the running minimum and its place are kept for each lane and
// compared across lanes once a row.

#include "encode_kernel.hpp"

namespace astra::detail {
namespace {

constexpr int kLanes = ASTRA_LANES;
constexpr int kVectors = static_cast<int>(kPanel) / kLanes;  // of a panel
constexpr int kRows = 12 / kVectors;                         // 12 sums in registers
constexpr float kInfinity = __builtin_inff();

// aligned(4): they are loaded from anywhere.
typedef float Floats __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * ASTRA_LANES), aligned(4), may_alias));

template <int kTile>
void tile(const float* vectors, std::size_t stride, std::size_t width, const float* panels,
          const float* half_norms, std::size_t panel_count, float* best_out,
          std::int32_t* codes_out) {
  Floats best[kTile];
  Ints place[kTile];
  Ints lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int r = 0; r < kTile; ++r) {
    best[r] = Floats{} + kInfinity;
    place[r] = Ints{};
  }
  const float* column = panels;
  for (std::size_t panel = 0; panel < panel_count; ++panel) {
    Floats sums[kTile][kVectors];
    const float* norms = half_norms + panel * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      const Floats norm = *reinterpret_cast<const Floats*>(norms + v * kLanes);
      for (int r = 0; r < kTile; ++r) sums[r][v] = norm;
    }
    for (std::size_t j = 0; j < width; ++j, column += kPanel) {
      Floats words[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        words[v] = *reinterpret_cast<const Floats*>(column + v * kLanes);
      }
      for (int r = 0; r < kTile; ++r) {
        const Floats x = Floats{} + vectors[static_cast<std::size_t>(r) * stride + j];
        for (int v = 0; v < kVectors; ++v) sums[r][v] -= x * words[v];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Ints here = lane + static_cast<std::int32_t>(panel * kPanel) + v * kLanes;
      for (int r = 0; r < kTile; ++r) {
        const Ints closer = sums[r][v] < best[r];  // never with NaN
        best[r] = closer ? sums[r][v] : best[r];
        place[r] = closer ? here : place[r];
      }
    }
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
