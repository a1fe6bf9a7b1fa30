// Nearest codewords against a plain search in double, ties, what is not finite, threads.

#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "astra/encode.hpp"
#include "expect.hpp"

namespace {

double distance(const float* x, const float* word, std::size_t width) {
  double sum = 0;
  for (std::size_t j = 0; j < width; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(word[j]);
    sum += difference * difference;
  }
  return sum;
}

// Small integers: every score is exact, and there are many ties.
void against_a_plain_search(std::mt19937& random, astra::EncodeShape shape, unsigned threads) {
  std::vector<float> vectors(shape.rows * shape.groups * shape.width);
  std::vector<float> codebook(shape.groups * shape.codewords * shape.width);
  for (float& x : vectors) x = static_cast<float>(static_cast<int>(random() % 5) - 2);
  for (float& x : codebook) x = static_cast<float>(static_cast<int>(random() % 5) - 2);
  std::vector<std::int32_t> codes(shape.rows * shape.groups + 1, -7);
  astra::encode(vectors.data(), codebook.data(), shape, codes.data(), threads);
  expect(codes.back() == -7, "nothing is written behind the codes");
  for (std::size_t i = 0; i + 1 < codes.size(); ++i) {
    const std::size_t group = i % shape.groups;
    std::int32_t want = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t k = 0; k < shape.codewords; ++k) {
      const double found =
          distance(&vectors[i * shape.width],
                   &codebook[(group * shape.codewords + k) * shape.width], shape.width);
      if (found < least) {
        least = found;
        want = static_cast<std::int32_t>(k);
      }
    }
    expect(codes[i] == want, "the nearest codeword, and the first of several");
  }
}

void what_is_not_finite() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> codebook = {nan, 0, infinity, 0, 1, 1, 2, 2};
  const std::vector<float> vectors = {2, 2, nan, 0, infinity, 0, -infinity, infinity};
  std::vector<std::int32_t> codes(4);
  astra::encode(vectors.data(), codebook.data(), {4, 1, 2, 4}, codes.data());
  expect(codes[0] == 3, "a finite distance is preferred");
  expect(codes[1] == 0 && codes[2] == 0 && codes[3] == 0, "code 0 where none is finite");
}

void bad_sizes() {
  for (const std::size_t codewords : {std::size_t{0}, std::size_t{65537}}) {
    bool refused = false;
    try {
      astra::encode(nullptr, nullptr, {1, 1, 1, codewords}, nullptr);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    expect(refused, "a number of codewords that no code has");
  }
  astra::encode(nullptr, nullptr, {0, 3, 4, 5}, nullptr);
}

}  // namespace

int main() {
  std::mt19937 random(5);
  for (const std::size_t rows : {1, 2, 5, 12, 13, 95, 96, 97, 200}) {
    for (const std::size_t codewords : {1, 2, 15, 16, 17, 64, 100}) {
      against_a_plain_search(random, {rows, 1 + rows % 3, 1 + codewords % 9, codewords}, 1);
    }
  }
  against_a_plain_search(random, {2000, 3, 8, 256}, 4);
  what_is_not_finite();
  bad_sizes();
  if (failures == 0) std::puts("encode: all passed");
  return failures == 0 ? 0 : 1;
}
