// Checks and run-time dispatch; the loops are in bitpack_*.cpp.

#include "astra/bitpack.hpp"

#include <atomic>

#include "bitpack_kernel.hpp"

namespace astra {
namespace {

using detail::Kernels;

// More codes than fit the address space; sizes below it do not overflow.
constexpr std::size_t kMaxCount = SIZE_MAX / 2 / sizeof(std::int32_t);

#ifdef ASTRA_HAVE_AVX512
bool runs_avx512() {
#ifdef ASTRA_SIMDE
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi");
#endif
}
#endif

// Narrowest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found{&detail::kPortable};
#ifdef ASTRA_HAVE_AVX2
  if (__builtin_cpu_supports("avx2")) found.push_back(&detail::kAvx2);
#endif
#ifdef ASTRA_HAVE_AVX512
  if (runs_avx512()) found.push_back(&detail::kAvx512);
#endif
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{runnable().back()};
  return kernels;
}

std::string code_message(std::size_t index, std::int32_t value, int bits) {
  return "codes[" + std::to_string(index) + "] is " + std::to_string(value) +
         ", which does not fit " + std::to_string(bits) + (bits == 1 ? " bit" : " bits") + " (0.." +
         std::to_string((1 << bits) - 1) + ")";
}

void check_bits(int bits) {
  if (bits < kMinBits || bits > kMaxBits) {
    throw std::invalid_argument("bits must be within 1..16, got " + std::to_string(bits));
  }
}

std::string codes_of(std::size_t count, int bits) {
  return std::to_string(count) + " codes of " + std::to_string(bits) +
         (bits == 1 ? " bit" : " bits");
}

[[noreturn]] void throw_first_bad_code(const std::int32_t* codes, std::size_t count, int bits) {
  for (std::size_t i = 0; i < count; ++i) {
    if (static_cast<std::uint32_t>(codes[i]) >> bits != 0) throw CodeError(i, codes[i], bits);
  }
  throw std::invalid_argument("codes changed while they were packed");
}

}  // namespace

CodeError::CodeError(std::size_t index, std::int32_t value, int bits)
    : std::invalid_argument(code_message(index, value, bits)), index(index), value(value) {}

std::size_t packed_size(std::size_t count, int bits) {
  check_bits(bits);
  if (count > kMaxCount) {
    throw std::invalid_argument("count must be at most " + std::to_string(kMaxCount) + ", got " +
                                std::to_string(count));
  }
  return detail::stream_bytes(count, bits);
}

void pack(const std::int32_t* codes, std::size_t count, int bits, std::uint8_t* out,
          std::size_t out_size) {
  const std::size_t needed = packed_size(count, bits);
  if (out_size < needed) {
    throw std::invalid_argument("out must hold at least " + std::to_string(needed) + " bytes for " +
                                codes_of(count, bits) + ", got " + std::to_string(out_size));
  }
  const Kernels& kernels = *current().load(std::memory_order_relaxed);
  const std::uint32_t seen = kernels.pack[static_cast<std::size_t>(bits)](codes, count, out);
  if (seen >> bits != 0) throw_first_bad_code(codes, count, bits);
}

void unpack(const std::uint8_t* data, std::size_t data_size, int bits, std::int32_t* codes,
            std::size_t count) {
  const std::size_t needed = packed_size(count, bits);
  if (data_size < needed) {
    throw std::invalid_argument("data must hold at least " + std::to_string(needed) +
                                " bytes for " + codes_of(count, bits) + ", got " +
                                std::to_string(data_size));
  }
  detail::unpack(data, bits, codes, count);
}

void detail::unpack(const std::uint8_t* data, int bits, std::int32_t* codes,
                    std::size_t count) noexcept {
  const Kernels& kernels = *current().load(std::memory_order_relaxed);
  kernels.unpack[static_cast<std::size_t>(bits)](data, count, codes);
}

std::string_view isa() { return current().load()->name; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.emplace_back(kernels->name);
  return names;
}

void set_isa(std::string_view name) {
  std::string known;
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->name) {
      current().store(kernels);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("isa must be one of those that run here (" + known + "), got '" +
                              std::string(name) + "'");
}

}  // namespace astra
