#include "astra/linear.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear_kernel.hpp"
#include "pool.hpp"

namespace astra {
namespace {

using detail::LinearCall;
using detail::LinearKernel;

constexpr std::size_t kWidest = 65536;  // inputs of a group: its sums stay within 32 bits
constexpr std::size_t kFew = 1;         // rows for which laying out the weights does not pay
constexpr double kWorthAThread = 1e6;   // multiplications
constexpr std::size_t kLine = 64;       // bytes that the spaces are aligned to

std::vector<const LinearKernel*> kernels() {
  std::vector<const LinearKernel*> found{&detail::kLinearPortable};
#ifdef ASTRA_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&detail::kLinearAvx2);
  }
#endif
#ifdef ASTRA_HAVE_AVX512
  if (__builtin_cpu_supports("avx512bw")) found.push_back(&detail::kLinearAvx512);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&detail::kLinearVnni);
  }
#endif
  return found;
}

const LinearKernel& kernel_named(const char* isa) {
  static const std::vector<const LinearKernel*> all = kernels();
  if (isa == nullptr) return *all.back();
  for (const LinearKernel* kernel : all) {
    if (std::strcmp(kernel->name, isa) == 0) return *kernel;
  }
  throw std::invalid_argument("isa must be one that this machine has, got " + std::string(isa));
}

void check(const LinearWeights& weights, const LinearShape& shape) {
  if (weights.bits != 8 && weights.bits != 4) {
    throw std::invalid_argument("bits must be 8 or 4, got " + std::to_string(weights.bits));
  }
  if (shape.groups < 1 || shape.inputs % shape.groups != 0 ||
      shape.inputs / shape.groups > kWidest || shape.inputs / shape.groups % 2 != 0) {
    throw std::invalid_argument("groups must cut " + std::to_string(shape.inputs) +
                                " inputs into even parts of at most " + std::to_string(kWidest) +
                                ", got " + std::to_string(shape.groups));
  }
  if ((weights.minima != nullptr) != (weights.bits == 4)) {
    throw std::invalid_argument("minima must be given with 4 bits, and with no others");
  }
}

// Memory of one thread, kept from call to call.
class Space {
 public:
  void* of(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{kLine})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(unsigned char* memory) const {
      ::operator delete(memory, std::align_val_t{kLine});
    }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  std::size_t size_ = 0;
};

std::size_t rounded_up(std::size_t count, std::size_t to) { return (count + to - 1) / to * to; }

// Equal parts of the outputs, each a whole number of tiles.
struct Parts {
  const LinearCall& call;
  void (*loop)(const LinearCall&, std::size_t, std::size_t, void*);
  std::size_t share;
  std::size_t bytes;
};

void compute_part(void* context, std::size_t unit) {
  const auto& parts = *static_cast<const Parts*>(context);
  thread_local Space space;
  const std::size_t first = unit * parts.share;
  parts.loop(parts.call, first, std::min(first + parts.share, parts.call.outputs),
             space.of(parts.bytes));
}

// The products of rounded inputs with the weights of one part.
void multiply(const LinearKernel& kernel, LinearCall call, const LinearPart& part,
              unsigned threads) {
  if (part.outputs == 0) return;
  const LinearWeights& weights = part.weights;
  call.outputs = part.outputs;
  call.values = weights.bits == 8 ? static_cast<const std::int8_t*>(weights.values) : nullptr;
  call.halves = weights.bits == 4 ? static_cast<const std::uint8_t*>(weights.values) : nullptr;
  call.scales = weights.scales;
  call.minima = weights.minima;
  call.bias = weights.bias;
  call.half_scales = weights.half_scales;
  call.out = part.out;
  const double work = static_cast<double>(call.rows) * static_cast<double>(call.inputs) *
                      static_cast<double>(call.outputs);
  const auto useful = static_cast<std::size_t>(std::min(work / kWorthAThread, 256.0)) + 1;
  const std::size_t parts = std::max<std::size_t>(1, std::min<std::size_t>(threads, useful));
  Parts given{call, call.rows <= kFew ? kernel.few : kernel.many,
              rounded_up((call.outputs + parts - 1) / parts, kernel.tile), kernel.space(call)};
  const std::size_t units = (call.outputs + given.share - 1) / given.share;
  detail::run_units(static_cast<unsigned>(parts), units, compute_part, &given);
}

}  // namespace

std::vector<std::string> linear_isas() {
  std::vector<std::string> names;
  for (const LinearKernel* kernel : kernels()) names.emplace_back(kernel->name);
  return names;
}

void quantized_linear(const float* x, const LinearWeights& weights, LinearShape shape, float* out,
                      unsigned threads, const char* isa) {
  quantized_linears(x, {{weights, shape.outputs, out}}, shape, threads, isa);
}

void quantized_linears(const float* x, const std::vector<LinearPart>& parts, LinearShape shape,
                       unsigned threads, const char* isa) {
  for (const LinearPart& part : parts) check(part.weights, shape);
  const LinearKernel& kernel = kernel_named(isa);
  if (shape.rows == 0 || parts.empty()) return;
  LinearCall call{};
  call.rows = shape.rows;
  call.inputs = shape.inputs;
  call.groups = shape.groups;
  call.width = shape.inputs / shape.groups;
  call.padded = rounded_up(call.width, kernel.step);

  const std::size_t integers =
      rounded_up(call.rows * call.groups * call.padded * kernel.bytes, kLine);
  const std::size_t steps = rounded_up(call.rows * call.groups * sizeof(float), kLine);
  thread_local Space kept;
  auto* memory = static_cast<unsigned char*>(kept.of(integers + 3 * steps));
  call.x.integers = memory;
  call.x.steps = reinterpret_cast<float*>(memory + integers);
  call.x.sums = reinterpret_cast<float*>(memory + integers + steps);
  call.x.offsets = reinterpret_cast<std::int32_t*>(memory + integers + 2 * steps);
  kernel.round(call, x);
  for (const LinearPart& part : parts) multiply(kernel, call, part, threads);
}

}  // namespace astra
