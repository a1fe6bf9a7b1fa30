// Linear layers of integer weights against sums in double, on every instruction set.

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "astra/linear.hpp"
#include "expect.hpp"

namespace {

struct Layer {
  std::vector<std::uint8_t> values;  // int8, or two of 4 bits
  std::vector<float> scales, minima, bias;
};

Layer random_layer(std::mt19937& random, const astra::LinearShape& shape, int bits) {
  Layer layer;
  layer.values.resize(shape.outputs * shape.inputs * static_cast<std::size_t>(bits) / 8);
  for (auto& value : layer.values) {
    value = static_cast<std::uint8_t>(random());
    if (bits == 8 && value == 128) value = 0;
  }
  std::uniform_real_distribution<float> unit(0.1F, 1.0F);
  for (std::size_t i = 0; i < shape.outputs * shape.groups; ++i) {
    layer.scales.push_back(unit(random));
    if (bits == 4) layer.minima.push_back(-8.0F * unit(random));
  }
  for (std::size_t i = 0; i < shape.outputs; ++i) layer.bias.push_back(unit(random));
  return layer;
}

double weight(const Layer& layer, const astra::LinearShape& shape, int bits, std::size_t n,
              std::size_t k) {
  const std::size_t group = n * shape.groups + k / (shape.inputs / shape.groups);
  const double scale = static_cast<double>(layer.scales[group]);
  const std::size_t at = n * shape.inputs + k;
  if (bits == 8) return scale * static_cast<std::int8_t>(layer.values[at]);
  const int half = k % 2 == 0 ? layer.values[at / 2] & 15 : layer.values[at / 2] >> 4;
  return scale * half + static_cast<double>(layer.minima[group]);
}

// Whole numbers up to 127, one of them in every group: rounding changes nothing.
std::vector<float> whole_inputs(std::mt19937& random, const astra::LinearShape& shape) {
  std::vector<float> x(shape.rows * shape.inputs);
  const std::size_t width = shape.inputs / shape.groups;
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = i % width == 0 ? 127.0F : static_cast<float>(static_cast<int>(random() % 255) - 127);
  }
  return x;
}

astra::LinearWeights weights_of(const Layer& layer, int bits) {
  return {layer.values.data(),
          layer.scales.data(),
          bits == 4 ? layer.minima.data() : nullptr,
          layer.bias.data(),
          bits,
          false};
}

void against_sums_in_double(std::mt19937& random, astra::LinearShape shape, int bits,
                            const std::string& isa) {
  const Layer layer = random_layer(random, shape, bits);
  const std::vector<float> x = whole_inputs(random, shape);
  std::vector<float> out(shape.rows * shape.outputs + 1, -7.0F);
  for (unsigned threads : {1U, 4U}) {
    astra::quantized_linear(x.data(), weights_of(layer, bits), shape, out.data(), threads,
                            isa.c_str());
    expect(out.back() == -7.0F, isa + ": nothing is written behind the outputs");
    for (std::size_t i = 0; i + 1 < out.size(); ++i) {
      const std::size_t row = i / shape.outputs, n = i % shape.outputs;
      double sum = static_cast<double>(layer.bias[n]), most = 1.0;
      for (std::size_t k = 0; k < shape.inputs; ++k) {
        const double product =
            weight(layer, shape, bits, n, k) * static_cast<double>(x[row * shape.inputs + k]);
        sum += product;
        most += std::fabs(product);
      }
      expect(std::fabs(static_cast<double>(out[i]) - sum) < 1e-5 * most, isa + ": the sum");
    }
  }
}

void several_with_one_input(std::mt19937& random, const std::string& isa) {
  for (const std::size_t rows : {0, 1, 9}) {
    std::vector<astra::LinearShape> shapes;
    for (const std::size_t outputs : {70, 0, 3}) shapes.push_back({rows, 64, outputs, 2});
    std::vector<Layer> layers;
    std::vector<std::vector<float>> outs, alone;
    const std::vector<float> x = whole_inputs(random, shapes[0]);
    std::vector<astra::LinearPart> parts;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const int bits = i == 0 ? 4 : 8;
      layers.push_back(random_layer(random, shapes[i], bits));
      outs.emplace_back(rows * shapes[i].outputs + 1, -7.0F);
      alone.push_back(outs.back());
      const astra::LinearWeights weights = weights_of(layers.back(), bits);
      astra::quantized_linear(x.data(), weights, shapes[i], alone.back().data(), 1, isa.c_str());
      parts.push_back({weights, shapes[i].outputs, outs.back().data()});
    }
    astra::quantized_linears(x.data(), parts, shapes[0], 2, isa.c_str());
    expect(outs == alone, isa + ": several layers at once");
    astra::quantized_linears(x.data(), {}, shapes[0], 2, isa.c_str());
  }
}

void what_is_not_finite(const std::string& isa) {
  const astra::LinearShape shape{6, 64, 3, 2};
  std::mt19937 random(1);
  const Layer layer = random_layer(random, shape, 8);
  std::vector<float> x = whole_inputs(random, shape), out(shape.rows * shape.outputs);
  x[1 * 64 + 5] = std::numeric_limits<float>::quiet_NaN();
  x[4 * 64 + 63] = -std::numeric_limits<float>::infinity();
  for (std::size_t k = 0; k < 64; ++k) x[2 * 64 + k] = 1e-40F;
  astra::quantized_linear(x.data(), weights_of(layer, 8), shape, out.data(), 1, isa.c_str());
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t row = i / shape.outputs;
    if (row == 2) expect(out[i] == layer.bias[i % shape.outputs], isa + ": tiny ones are zeros");
    expect(std::isnan(out[i]) == (row == 1 || row == 4), isa + ": NaN in its own row");
  }
}

void refusals() {
  const float x = 0;
  float out = 0;
  const auto refused = [&](astra::LinearWeights weights, astra::LinearShape shape,
                           const char* isa = nullptr) {
    try {
      astra::quantized_linear(&x, weights, shape, &out, 1, isa);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  expect(refused({&x, &x, nullptr, nullptr, 7, false}, {1, 4, 1, 1}), "bits");
  expect(refused({&x, &x, nullptr, nullptr, 8, false}, {1, 10, 1, 4}), "groups that do not fit");
  expect(refused({&x, &x, nullptr, nullptr, 8, false}, {1, 6, 1, 2}), "odd groups");
  expect(refused({&x, &x, nullptr, nullptr, 4, false}, {1, 4, 1, 1}), "4 bits without minima");
  expect(refused({&x, &x, nullptr, nullptr, 8, false}, {1, 4, 1, 1}, "z80"), "isa");
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const std::string& isa : astra::linear_isas()) {
    for (int bits : {8, 4}) {
      for (const astra::LinearShape& shape :
           {astra::LinearShape{1, 10, 7, 1}, astra::LinearShape{3, 64, 33, 2},
            astra::LinearShape{5, 96, 40, 3}, astra::LinearShape{29, 50, 17, 1},
            astra::LinearShape{14, 576, 70, 18}, astra::LinearShape{13, 60, 131, 2},
            astra::LinearShape{7, 2048, 140, 32}, astra::LinearShape{0, 8, 3, 1}}) {
        against_sums_in_double(random, shape, bits, isa);
      }
    }
    several_with_one_input(random, isa);
    what_is_not_finite(isa);
  }
  refusals();
  if (failures == 0) std::printf("linear: ok\n");
  return failures == 0 ? 0 : 1;
}
