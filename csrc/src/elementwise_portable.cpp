// Also the kernels of NEON, which every 64-bit ARM has.
#define ASTRA_LANES 4
#define ASTRA_ELEMENTWISE kElementwisePortable
#include "elementwise_loop.inl"
