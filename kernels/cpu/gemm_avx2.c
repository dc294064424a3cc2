/* gemm_avx2: the GEMM engine for AVX2 and FMA. */
#pragma GCC target("avx2,fma")
#define AC_SIMD 1
#include "gemm.inc"
