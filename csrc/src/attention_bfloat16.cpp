// With AVX512-BF16: products of pairs of numbers rounded to bfloat16, at twice the rate of fp32.

#include <immintrin.h>

#define ASTRA_LANES 16
#define ASTRA_BLOCK 8
#define ASTRA_NAME "avx512"
#define ASTRA_BFLOAT16
#define ASTRA_ATTENTION kAttentionBfloat16
#include "attention_loop.inl"
