// Attention against its definition in double, on every instruction set that the machine has: sizes
// around those of vectors, panels and tiles, masks, what is not finite, threads.

#include "astra/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kGuard = -777.0F;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  if (++failures > 20) std::exit(1);
}

struct Example {
  astra::AttentionShape shape;
  std::size_t count;
  bool is_causal;
  std::vector<float> query, key, value;
  std::vector<std::uint8_t> mask;  // empty: none
  std::vector<float> out, lse;     // each with a guard behind it
  float scale = 0.25F;

  std::size_t rows() const { return shape.batch * shape.heads * shape.rows; }

  void run(const std::string& isa, unsigned threads) {
    out.assign(rows() * shape.width + 1, kGuard);
    lse.assign(rows() + 1, kGuard);
    const std::size_t d = shape.width;
    // Outputs as [batch, rows, heads, width].
    const astra::Queries queries{shape,
                                 query.data(),
                                 {shape.heads * shape.rows * d, shape.rows * d, d},
                                 out.data(),
                                 {shape.rows * shape.heads * d, d, shape.heads * d},
                                 lse.data(),
                                 scale,
                                 threads,
                                 isa.c_str()};
    const astra::HeadStrides strides{shape.kv_heads * count * d, count * d, d};
    const astra::DenseKeys dense{count,        key.data(), strides,
                                 value.data(), strides,    mask.empty() ? nullptr : mask.data(),
                                 is_causal};
    astra::attention(queries, dense);
  }

  bool sees(std::size_t b, std::size_t m, std::size_t n) const {
    if (is_causal && n + shape.rows > count + m) return false;
    return mask.empty() || mask[b * count + n] != 0;
  }

  double score(std::size_t b, std::size_t h, std::size_t m, std::size_t n) const {
    const std::size_t d = shape.width;
    const std::size_t kv = h / (shape.heads / shape.kv_heads);
    const float* q = &query[((b * shape.heads + h) * shape.rows + m) * d];
    const float* k = &key[((b * shape.kv_heads + kv) * count + n) * d];
    double sum = 0;
    for (std::size_t c = 0; c < d; ++c)
      sum += static_cast<double>(q[c]) * static_cast<double>(k[c]);
    return sum * static_cast<double>(scale);
  }

  void check_row(std::size_t b, std::size_t h, std::size_t m, const std::string& what) const {
    const std::size_t d = shape.width;
    const std::size_t kv = h / (shape.heads / shape.kv_heads);
    std::vector<double> want(d);
    double top = -std::numeric_limits<double>::infinity();
    double total = 0;
    for (std::size_t n = 0; n < count; ++n) {
      if (sees(b, m, n)) top = std::max(top, score(b, h, m, n));
    }
    for (std::size_t n = 0; n < count; ++n) {
      if (!sees(b, m, n)) continue;
      const double weight = std::exp(score(b, h, m, n) - top);
      total += weight;
      const float* v = &value[((b * shape.kv_heads + kv) * count + n) * d];
      for (std::size_t c = 0; c < d; ++c) want[c] += weight * static_cast<double>(v[c]);
    }
    const auto got = static_cast<double>(lse[(b * shape.heads + h) * shape.rows + m]);
    const double least = total == 0 ? got : std::abs(top + std::log(total) - got);
    expect(total == 0 ? got == -std::numeric_limits<double>::infinity() : least < 1e-5,
           "lse, " + what);
    for (std::size_t c = 0; c < d; ++c) {
      const double exact = total == 0 ? 0 : want[c] / total;
      const auto ours = static_cast<double>(out[((b * shape.rows + m) * shape.heads + h) * d + c]);
      expect(std::abs(ours - exact) < 1e-5, "out, " + what);
    }
  }

  void check(const std::string& what) const {
    for (std::size_t b = 0; b < shape.batch; ++b) {
      for (std::size_t h = 0; h < shape.heads; ++h) {
        for (std::size_t m = 0; m < shape.rows; ++m) check_row(b, h, m, what);
      }
    }
    expect(out.back() == kGuard && lse.back() == kGuard, "nothing is written behind, " + what);
  }
};

Example random_example(std::mt19937& random, astra::AttentionShape shape, std::size_t count,
                       bool is_causal, bool masked) {
  Example example{shape, count, is_causal, {}, {}, {}, {}, {}, {}};
  std::normal_distribution<float> normal;
  example.query.resize(example.rows() * shape.width);
  example.key.resize(shape.batch * shape.kv_heads * count * shape.width);
  example.value.resize(example.key.size());
  for (auto* numbers : {&example.query, &example.key, &example.value}) {
    for (float& x : *numbers) x = normal(random);
  }
  if (!masked) return example;
  for (std::size_t i = 0; i < shape.batch * count; ++i) example.mask.push_back(random() % 3 != 0);
  // What hidden keys and values hold never matters.
  for (std::size_t i = 0; i < example.key.size(); ++i) {
    const std::size_t b = i / (shape.kv_heads * count * shape.width);
    if (example.mask[b * count + i / shape.width % count] != 0) continue;
    example.key[i] = kNaN;
    example.value[i] = kInfinity;
  }
  return example;
}

void against_the_definition(const std::string& isa) {
  std::mt19937 random(7);
  for (const std::size_t width : {1, 5, 8, 16, 33, 64, 72}) {
    for (const std::size_t rows : {1, 2, 7, 16, 17, 50}) {
      const std::size_t group = 1 + random() % 3;
      const astra::AttentionShape shape{1 + rows % 2, 2 * group, 2, rows, width};
      const std::size_t count = rows + random() % 90;
      const bool is_causal = random() % 2 != 0;
      const bool masked = random() % 2 != 0;
      Example example = random_example(random, shape, count, is_causal, masked);
      example.run(isa, static_cast<unsigned>(1 + random() % 3));
      example.check(isa + ", width " + std::to_string(width) + ", rows " + std::to_string(rows) +
                    ", keys " + std::to_string(count));
    }
  }
}

void the_same_on_any_number_of_threads(const std::string& isa) {
  std::mt19937 random(8);
  for (const std::size_t rows : {1, 300}) {
    Example example = random_example(random, {2, 3, 3, rows, 64}, 700, true, false);
    example.run(isa, 1);
    const std::vector<float> out = example.out;
    const std::vector<float> lse = example.lse;
    for (const unsigned threads : {2U, 5U}) {
      example.run(isa, threads);
      expect(example.out == out && example.lse == lse, "the same bits, " + isa);
    }
  }
}

void what_sees_nothing(const std::string& isa) {
  std::mt19937 random(9);
  for (const std::size_t rows : {1, 40}) {
    Example hidden = random_example(random, {1, 2, 1, rows, 16}, 40, true, false);
    hidden.mask.assign(40, 0);
    hidden.run(isa, 1);
    hidden.check("all hidden, " + isa);
    Example none = random_example(random, {1, 2, 1, rows, 16}, 0, false, false);
    none.run(isa, 1);
    none.check("no keys, " + isa);
    Example partly = random_example(random, {1, 2, 1, rows, 16}, 40, true, false);
    partly.mask.assign(40, 0);
    std::fill(partly.mask.begin() + 20, partly.mask.end(), std::uint8_t{1});
    partly.run(isa, 1);
    partly.check("the first keys hidden, " + isa);
  }
}

void what_is_no_number(const std::string& isa) {
  std::mt19937 random(10);
  for (const std::size_t rows : {1, 40}) {
    Example example = random_example(random, {1, 1, 1, rows, 16}, 30, false, false);
    example.query[3] = kNaN;
    example.run(isa, 1);
    expect(std::isnan(example.lse[0]), "lse of a query that is no number, " + isa);
    for (std::size_t c = 0; c < 16; ++c) expect(std::isnan(example.out[c]), "its out, " + isa);
    for (std::size_t m = 1; m < rows; ++m) example.check_row(0, 0, m, "beside it, " + isa);

    example.query[3] = 0.5F;
    example.value[17 * 16 + 2] = kNaN;
    example.run(isa, 1);
    expect(std::isnan(example.out[2]) && !std::isnan(example.out[1]), "a value, " + isa);

    // Scores of -inf weigh nothing, and where there are no others nothing was seen.
    std::fill(example.value.begin(), example.value.end(), 1.0F);
    std::fill(example.key.begin(), example.key.end(), 1.0F);
    example.query[3] = -kInfinity;
    example.run(isa, 1);
    expect(example.lse[0] == -kInfinity && example.out[0] == 0.0F, "scores of -inf, " + isa);
  }
}

void scores_far_apart(const std::string& isa) {
  std::mt19937 random(11);
  for (const std::size_t rows : {1, 40}) {
    Example example = random_example(random, {1, 1, 1, rows, 16}, 200, false, false);
    for (float& x : example.query) x *= 30;
    example.run(isa, 1);
    // The error of a score grows with it.
    for (std::size_t m = 0; m < rows; ++m) {
      double top = -1e300;
      for (std::size_t n = 0; n < 200; ++n) top = std::max(top, example.score(0, 0, m, n));
      const auto lse = static_cast<double>(example.lse[m]);
      expect(lse >= top - 1e-4 && lse < top + 6, "large scores, " + isa);
    }
  }
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void bad_sizes() {
  std::mt19937 random(12);
  Example heads = random_example(random, {1, 3, 2, 2, 8}, 4, false, false);
  expect(refuses([&] { heads.run("", 1); }), "heads that are no multiple");
  Example causal = random_example(random, {1, 2, 2, 5, 8}, 4, true, false);
  expect(refuses([&] { causal.run("", 1); }), "more queries than keys under a causal mask");
  Example isa = random_example(random, {1, 2, 2, 2, 8}, 4, true, false);
  expect(refuses([&] { isa.run("mmx", 1); }), "an instruction set that is not there");
}

}  // namespace

int main() {
  for (const std::string& isa : astra::attention_isas()) {
    against_the_definition(isa);
    the_same_on_any_number_of_threads(isa);
    what_sees_nothing(isa);
    what_is_no_number(isa);
    scores_far_apart(isa);
  }
  bad_sizes();
  if (failures == 0) std::puts("attention: all passed");
  return failures == 0 ? 0 : 1;
}
