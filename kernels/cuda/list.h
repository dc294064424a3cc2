/* list: the kernels of the CUDA backend by name, in the order of list.c. */
#ifndef AC_CUDA_LIST_H
#define AC_CUDA_LIST_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One row a kernel, by op, then by preference: special ones, libraries, tensor cores, plain. */
#define AC_CUDA_KERNELS(X)                                                                         \
    X(ac_cuda_conv2d_narrow)                                                                       \
    AC_CUDA_BLAS_KERNELS(X)                                                                        \
    AC_CUDA_DNN_KERNELS(X)                                                                         \
    X(ac_cuda_linear_mma)                                                                          \
    X(ac_cuda_linear_plain)                                                                        \
    X(ac_cuda_conv2d_mma)                                                                          \
    X(ac_cuda_conv2d_plain)                                                                        \
    X(ac_cuda_up_conv2d_mma)                                                                       \
    X(ac_cuda_up_conv2d_plain)                                                                     \
    X(ac_cuda_group_norm_cluster)                                                                  \
    X(ac_cuda_group_norm_wide)                                                                     \
    X(ac_cuda_group_norm)                                                                          \
    X(ac_cuda_layer_norm_wide)                                                                     \
    X(ac_cuda_layer_norm)                                                                          \
    X(ac_cuda_attention_flash)                                                                     \
    AC_CUDA_BLAS_ATTENTION(X)                                                                      \
    X(ac_cuda_attention_wide)                                                                      \
    X(ac_cuda_attention_plain)                                                                     \
    X(ac_cuda_activation)                                                                          \
    X(ac_cuda_gate)                                                                                \
    X(ac_cuda_add)                                                                                 \
    X(ac_cuda_scale)                                                                               \
    X(ac_cuda_concat)                                                                              \
    X(ac_cuda_upsample)                                                                            \
    X(ac_cuda_timestep)                                                                            \
    X(ac_cuda_embed)                                                                               \
    X(ac_cuda_select)                                                                              \
    X(ac_cuda_eos_pool)                                                                            \
    X(ac_cuda_to_nhwc)                                                                             \
    X(ac_cuda_to_nchw)                                                                             \
    X(ac_cuda_cast)                                                                                \
    X(ac_cuda_fill)                                                                                \
    X(ac_cuda_phase_weight)

/* Built only where the libraries' headers are. */
#ifdef AC_HAVE_CUBLASLT
#define AC_CUDA_BLAS_KERNELS(X) X(ac_cuda_linear_cublaslt)
#define AC_CUDA_BLAS_ATTENTION(X) X(ac_cuda_attention_cublaslt)
#else
#define AC_CUDA_BLAS_KERNELS(X)
#define AC_CUDA_BLAS_ATTENTION(X)
#endif
#ifdef AC_HAVE_CUDNN
#define AC_CUDA_DNN_KERNELS(X)                                                                     \
    X(ac_cuda_conv2d_cudnn) X(ac_cuda_up_conv2d_cudnn) X(ac_cuda_attention_cudnn)
#else
#define AC_CUDA_DNN_KERNELS(X)
#endif

#define X(name) extern const ac_kernel name;
AC_CUDA_KERNELS(X)
#undef X

#ifdef __cplusplus
}
#endif

#endif
