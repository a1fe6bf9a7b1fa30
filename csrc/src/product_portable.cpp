#define ASTRA_LANES 4
#define ASTRA_COLUMNS 4
#define ASTRA_PRODUCT kProductPortable
#define ASTRA_PRODUCT_NAME "portable"
#include "product_loop.inl"
