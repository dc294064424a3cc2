/* elementwise_avx2: activation, gate, add and cast for AVX2 and FMA. */
#pragma GCC target("avx2,fma,f16c")
#define AC_SIMD 1
#include "elementwise.inc"
