#define ASTRA_LANES 16
#define ASTRA_BLOCK 8
#define ASTRA_NAME "avx512"
#define ASTRA_ATTENTION kAttentionAvx512
#include "attention_loop.inl"
