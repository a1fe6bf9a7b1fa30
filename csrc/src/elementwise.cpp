#include "astra/elementwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "elementwise_kernel.hpp"
#include "pool.hpp"

namespace astra {
namespace {

using detail::ElementwiseKernels;

constexpr std::size_t kUnit = 16384;  // floats of a thread's next piece of work, or a row

const ElementwiseKernels& kernels() {
#ifdef ASTRA_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f")) return detail::kElementwiseAvx512;
#endif
#ifdef ASTRA_HAVE_AVX2
  if (__builtin_cpu_supports("avx2")) return detail::kElementwiseAvx2;
#endif
  return detail::kElementwisePortable;
}

// work(first, last) for all of `count` rows of `width` floats.
template <class Work>
void in_parts(std::size_t count, std::size_t width, unsigned threads, Work work) {
  struct Parts {
    std::size_t count, rows;
    const Work& work;
  } parts{count, std::max<std::size_t>(1, kUnit / std::max<std::size_t>(1, width)), work};
  const std::size_t units = (count + parts.rows - 1) / parts.rows;
  detail::run_units(
      threads, units,
      [](void* context, std::size_t unit) {
        const Parts& given = *static_cast<const Parts*>(context);
        const std::size_t first = unit * given.rows;
        given.work(first, std::min(first + given.rows, given.count));
      },
      &parts);
}

std::size_t row_of(const RowStrides& strides, std::size_t b, std::size_t h, std::size_t n) {
  return b * strides[0] + h * strides[1] + n * strides[2];
}

// Merges one row, whose `out` may be `a`; returns its lse.
float merge_row(decltype(ElementwiseKernels::blend) blend, const float* a, float one,
                const float* b, float other, std::size_t width, float* out) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  if (!(std::isfinite(one) && std::isfinite(other))) {
    const bool known = std::isfinite(one) || one == kEmpty;
    const bool both = known && (std::isfinite(other) || other == kEmpty);
    const bool none = one == kEmpty && other == kEmpty;
    const float* seen = other == kEmpty ? a : b;
    for (std::size_t i = 0; i < width; ++i) {
      out[i] = !both ? std::nanf("") : none ? 0.0F : seen[i];
    }
    return !both ? std::nanf("") : std::max(one, other);
  }
  // The lesser side is added to the greater, so that what rounds is small.
  const float small = std::exp(-std::abs(other - one));
  const auto weight = static_cast<float>(double{small} / (1.0 + double{small}));
  const bool swapped = other > one;
  blend(swapped ? b : a, swapped ? a : b, weight, width, out);
  return std::max(one, other) + std::log1p(small);
}

}  // namespace

void rms_norm(const float* x, const float* weight, std::size_t rows, std::size_t width, float eps,
              float* out, unsigned threads) {
  const auto kernel = kernels().rms_norm;
  in_parts(rows, width, threads, [&](std::size_t first, std::size_t last) {
    for (std::size_t r = first; r < last; ++r) {
      kernel(x + r * width, weight, width, eps, out + r * width);
    }
  });
}

void gated_silu(const float* gate, const float* up, std::size_t count, float* out,
                unsigned threads) {
  const auto kernel = kernels().gated_silu;
  in_parts(count, 1, threads, [&](std::size_t first, std::size_t last) {
    kernel(gate + first, up + first, last - first, out + first);
  });
}

void rotate(const float* x, const RowStrides& x_strides, const float* cos, const float* sin,
            const RotateShape& shape, float* out, const RowStrides& out_strides, unsigned threads) {
  if (shape.width % 2 != 0) {
    throw std::invalid_argument("width must be even, got " + std::to_string(shape.width));
  }
  const auto kernel = kernels().rotate;
  // all heads of a token in turn, which have its angles in common
  in_parts(shape.batch * shape.tokens, shape.heads * shape.width, threads,
           [&](std::size_t first, std::size_t last) {
             for (std::size_t at = first; at < last; ++at) {
               const std::size_t b = at / shape.tokens, n = at % shape.tokens;
               const std::size_t angle = b * shape.angle_stride + n * shape.width;
               for (std::size_t h = 0; h < shape.heads; ++h) {
                 kernel(x + row_of(x_strides, b, h, n), cos + angle, sin + angle, shape.width / 2,
                        out + row_of(out_strides, b, h, n));
               }
             }
           });
}

void merge_state(const float* out_a, const float* lse_a, const float* out_b, const float* lse_b,
                 std::size_t rows, std::size_t width, float* out, float* lse, unsigned threads) {
  const auto blend = kernels().blend;
  in_parts(rows, width, threads, [&](std::size_t first, std::size_t last) {
    for (std::size_t r = first; r < last; ++r) {
      const std::size_t at = r * width;
      lse[r] = merge_row(blend, out_a + at, lse_a[r], out_b + at, lse_b[r], width, out + at);
    }
  });
}

void merge_into(const PartialState& one, const PartialState& other, const StateShape& shape,
                unsigned threads) {
  const auto blend = kernels().blend;
  const std::size_t per_token = shape.heads * shape.width;
  in_parts(shape.batch * shape.tokens, per_token, threads,
           [&](std::size_t first, std::size_t last) {
             for (std::size_t at = first; at < last; ++at) {
               const std::size_t b = at / shape.tokens, n = at % shape.tokens;
               for (std::size_t h = 0; h < shape.heads; ++h) {
                 float* out = one.out + row_of(one.out_strides, b, h, n);
                 float* lse = one.lse + row_of(one.lse_strides, b, h, n);
                 *lse = merge_row(blend, out, *lse, other.out + row_of(other.out_strides, b, h, n),
                                  other.lse[row_of(other.lse_strides, b, h, n)], shape.width, out);
               }
             }
           });
}

bool all_finite(const float* x, const RowStrides& strides, const StateShape& shape) {
  const auto finite = kernels().finite;
  // heads inside of tokens, as a projection gives them, are one row
  const bool inside = strides[1] == shape.width;
  const std::size_t heads = inside ? 1 : shape.heads;
  const std::size_t width = inside ? shape.heads * shape.width : shape.width;
  for (std::size_t b = 0; b < shape.batch; ++b) {
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t n = 0; n < shape.tokens; ++n) {
        if (!finite(x + row_of(strides, b, h, n), width)) return false;
      }
    }
  }
  return true;
}

bool look_up(const std::int32_t* codes, const float* tables, std::size_t rows, std::size_t groups,
             std::size_t codewords, std::size_t width, float* out) {
  for (std::size_t n = 0; n < rows; ++n) {
    for (std::size_t g = 0; g < groups; ++g) {
      // a negative code is one beyond all, too
      const auto code = static_cast<std::size_t>(static_cast<std::uint32_t>(*codes++));
      if (code >= codewords) return false;
      std::memcpy(out, tables + (g * codewords + code) * width, width * sizeof(float));
      out += width;
    }
  }
  return true;
}

bool add_rows(const std::int32_t* codes, const std::uint16_t* tables, std::size_t rows,
              std::size_t groups, std::size_t codewords, std::size_t width, float* out,
              unsigned threads) {
  for (std::size_t i = 0; i < rows * groups; ++i) {
    if (codes[i] >= 0 && static_cast<std::size_t>(codes[i]) >= codewords) return false;
  }
  const auto kernel = kernels().add_rows;
  in_parts(rows, width, threads, [&](std::size_t first, std::size_t last) {
    const auto find = [&](std::size_t n, std::vector<const std::uint16_t*>& found) {
      found.clear();
      for (std::size_t g = 0; g < groups; ++g) {
        const std::int32_t code = codes[n * groups + g];
        if (code < 0) continue;
        found.push_back(tables + (g * codewords + static_cast<std::size_t>(code)) * width);
      }
    };
    std::vector<const std::uint16_t*> here, next;
    here.reserve(groups);
    next.reserve(groups);
    if (first < last) find(first, here);
    for (std::size_t n = first; n < last; ++n) {
      next.clear();
      if (n + 1 < last) find(n + 1, next);
      kernel(here.data(), here.size(), next.data(), next.size(), width, out + n * width);
      std::swap(here, next);
    }
  });
  return true;
}

}  // namespace astra
