/* gemm: one description of every GEMM-like op, and the two kernels that take it.
 *
 *     out[z, m, n] = act(sum over k of x[z, m, k] w[z, n, k] + bias[n]) row_scale[m] + residual
 *
 * Row m is an output pixel (image, y, x) and k is (tap y, tap x, channel): a linear layer is a 1x1
 * convolution over its rows.  z counts independent products of one shape: heads of an attention,
 * phases of an upsampling convolution.  Gated: w has 2 n rows, value first then gate.
 */
#ifndef AC_CUDA_GEMM_H
#define AC_CUDA_GEMM_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ac_gemm_image {
    const void *data; /* NULL: absent */
    ac_dtype dtype;
    int64_t n, h, w, c; /* strides, elements */
    int64_t batch[2];   /* of z / inner and z % inner, elements */
} ac_gemm_image;

typedef struct ac_gemm {
    ac_gemm_image x[2];   /* the second: more channels of the same pixels */
    int64_t channels[2];  /* of x[0] and x[1]; 0: absent */
    int32_t height, width, out_height, out_width; /* pixels */
    int32_t kernel_h, kernel_w, stride, pad_top, pad_left;
    bool phases;          /* the paddings shrink by z / inner and z % inner: an up_conv2d */

    const void *weight;
    ac_dtype weight_dtype;
    int64_t w_row, w_y, w_x, w_c; /* strides: output channel, tap, input channel */
    int64_t w_batch[2];
    const void *bias; /* [columns], of gated ones twice; NULL: none */
    ac_dtype bias_dtype;
    int64_t bias_stride;

    ac_gemm_image out, residual;
    int64_t rows, columns; /* of out */
    ac_act act;
    bool gated;
    const float *row_scale; /* [z][rows]; NULL: 1 */
    int32_t batch, inner;   /* products, and how many of them are one step of batch[1] */
} ac_gemm;

/* A LINEAR, CONV2D or UP_CONV2D.  False when rows of a linear's operands are spaced in more than
 * three ways, which no plan makes. */
bool ac_gemm_of(const ac_problem *p, ac_gemm *g);

/* Any dtypes, strides and sizes, multiplied in f32. */
ac_status ac_cuda_gemm_plain(ac_lane *lane, const ac_gemm *g);

/* f16 and bf16 on tensor cores.  The first looks at what is known at plan time, the second also at
 * addresses; channels, and strides but those of channels, must be multiples of 8. */
bool ac_gemm_mma_fits(const ac_gemm *g, int32_t arch);
bool ac_gemm_mma_aligned(const ac_gemm *g);
ac_status ac_cuda_gemm_mma(ac_lane *lane, const ac_gemm *g);

/* For who has no device at hand, bf16 only where it is sm_80: whether the second takes it, and the
 * one of the two that does. */
bool ac_gemm_is_fast(const ac_gemm *g);
ac_status ac_cuda_gemm_own(ac_lane *lane, const ac_gemm *g);

/* A convolution with weights as [c_out, kh, kw, c_in] (up_conv2d: four of them): the derived weight
 * that all but the plain kernels share; a 1x1 filter is that already, and takes 0 bytes. */
bool ac_conv_gemm(const ac_problem *p, const void *prepared, ac_gemm *g);
/* False: what should be a weight is none, so nothing was prepared, and ac_cuda_gemm_plain takes g.
 */
bool ac_conv_gemm_at_launch(const ac_problem *p, const void *prepared, ac_gemm *g);
size_t ac_conv_prepared_bytes(const ac_problem *p, const ac_caps *caps);
ac_status ac_conv_prepare(ac_lane *lane, const ac_problem *p, void *prepared);

#ifdef __cplusplus
}
#endif

#endif
