#define ASTRA_LANES 16
#define ASTRA_ENCODE encode_avx512
#include "encode_loop.inl"
