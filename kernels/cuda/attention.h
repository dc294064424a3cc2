/* attention: what the ways to compute an attention share: operands and sizes. */
#ifndef AC_CUDA_ATTENTION_H
#define AC_CUDA_ATTENTION_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ac_attention_operand {
    const void *data;
    ac_dtype dtype;
    int64_t n, t, c; /* strides: image, token, channel */
} ac_attention_operand;

typedef struct ac_attention_job {
    ac_attention_operand q, k, v, out;
    const void *mask; /* [n, tk], NULL: none */
    ac_dtype mask_dtype;
    int64_t mask_n, mask_t;
    int64_t images, tq, tk;
    int32_t heads, d; /* d: channels of a head */
    float scale;
    bool causal;
} ac_attention_job;

/* False for dtypes that are not f32, f16 or bf16. */
bool ac_attention_job_of(const ac_problem *p, ac_attention_job *job);

/* One dtype, channels side by side, every token and head at a multiple of 16 bytes from the first
 * one. */
bool ac_attention_in_vectors(const ac_attention_job *job);

/* One pass over the keys with a running softmax, f16 and bf16, head sizes up to 160. */
bool ac_attention_flash_fits(const ac_attention_job *job, int32_t arch);
bool ac_attention_flash_aligned(const ac_attention_job *job);
ac_status ac_cuda_flash(ac_lane *lane, const ac_attention_job *job);

/* Two products of our own with a softmax between them, any strides and dtypes. */
size_t ac_attention_wide_scratch(const ac_attention_job *job);
ac_status ac_cuda_attention_wide_run(ac_lane *lane, const ac_attention_job *job, void *scratch);

/* out [rows, columns] = gain softmax(factor scores), zeros from there to the row's end. */
enum { AC_SOFTMAX_COLUMNS = 16384 };
typedef struct ac_softmax {
    const float *scores;
    void *out;      /* f32: may be the scores */
    ac_dtype dtype; /* f16, bf16 or f32 */
    int64_t rows, columns;
    int64_t pitch;  /* elements from row to row, of both; a multiple of 4 */
    float factor, gain;
} ac_softmax;

ac_status ac_cuda_softmax(ac_lane *lane, const ac_softmax *softmax);

#ifdef __cplusplus
}
#endif

#endif
