// Also the kernel of NEON, which every 64-bit ARM has.
#define ASTRA_LANES 4
#ifdef __aarch64__
#define ASTRA_BLOCK 8
#else
#define ASTRA_BLOCK 4
#endif
#define ASTRA_NAME "portable"
#define ASTRA_ATTENTION kAttentionPortable
#include "attention_loop.inl"
