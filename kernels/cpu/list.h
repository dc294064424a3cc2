/* list: the CPU kernels in order of preference, fast ones first, the plain reference last. */
#ifndef AC_CPU_LIST_H
#define AC_CPU_LIST_H

#include "../../csrc/kernel.h"

extern const ac_kernel *const ac_cpu_kernels[]; /* ends with NULL */

#endif
