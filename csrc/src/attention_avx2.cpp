#define ASTRA_LANES 8
#define ASTRA_BLOCK 4
#define ASTRA_NAME "avx2"
#define ASTRA_ATTENTION kAttentionAvx2
#include "attention_loop.inl"
