/* norms_avx2: the norms for AVX2 and FMA. */
#pragma GCC target("avx2,fma")
#define AC_SIMD 1
#include "norms.inc"
