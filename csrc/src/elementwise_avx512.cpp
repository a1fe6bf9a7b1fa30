#define ASTRA_LANES 16
#define ASTRA_ELEMENTWISE kElementwiseAvx512
#include "elementwise_loop.inl"
