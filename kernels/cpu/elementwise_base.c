/* elementwise_base: activation, gate, add and cast for the x86-64 baseline, SSE2. */
#define AC_SIMD 0
#include "elementwise.inc"
