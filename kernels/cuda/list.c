/* list: see list.h.  The plan takes the first kernel that supports a problem; a new kernel is one
 * line there. */
#include "list.h"

const ac_kernel *const ac_cuda_kernels[] = {
#define X(name) &name,
    AC_CUDA_KERNELS(X)
#undef X
    NULL,
};
