#define ASTRA_LANES 16
#define ASTRA_COLUMNS 8
#define ASTRA_PRODUCT kProductAvx512
#define ASTRA_PRODUCT_NAME "avx512"
#include "product_loop.inl"
