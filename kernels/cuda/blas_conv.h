/* blas_conv: a convolution as one product of cuBLASLt.
 *
 *     x NHWC -> rows of kh kw c_in in scratch, some at a time -> w^T + bias + residual
 *
 * What cuDNN has for f32 without TF32 needs copies of the whole image in its workspace, and small
 * images with many channels keep few of its tiles busy; a product may be split by k.  Gathering
 * costs kh kw writes and reads of x, which stay in the cache when x is small.
 */
#ifndef AC_CUDA_BLAS_CONV_H
#define AC_CUDA_BLAS_CONV_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ac_blas_conv {
    const void *x, *weight, *bias, *residual; /* NHWC; [c_out, kh, kw, c_in]; may be NULL */
    void *out;
    ac_dtype dtype; /* of all */
    bool tf32;
    int64_t images, height, width, c_in, out_height, out_width, c_out;
    int32_t kernel_h, kernel_w, stride, pad_top, pad_left;
} ac_blas_conv;

/* The rows of pixels [first, first + count), out_height x out_width an image.  Addresses and c_in
 * are multiples of 16 bytes. */
ac_status ac_cuda_gather(ac_lane *lane, const ac_blas_conv *conv, int64_t first, int64_t count,
                         void *to);

#ifdef AC_HAVE_CUBLASLT
/* Only channel counts and the library are looked at; all addresses are multiples of 16 bytes. */
bool ac_blas_conv_fits(const ac_blas_conv *conv);
size_t ac_blas_conv_scratch(const ac_blas_conv *conv);
/* Between ac_cuda_libraries_enter and _leave.  AC_E_UNSUPPORTED: the library has no algorithm. */
ac_status ac_blas_conv_run(ac_lane *lane, const ac_blas_conv *conv, void *scratch);
#else
static inline bool
ac_blas_conv_fits(const ac_blas_conv *conv)
{
    (void)conv;
    return false;
}

static inline size_t
ac_blas_conv_scratch(const ac_blas_conv *conv)
{
    (void)conv;
    return 0;
}

static inline ac_status
ac_blas_conv_run(ac_lane *lane, const ac_blas_conv *conv, void *scratch)
{
    (void)lane, (void)conv, (void)scratch;
    return AC_E_UNSUPPORTED;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
