/* gemm_base: the GEMM engine for the x86-64 baseline, SSE2. */
#define AC_SIMD 0
#include "gemm.inc"
