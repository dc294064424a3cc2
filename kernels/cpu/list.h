/* list: the CPU kernels in order of preference, fast ones first, the plain reference last. */
#ifndef AC_CPU_LIST_H
#define AC_CPU_LIST_H

#include "../../csrc/device.h"

extern const ac_kernel *const ac_cpu_kernels[]; /* ends with NULL */

/* The backend's `sampler`. */
ac_status ac_cpu_sampler(void *self, ac_lane *lane, const ac_sampler_job *job,
                         ac_sampler_phase phase);

#endif
