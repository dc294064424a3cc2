/* blas: products through cuBLASLt, as linear layers and attention need them.
 *
 *     out [m, n] = factor x [m, k] w^T + bias [n] + residual [m, n]
 *
 * A problem's algorithm is chosen at its first call (tune.h) and kept.
 */
#ifndef AC_CUDA_BLAS_H
#define AC_CUDA_BLAS_H

#include "library.h"

#include <cublasLt.h>

#define AC_BLAS_WORKSPACE ((size_t)32 << 20) /* what NVIDIA recommends for sm_90 */

/* Compared byte by byte. */
typedef struct ac_blas_key {
    int64_t m, n, k, x_row, w_row, out_row, residual_row; /* rows in elements */
    int32_t dtype;     /* of x, w, bias and residual */
    int32_t out_dtype; /* that, or f32 */
    int32_t bias, residual; /* bool */
    int32_t w_by_k;    /* bool: w is [k, n], not [n, k] */
    int32_t tf32;      /* bool: f32 factors may be rounded to TF32 */
    int32_t batch;     /* products of this size at once; 0 is 1 */
    int32_t pad;
    int64_t x_batch, w_batch, out_batch; /* from one to the next, elements; no bias, no residual */
} ac_blas_key;

typedef struct ac_blas_call {
    ac_lane *lane;
    ac_cuda_libraries *libraries;
    const void *x, *weight;
    const void *bias, *residual; /* as the key says; residual may be out */
    void *out;
    void *workspace; /* AC_BLAS_WORKSPACE */
    float factor;
} ac_blas_call;

/* What cublaslt_linear.c chose for a whole layer. */
typedef struct ac_blas_layer {
    ac_blas_key key;
    int64_t k2;
    int32_t gated, act; /* up to here the key that it is found by */
    int32_t way; /* cublaslt_linear.c's */
    int32_t pad;
} ac_blas_layer;

typedef struct ac_blas_pool ac_blas_pool; /* cublaslt.c's */

struct ac_cuda_blas {
    cublasLtHandle_t handle;
    ac_cuda_known products; /* cublaslt.c's */
    ac_blas_pool *pools;
    int32_t n_pools, pools_capacity;
    ac_cuda_known layers; /* of ac_blas_layer */
};

/* Rows of each of at least `parts` even parts of no more than about `most`, in units that tiles
 * divide. */
static inline int64_t
ac_blas_even_rows(int64_t rows, int64_t most, int64_t parts)
{
    most = AC_MAX(most / 128 * 128, 128);
    parts = AC_MAX((rows + most - 1) / most, parts);
    return ((rows + parts - 1) / parts + 127) / 128 * 128;
}

/* Looks for the library once. */
bool ac_blas_found(void);
/* Makes libraries->blas; the rest, too, is called between ac_cuda_libraries_enter and _leave. */
ac_status ac_blas_open(ac_cuda_libraries *libraries);
/* Everything is in units of 16 bytes, but n and rows of out and residual where those are f32.
 * AC_E_UNSUPPORTED: the library has no algorithm. */
ac_status ac_blas_multiply(const ac_blas_call *call, const ac_blas_key *key);
/* A key as text, for tune.c; returns its length. */
int ac_blas_key_text(char *text, size_t size, const char *what, const ac_blas_key *key);

#endif
