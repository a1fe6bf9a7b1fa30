// Attention against its definition in double, on every instruction set that the machine has: sizes
// around those of vectors, panels and tiles, masks, what is not finite, threads.

#include "astra/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "astra/bitpack.hpp"
#include "expect.hpp"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kGuard = -777.0F;

struct Example {
  astra::AttentionShape shape;
  std::size_t count;
  bool is_causal;
  std::vector<float> query, key, value;
  std::vector<std::uint8_t> mask;  // empty: none
  std::vector<float> out, lse;     // each with a guard behind it
  float scale = 0.25F;
  bool rounded = false;

  double tolerance() const { return rounded ? 0.05 : 1e-5; }

  std::size_t rows() const { return shape.batch * shape.heads * shape.rows; }

  void poison() {
    out.assign(rows() * shape.width + 1, kGuard);
    lse.assign(rows() + 1, kGuard);
  }

  void run(const std::string& isa, unsigned threads) {
    poison();
    const std::size_t d = shape.width;
    const astra::Queries queries = asked(isa, threads);
    const astra::HeadStrides strides{shape.kv_heads * count * d, count * d, d};
    const astra::DenseKeys dense{count,        key.data(), strides,
                                 value.data(), strides,    mask.empty() ? nullptr : mask.data(),
                                 is_causal};
    astra::attention(queries, dense);
  }

  astra::Queries asked(const std::string& isa, unsigned threads) {
    const std::size_t d = shape.width;
    astra::Queries queries{};
    queries.shape = shape;
    queries.query = query.data();
    queries.query_strides = {shape.heads * shape.rows * d, shape.rows * d, d};
    // Outputs as [batch, rows, heads, width].
    queries.out = out.data();
    queries.out_strides = {shape.rows * shape.heads * d, d, shape.heads * d};
    queries.lse = lse.data();
    queries.scale = scale;
    queries.threads = threads;
    queries.isa = isa.c_str();
    queries.rounded = rounded;
    return queries;
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
    expect(total == 0 ? got == -std::numeric_limits<double>::infinity() : least < tolerance(),
           "lse, " + what);
    for (std::size_t c = 0; c < d; ++c) {
      const double exact = total == 0 ? 0 : want[c] / total;
      const auto ours = static_cast<double>(out[((b * shape.rows + m) * shape.heads + h) * d + c]);
      expect(std::abs(ours - exact) < tolerance(), "out, " + what);
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
      const astra::AttentionShape shape{1 + rows % 2, 2 * group, 2, rows, width, width};
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

// Rounded to bfloat16 or not, whichever the machine is quicker with.
void rounded_near_the_definition(const std::string& isa) {
  std::mt19937 random(11);
  for (const std::size_t width : {5, 16, 33, 64, 72}) {
    for (const std::size_t rows : {9, 17, 50}) {
      const std::size_t count = 1 + random() % 150;
      const astra::AttentionShape shape{2, 4, 2, rows, width, width};
      const bool is_causal = count >= rows && random() % 2 != 0;
      Example example = random_example(random, shape, count, is_causal, random() % 2 != 0);
      example.scale = 1.0F / std::sqrt(static_cast<float>(width));
      example.rounded = true;
      example.run(isa, 2);
      example.check("rounded, " + isa + ", width " + std::to_string(width) + ", rows " +
                    std::to_string(rows) + ", keys " + std::to_string(count));
    }
  }
}

void the_same_on_any_number_of_threads(const std::string& isa) {
  std::mt19937 random(8);
  for (const std::size_t rows : {1, 300}) {
    Example example = random_example(random, {2, 3, 3, rows, 64, 64}, 700, true, false);
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
    Example hidden = random_example(random, {1, 2, 1, rows, 16, 16}, 40, true, false);
    hidden.mask.assign(40, 0);
    hidden.run(isa, 1);
    hidden.check("all hidden, " + isa);
    Example none = random_example(random, {1, 2, 1, rows, 16, 16}, 0, false, false);
    none.run(isa, 1);
    none.check("no keys, " + isa);
    Example partly = random_example(random, {1, 2, 1, rows, 16, 16}, 40, true, false);
    partly.mask.assign(40, 0);
    std::fill(partly.mask.begin() + 20, partly.mask.end(), std::uint8_t{1});
    partly.run(isa, 1);
    partly.check("the first keys hidden, " + isa);
  }
}

void what_is_no_number(const std::string& isa) {
  std::mt19937 random(10);
  for (const std::size_t rows : {1, 40}) {
    Example example = random_example(random, {1, 1, 1, rows, 16, 16}, 30, false, false);
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
    Example example = random_example(random, {1, 1, 1, rows, 16, 16}, 200, false, false);
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

// bf16: the upper half of a float.
std::vector<std::uint16_t> halves_of(std::vector<float>& floats) {
  std::vector<std::uint16_t> halves;
  for (float& x : floats) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    halves.push_back(static_cast<std::uint16_t>(bits >> 16));
    bits &= 0xffff0000;
    std::memcpy(&x, &bits, sizeof bits);
  }
  return halves;
}

void halves_as_the_floats_that_they_are(const std::string& isa) {
  std::mt19937 random(14);
  for (const std::size_t rows : {1, 40}) {
    for (const std::size_t width : {16, 37}) {
      Example example = random_example(random, {2, 4, 2, rows, width, width}, 90, true, true);
      const auto query = halves_of(example.query);
      const auto key = halves_of(example.key);
      const auto value = halves_of(example.value);
      example.run(isa, 2);
      const std::vector<float> out = example.out;
      const std::vector<float> lse = example.lse;
      std::vector<std::uint16_t> rounded(out.size(), 0x1234);
      example.poison();
      astra::Queries queries = example.asked(isa, 2);
      queries.storage = astra::Storage::kBfloat16;
      queries.query = query.data();
      queries.out = rounded.data();
      const astra::HeadStrides strides{2 * 90 * width, 90 * width, width};
      const astra::DenseKeys dense{90,      key.data(),          strides, value.data(),
                                   strides, example.mask.data(), true};
      astra::attention(queries, dense);
      expect(example.lse == lse, "lse of halves, " + isa);
      expect(rounded.back() == 0x1234, "nothing is written behind halves, " + isa);
      for (std::size_t i = 0; i + 1 < out.size(); ++i) {
        const std::uint32_t bits = std::uint32_t{rounded[i]} << 16;
        float got = 0;
        std::memcpy(&got, &bits, sizeof got);
        expect(std::abs(got - out[i]) <= std::abs(out[i]) / 256, "out of halves, " + isa);
      }
    }
  }
}

// Codes of two stages and groups in tables of 37 codewords, as a dense call has what they stand
// for.
struct CodedExample {
  static constexpr std::size_t kStages = 2, kGroups = 2, kWords = 37, kBits = 6, kWidth = 16;
  Example dense;
  std::vector<std::int32_t> codes;
  std::vector<std::uint8_t> packed;
  std::vector<float> key_table, value_table, cos, sin;

  CodedExample(std::mt19937& random, std::size_t rows, std::size_t count)
      : dense(random_example(random, {2, 4, 2, rows, kWidth, kWidth}, count, false, false)) {
    std::normal_distribution<float> normal;
    key_table.resize(kStages * 2 * kGroups * kWords * kWidth / kGroups);
    value_table.resize(key_table.size());
    for (auto* numbers : {&key_table, &value_table}) {
      for (float& x : *numbers) x = normal(random);
    }
    for (std::size_t i = 0; i < 2 * count * per_token(); ++i) {
      codes.push_back(static_cast<std::int32_t>(random() % kWords));
    }
    const std::size_t bytes = astra::packed_size(count * per_token(), kBits);
    packed.resize(2 * bytes);
    for (std::size_t b = 0; b < 2; ++b) {
      astra::pack(&codes[b * count * per_token()], count * per_token(), kBits, &packed[b * bytes],
                  bytes);
    }
    for (std::size_t i = 0; i < count * kWidth; ++i) {
      const auto angle = static_cast<float>(i % (kWidth / 2) + i / kWidth);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    look_up();
  }

  static std::size_t per_token() { return kStages * 2 * kGroups; }

  // Keys and values of the dense call.
  void look_up() {
    const std::size_t count = dense.count;
    const std::size_t wide = kWidth / kGroups;
    for (std::size_t row = 0; row < 4 * count; ++row) {
      const std::size_t head = row / count % 2;
      const std::int32_t* own = &codes[(row / count / 2 * count + row % count) * per_token()];
      std::vector<float> key(kWidth), value(kWidth);
      for (std::size_t c = 0; c < kWidth; ++c) {
        for (std::size_t stage = 0; stage < kStages; ++stage) {
          const std::size_t place = (stage * 2 + head) * kGroups + c / wide;
          const std::size_t word = place * kWords + static_cast<std::size_t>(own[place]);
          key[c] += key_table[word * wide + c % wide];
          value[c] += value_table[word * wide + c % wide];
        }
      }
      for (std::size_t c = 0; c < kWidth; ++c) {
        const std::size_t half = kWidth / 2;
        const float other = c < half ? -key[c + half] : key[c - half];
        const std::size_t angle = row % count * kWidth + c;
        dense.key[row * kWidth + c] = key[c] * cos[angle] + other * sin[angle];
        dense.value[row * kWidth + c] = value[c];
      }
    }
  }

  astra::CodedKeys coded(bool in_bits) const {
    const std::size_t count = dense.count;
    astra::TokenCodes tokens{codes.data(), 0, per_token(), count * per_token()};
    if (in_bits) tokens = {packed.data(), kBits, per_token(), packed.size() / 2};
    return {count,
            tokens,
            {key_table.data(), kStages, kGroups, kWords},
            tokens,
            {value_table.data(), kStages, kGroups, kWords},
            cos.data(),
            sin.data(),
            0,
            dense.mask.empty() ? nullptr : dense.mask.data()};
  }
};

void codes_as_what_they_stand_for(const std::string& isa) {
  std::mt19937 random(13);
  for (const std::size_t rows : {1, 40}) {
    CodedExample example(random, rows, 150);
    for (const bool in_bits : {false, true}) {
      example.dense.poison();
      const astra::Queries queries = example.dense.asked(isa, 2);
      expect(astra::coded_attention(queries, example.coded(in_bits)) == astra::CodesFound::kGood,
             "good codes, " + isa);
      example.dense.check("codes, " + isa);
      if (example.dense.mask.empty()) {
        for (std::size_t i = 0; i < 300; ++i) example.dense.mask.push_back(random() % 2);
      }
    }
    example.codes[77 * example.per_token()] = -1;
    example.dense.mask.assign(300, 1);
    const astra::Queries queries = example.dense.asked(isa, 1);
    expect(astra::coded_attention(queries, example.coded(false)) != astra::CodesFound::kGood,
           "a code that no table has, " + isa);
    example.dense.mask[77] = 0;
    expect(astra::coded_attention(queries, example.coded(false)) == astra::CodesFound::kGood,
           "such a code where it is hidden, " + isa);
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
  Example heads = random_example(random, {1, 3, 2, 2, 8, 8}, 4, false, false);
  expect(refuses([&] { heads.run("", 1); }), "heads that are no multiple");
  Example isa = random_example(random, {1, 2, 2, 2, 8, 8}, 4, true, false);
  expect(refuses([&] { isa.run("mmx", 1); }), "an instruction set that is not there");
}

}  // namespace

int main() {
  for (const std::string& isa : astra::attention_isas()) {
    against_the_definition(isa);
    rounded_near_the_definition(isa);
    the_same_on_any_number_of_threads(isa);
    what_sees_nothing(isa);
    what_is_no_number(isa);
    scores_far_apart(isa);
    halves_as_the_floats_that_they_are(isa);
    codes_as_what_they_stand_for(isa);
  }
  bad_sizes();
  if (failures == 0) std::puts("attention: all passed");
  return failures == 0 ? 0 : 1;
}
