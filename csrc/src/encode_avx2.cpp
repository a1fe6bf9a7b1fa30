#define ASTRA_LANES 8
#define ASTRA_ENCODE encode_avx2
#include "encode_loop.inl"
