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

/* One pass over the keys with a running softmax, f16 and bf16, head sizes up to 160. */
bool ac_attention_flash_fits(const ac_attention_job *job, int32_t arch);
bool ac_attention_flash_aligned(const ac_attention_job *job);
ac_status ac_cuda_flash(ac_lane *lane, const ac_attention_job *job);

#ifdef __cplusplus
}
#endif

#endif
