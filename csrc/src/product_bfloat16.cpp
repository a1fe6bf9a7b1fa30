// With AVX512-BF16: products of pairs of numbers rounded to bfloat16, at twice the rate of fp32.

#include <immintrin.h>

#define ASTRA_LANES 16
#define ASTRA_COLUMNS 8
#define ASTRA_BFLOAT16
#define ASTRA_PRODUCT kProductBfloat16
#define ASTRA_PRODUCT_NAME "avx512bf16"
#include "product_loop.inl"
