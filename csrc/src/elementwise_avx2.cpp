#define ASTRA_LANES 8
#define ASTRA_ELEMENTWISE kElementwiseAvx2
#include "elementwise_loop.inl"
