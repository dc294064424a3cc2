/* elementwise_avx512: activation, gate, add and cast for AVX-512. */
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define AC_SIMD 2
#include "elementwise.inc"
