#define ASTRA_LANES 4
#define ASTRA_ENCODE encode_portable
#include "encode_loop.inl"
