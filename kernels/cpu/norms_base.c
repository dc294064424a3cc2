/* norms_base: the norms for the x86-64 baseline, SSE2. */
#define AC_SIMD 0
#include "norms.inc"
