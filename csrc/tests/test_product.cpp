// Products with weights as they are stored, against sums in double.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "astra/product.hpp"
#include "expect.hpp"

namespace {

std::vector<float> normal(std::mt19937& random, std::size_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& x : values) x = draw(random);
  return values;
}

void products(std::mt19937& random, astra::ProductShape shape, bool with_bias, unsigned threads) {
  const auto [rows, inputs, outputs] = shape;
  const auto x = normal(random, rows * inputs), weights = normal(random, outputs * inputs);
  const auto bias = normal(random, outputs);
  std::vector<float> out(rows * outputs + 1, std::nanf(""));
  out.back() = -7.0F;
  const float* added = with_bias ? bias.data() : nullptr;
  astra::product(x.data(), weights.data(), added, shape, out.data(), threads);
  expect(out.back() == -7.0F, "nothing is written behind the rows");
  auto added_to = normal(random, rows * outputs);
  const auto start = added_to;
  astra::product(x.data(), weights.data(), added, shape, added_to.data(), threads, true);
  for (std::size_t m = 0; m < rows; ++m) {
    for (std::size_t n = 0; n < outputs; ++n) {
      double sum = with_bias ? bias[n] : 0.0;
      for (std::size_t k = 0; k < inputs; ++k) {
        sum += double{x[m * inputs + k]} * double{weights[n * inputs + k]};
      }
      const double bound = 1e-5 * (1.0 + std::sqrt(static_cast<double>(inputs)));
      const std::size_t at = m * outputs + n;
      expect(std::abs(out[at] - sum) <= bound, "a product");
      expect(std::abs(added_to[at] - (start[at] + sum)) <= bound, "a product that is added");
    }
  }
}

// Small whole numbers, which bfloat16 holds: as exact as fp32 is.
void products_of_rounded(std::mt19937& random, astra::ProductShape shape, unsigned threads) {
  const auto [rows, inputs, outputs] = shape;
  const auto whole = [&](std::size_t count) {
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(random() % 33) - 16.0F;
    return values;
  };
  const auto x = whole(rows * inputs), weights = whole(outputs * inputs), bias = whole(outputs);
  const std::size_t even = (inputs + 1) / 2 * 2;
  std::vector<std::uint16_t> halves(outputs * even);
  for (std::size_t n = 0; n < outputs; ++n) {
    for (std::size_t k = 0; k < inputs; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, &weights[n * inputs + k], sizeof bits);
      halves[n * even + k] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
  for (const bool add : {false, true}) {
    std::vector<float> out(rows * outputs + 1, -7.0F), want = out;
    astra::product(x.data(), weights.data(), bias.data(), shape, want.data(), threads, add);
    astra::product_of_rounded(x.data(), halves.data(), bias.data(), shape, out.data(), threads,
                              add);
    expect(out == want, "a product of rounded numbers");
  }
}

void rows_do_not_see_each_other(std::mt19937& random) {
  const astra::ProductShape shape{20, 40, 24};
  auto x = normal(random, shape.rows * shape.inputs);
  const auto weights = normal(random, shape.outputs * shape.inputs);
  std::vector<float> plain(shape.rows * shape.outputs), out(plain.size());
  astra::product(x.data(), weights.data(), nullptr, shape, plain.data(), 1);
  x[7 * shape.inputs + 3] = std::numeric_limits<float>::infinity();
  x[19 * shape.inputs] = std::nanf("");
  astra::product(x.data(), weights.data(), nullptr, shape, out.data(), 1);
  for (std::size_t m = 0; m < shape.rows; ++m) {
    for (std::size_t n = 0; n < shape.outputs; ++n) {
      const float value = out[m * shape.outputs + n];
      const bool touched = m == 7 || m == 19;
      expect(touched ? !std::isfinite(value) : value == plain[m * shape.outputs + n],
             "what is not finite stays in its row");
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const std::size_t rows : {0, 1, 2, 3, 15, 16, 17, 18, 19, 33, 48, 51, 97, 300}) {
    for (const unsigned threads : {1U, 3U}) {
      products(random, {rows, 1, 1}, true, threads);
      products(random, {rows, 17, 33}, false, threads);
      products(random, {rows, 64, 48}, true, threads);
      products(random, {rows, 800, 21}, true, threads);
      products(random, {rows, 0, 5}, true, threads);
      if (!astra::product_rounds()) continue;
      products_of_rounded(random, {rows, 17, 33}, threads);
      products_of_rounded(random, {rows, 64, 48}, threads);
      products_of_rounded(random, {rows, 799, 21}, threads);
      products_of_rounded(random, {rows, 0, 5}, threads);
    }
  }
  rows_do_not_see_each_other(random);
  return failures == 0 ? 0 : 1;
}
