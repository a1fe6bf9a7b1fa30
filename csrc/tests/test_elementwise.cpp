// RMS norm, the gate of an MLP, rotary positions and merged softmaxes against formulas in double.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "astra/elementwise.hpp"
#include "expect.hpp"

namespace {

bool close(float got, double want) { return std::abs(got - want) <= 2e-6 * (1 + std::abs(want)); }

std::vector<float> normal(std::mt19937& random, std::size_t count) {
  std::normal_distribution<float> draw(0.0F, 3.0F);
  std::vector<float> values(count);
  for (float& x : values) x = draw(random);
  return values;
}

void norms(std::mt19937& random, std::size_t rows, std::size_t width, unsigned threads) {
  const auto x = normal(random, rows * width), weight = normal(random, width);
  std::vector<float> out(rows * width + 1, -7.0F);
  astra::rms_norm(x.data(), weight.data(), rows, width, 1e-5F, out.data(), threads);
  expect(out.back() == -7.0F, "nothing is written behind the rows");
  for (std::size_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (std::size_t i = 0; i < width; ++i) sum += std::pow(double{x[r * width + i]}, 2);
    const double scale = 1 / std::sqrt(sum / static_cast<double>(width) + 1e-5);
    for (std::size_t i = 0; i < width; ++i) {
      expect(close(out[r * width + i], weight[i] * x[r * width + i] * scale), "RMS norm");
    }
  }
}

void gates(std::mt19937& random, std::size_t count, unsigned threads) {
  const auto gate = normal(random, count);
  auto up = normal(random, count);
  const auto before = up;
  astra::gated_silu(gate.data(), up.data(), count, up.data(), threads);
  for (std::size_t i = 0; i < count; ++i) {
    const double want = gate[i] / (1 + std::exp(-double{gate[i]})) * before[i];
    expect(close(up[i], want), "the gate, written over its factor");
  }
}

void gates_of_all_sizes() {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> gate = {0, -0.0F, -87, -1000, 1000, 3e38F, infinity, std::nanf("")};
  std::vector<float> out(gate.size());
  const std::vector<float> ones(gate.size(), 1.0F);
  astra::gated_silu(gate.data(), ones.data(), gate.size(), out.data());
  expect(out[0] == 0 && out[1] == 0 && std::abs(out[2]) < 1e-35F && out[3] == 0, "small gates");
  expect(out[4] == 1000 && out[5] == 3e38F && out[6] == infinity, "large gates");
  expect(std::isnan(out[7]), "NaN stays");
}

// x with heads inside of tokens, as a projection gives it; out with tokens inside of heads.
void rotations(std::mt19937& random, const astra::RotateShape& shape, unsigned threads) {
  const auto [batch, heads, tokens, width, angle_stride] = shape;
  const std::size_t count = batch * heads * tokens * width;
  const auto x = normal(random, count);
  const auto cos = normal(random, batch * tokens * width);
  const auto sin = normal(random, batch * tokens * width);
  std::vector<float> out(count);
  const astra::RowStrides inside{tokens * heads * width, width, heads * width};
  const astra::RowStrides outside{heads * tokens * width, tokens * width, width};
  astra::rotate(x.data(), inside, cos.data(), sin.data(), shape, out.data(), outside, threads);
  auto same = x;
  astra::rotate(same.data(), inside, cos.data(), sin.data(), shape, same.data(), inside, threads);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t c = i % width, n = i / width % tokens, h = i / width / tokens % heads;
    const std::size_t b = i / width / tokens / heads;
    const float* row = &x[b * inside[0] + h * inside[1] + n * inside[2]];
    const std::size_t angle = b * angle_stride + n * width + c;
    const bool first = c < width / 2;
    const double other = first ? -double{row[c + width / 2]} : double{row[c - width / 2]};
    const double want = double{row[c]} * cos[angle] + other * sin[angle];
    expect(std::abs(out[i] - want) < 1e-4, "rotary positions");
    expect(same[b * inside[0] + h * inside[1] + n * inside[2] + c] == out[i], "in place");
  }
}

void merges(std::mt19937& random, std::size_t rows, std::size_t width, unsigned threads) {
  const auto a = normal(random, rows * width), b = normal(random, rows * width);
  const auto lse_a = normal(random, rows), lse_b = normal(random, rows);
  std::vector<float> out(rows * width), lse(rows);
  astra::merge_state(a.data(), lse_a.data(), b.data(), lse_b.data(), rows, width, out.data(),
                     lse.data(), threads);
  for (std::size_t r = 0; r < rows; ++r) {
    const double one = std::exp(double{lse_a[r]}), other = std::exp(double{lse_b[r]});
    expect(close(lse[r], std::log(one + other)), "the sum of two softmaxes");
    for (std::size_t i = r * width; i < (r + 1) * width; ++i) {
      expect(std::abs(out[i] - (one * a[i] + other * b[i]) / (one + other)) < 1e-5, "their mean");
    }
  }
}

void merges_of_nothing() {
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> a = {1, nan, nan, 4, 5}, b = {nan, 2, nan, 6, 7};
  const std::vector<float> lse_a = {3, -infinity, -infinity, infinity, nan};
  const std::vector<float> lse_b = {-infinity, 4, -infinity, 0, -infinity};
  std::vector<float> out(5), lse(5);
  astra::merge_state(a.data(), lse_a.data(), b.data(), lse_b.data(), 5, 1, out.data(), lse.data());
  expect(out[0] == 1 && lse[0] == 3 && out[1] == 2 && lse[1] == 4, "one side is empty");
  expect(out[2] == 0 && lse[2] == -infinity, "both are");
  expect(std::isnan(out[3]) && std::isnan(lse[3]) && std::isnan(out[4]) && std::isnan(lse[4]),
         "no logarithm of a sum");
}

// One state with heads inside of tokens, another with tokens inside of heads: as rows in a row.
void merges_in_place(std::mt19937& random, const astra::StateShape& shape, unsigned threads) {
  const auto [batch, heads, tokens, width] = shape;
  const std::size_t rows = batch * heads * tokens;
  const auto a = normal(random, rows * width), b = normal(random, rows * width);
  const auto lse_a = normal(random, rows), lse_b = normal(random, rows);
  std::vector<float> want(rows * width), want_lse(rows), inside(rows * width), lse(lse_a);
  astra::merge_state(a.data(), lse_a.data(), b.data(), lse_b.data(), rows, width, want.data(),
                     want_lse.data());
  const auto place = [&](std::size_t r) {  // of row r of `a` with heads inside of tokens
    const std::size_t n = r % tokens, h = r / tokens % heads, batch_row = r / tokens / heads;
    return ((batch_row * tokens + n) * heads + h) * width;
  };
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < width; ++i) inside[place(r) + i] = a[r * width + i];
  }
  const astra::RowStrides by_heads{heads * tokens, tokens, 1};
  auto other = b;
  auto other_lse = lse_b;
  astra::merge_into(
      {inside.data(), {tokens * heads * width, width, heads * width}, lse.data(), by_heads},
      {other.data(), {heads * tokens * width, tokens * width, width}, other_lse.data(), by_heads},
      shape, threads);
  expect(lse == want_lse && other == b && other_lse == lse_b, "one side becomes both");
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < width; ++i) {
      expect(inside[place(r) + i] == want[r * width + i], "rows anywhere");
    }
  }
}

void finite_values(std::mt19937& random, const astra::StateShape& shape) {
  auto x = normal(random, shape.batch * shape.heads * shape.tokens * shape.width);
  const std::size_t row = shape.width, plane = shape.tokens * row;
  const astra::RowStrides strides{shape.heads * plane, plane, row};
  expect(astra::all_finite(x.data(), strides, shape), "all are");
  for (float wrong : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (const std::size_t at : {std::size_t{0}, x.size() / 2, x.size() - 1}) {
      std::swap(x[at], wrong);
      expect(!astra::all_finite(x.data(), strides, shape), "one is not");
      std::swap(x[at], wrong);
    }
  }
  x.back() = std::numeric_limits<float>::max();
  x.front() = -x.back();
  expect(astra::all_finite(x.data(), strides, shape), "the largest are");
}

void codewords(std::mt19937& random) {
  const std::size_t rows = 5, groups = 3, count = 4, width = 7;
  const auto tables = normal(random, groups * count * width);
  std::vector<std::int32_t> codes(rows * groups);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int>(i * 7 % count);
  std::vector<float> out(rows * groups * width);
  expect(astra::look_up(codes.data(), tables.data(), rows, groups, count, width, out.data()),
         "there");
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t group = i / width % groups, code = codes[i / width];
    expect(out[i] == tables[(group * count + code) * width + i % width], "a code's codeword");
  }
  for (const std::int32_t wrong : {-1, 4, 1 << 30}) {
    codes.back() = wrong;
    expect(!astra::look_up(codes.data(), tables.data(), rows, groups, count, width, out.data()),
           "no codeword");
  }
}

void rows_of_tables(std::mt19937& random) {
  const std::size_t rows = 70, groups = 3, count = 5;
  for (const std::size_t width : {1, 7, 16, 40, 128, 300}) {
    const auto wide = normal(random, groups * count * width);
    std::vector<std::uint16_t> tables(wide.size());
    std::vector<float> numbers(wide.size());  // what is left of them in bfloat16
    for (std::size_t i = 0; i < wide.size(); ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &wide[i], sizeof(bits));
      tables[i] = static_cast<std::uint16_t>(bits >> 16);
      bits = std::uint32_t{tables[i]} << 16;
      std::memcpy(&numbers[i], &bits, sizeof(bits));
    }
    std::vector<std::int32_t> codes(rows * groups);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int>(i * 7 % 6) - 1;
    const auto start = normal(random, rows * width);
    for (const unsigned threads : {1U, 3U}) {
      auto out = start;
      expect(astra::add_rows(codes.data(), tables.data(), rows, groups, count, width, out.data(),
                             threads),
             "there");
      for (std::size_t i = 0; i < out.size(); ++i) {
        double sum = start[i];
        for (std::size_t g = 0; g < groups; ++g) {
          const std::int32_t code = codes[i / width * groups + g];
          if (code < 0) continue;
          sum += numbers[(g * count + static_cast<std::size_t>(code)) * width + i % width];
        }
        expect(std::abs(out[i] - sum) < 1e-5, "the sum of the rows");
      }
    }
    auto out = start;
    codes.back() = count;
    expect(!astra::add_rows(codes.data(), tables.data(), rows, groups, count, width, out.data()),
           "no row");
    expect(out == start, "nothing is added");
  }
}

void bad_sizes() {
  bool refused = false;
  try {
    astra::rotate(nullptr, {}, nullptr, nullptr, {1, 1, 1, 3, 0}, nullptr, {});
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "halves of an odd width");
  astra::rms_norm(nullptr, nullptr, 0, 8, 1e-6F, nullptr);
  astra::gated_silu(nullptr, nullptr, 0, nullptr);
  expect(astra::all_finite(nullptr, {}, {1, 0, 4, 4}), "nothing is finite");
  expect(astra::look_up(nullptr, nullptr, 0, 1, 1, 1, nullptr), "of no codes");
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (const std::size_t width : {1, 3, 4, 15, 16, 17, 63, 64, 100, 576}) {
    norms(random, 1 + width % 4, width, 1);
    gates(random, width, 1);
    for (const std::size_t batch : {1, 3}) {
      const std::size_t tokens = 1 + width % 5;
      rotations(random, {batch, 2, tokens, 2 * width, 0}, 1);
      rotations(random, {batch, 3, tokens, 2 * width, tokens * 2 * width}, 1);
    }
  }
  norms(random, 300, 576, 4);
  gates(random, 100'000, 4);
  rotations(random, {2, 9, 200, 64, 0}, 4);
  merges(random, 300, 64, 4);
  merges(random, 3, 37, 1);
  for (const std::size_t width : {1, 6, 17, 64}) {
    merges_in_place(random, {2, 3, 5, width}, 1);
    finite_values(random, {2, 3, 5, width});
  }
  merges_in_place(random, {2, 9, 200, 64}, 4);
  codewords(random);
  rows_of_tables(random);
  gates_of_all_sizes();
  merges_of_nothing();
  bad_sizes();
  if (failures == 0) std::puts("elementwise: all passed");
  return failures == 0 ? 0 : 1;
}
