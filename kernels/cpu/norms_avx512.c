/* norms_avx512: the norms for AVX-512. */
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define AC_SIMD 2
#include "norms.inc"
