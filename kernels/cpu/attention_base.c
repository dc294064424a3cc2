/* attention_base: attention for the x86-64 baseline, SSE2. */
#define AC_SIMD 0
#include "attention.inc"
