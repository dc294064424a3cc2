/* list: the CUDA kernels by preference; the plan takes the first that supports a problem. */
#include "list.h"

const ac_kernel *const ac_cuda_kernels[] = {
    &ac_cuda_activation,
    &ac_cuda_add,
    &ac_cuda_scale,
    NULL,
};
