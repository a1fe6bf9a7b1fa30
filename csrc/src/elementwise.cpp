#include "astra/elementwise.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

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
  const auto row = [](const RowStrides& strides, std::size_t b, std::size_t h, std::size_t n) {
    return b * strides[0] + h * strides[1] + n * strides[2];
  };
  // all heads of a token in turn, which have its angles in common
  in_parts(shape.batch * shape.tokens, shape.heads * shape.width, threads,
           [&](std::size_t first, std::size_t last) {
             for (std::size_t at = first; at < last; ++at) {
               const std::size_t b = at / shape.tokens, n = at % shape.tokens;
               const std::size_t angle = b * shape.angle_stride + n * shape.width;
               for (std::size_t h = 0; h < shape.heads; ++h) {
                 kernel(x + row(x_strides, b, h, n), cos + angle, sin + angle, shape.width / 2,
                        out + row(out_strides, b, h, n));
               }
             }
           });
}

void merge_state(const float* out_a, const float* lse_a, const float* out_b, const float* lse_b,
                 std::size_t rows, std::size_t width, float* out, float* lse, unsigned threads) {
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  const auto blend = kernels().blend;
  in_parts(rows, width, threads, [&](std::size_t first, std::size_t last) {
    for (std::size_t r = first; r < last; ++r) {
      const float *a = out_a + r * width, *b = out_b + r * width;
      const float one = lse_a[r], other = lse_b[r];
      if (!(std::isfinite(one) && std::isfinite(other))) {
        const bool known = std::isfinite(one) || one == kEmpty;
        const bool both = known && (std::isfinite(other) || other == kEmpty);
        const bool none = one == kEmpty && other == kEmpty;
        const float* seen = other == kEmpty ? a : b;
        for (std::size_t i = 0; i < width; ++i) {
          out[r * width + i] = !both ? std::nanf("") : none ? 0.0F : seen[i];
        }
        lse[r] = !both ? std::nanf("") : std::max(one, other);
        continue;
      }
      // The lesser side is added to the greater, so that what rounds is small.
      const float small = std::exp(-std::abs(other - one));
      const auto weight = static_cast<float>(double{small} / (1.0 + double{small}));
      const bool swapped = other > one;
      blend(swapped ? b : a, swapped ? a : b, weight, width, out + r * width);
      lse[r] = std::max(one, other) + std::log1p(small);
    }
  });
}

}  // namespace astra
