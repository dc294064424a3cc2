/* list: the kernels of the CUDA backend by name; list.c has their order. */
#ifndef AC_CUDA_LIST_H
#define AC_CUDA_LIST_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const ac_kernel ac_cuda_activation;
extern const ac_kernel ac_cuda_add;
extern const ac_kernel ac_cuda_scale;

#ifdef __cplusplus
}
#endif

#endif
