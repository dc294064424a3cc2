/* attention_avx2: attention for AVX2 and FMA. */
#pragma GCC target("avx2,fma")
#define AC_SIMD 1
#include "attention.inc"
