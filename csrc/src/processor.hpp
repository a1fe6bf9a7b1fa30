// What the processor has beyond what a file of kernels is named after.

#pragma once

namespace astra::detail {

// Products of pairs of bfloat16, and the permutations of 16 bits that bring pairs together.
inline bool has_bfloat16() {
#ifdef ASTRA_HAVE_AVX512
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace astra::detail
