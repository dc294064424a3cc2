/* cublaslt_attention: heads too long for one pass (the autoencoder's 512 channels), as two products
 * with a softmax of rows between them.
 *
 *     scores f32 [queries, keys] = q k^T -> shares times GAIN -> times v, over GAIN
 *
 * So many queries at a time that scores and shares stay in SCORE_BYTES; v is read as it lies.
 * Masks and causal order are attention.cu's. */
#include "attention.h"
#include "blas.h"
#include "list.h"

#define SCORE_BYTES ((size_t)200 << 20)
#define GAIN 1024.0f

static bool
fits(const ac_attention_operand *o, ac_dtype dtype)
{
    return o->dtype == dtype && o->c == 1 && o->t % 8 == 0 && o->n % 8 == 0;
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    if (!ac_attention_job_of(p, &j) || ac_operand(p, AC_ATTN_MASK) || j.causal) {
        return false;
    }
    bool halves = (j.q.dtype == AC_F16 && caps->isa >= 75) ||
                  (j.q.dtype == AC_BF16 && caps->isa >= 80);
    return halves && fits(&j.q, j.q.dtype) && fits(&j.k, j.q.dtype) && fits(&j.v, j.q.dtype) &&
           fits(&j.out, j.q.dtype) && j.d % 8 == 0 && j.tk % 8 == 0 && j.tk > 0 && j.tq > 0 &&
           j.tk <= AC_SOFTMAX_COLUMNS && ac_blas_found();
}

static int64_t
queries_at_once(const ac_attention_job *j)
{
    int64_t most = (int64_t)(SCORE_BYTES / (size_t)(6 * j->tk)) / 128 * 128;
    return AC_MIN(j->tq, AC_MAX(most, 128));
}

static size_t
score_bytes(const ac_attention_job *j)
{
    return ac_align_up((size_t)(queries_at_once(j) * j->tk) * sizeof(float), 256);
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    (void)caps;
    ac_attention_job_of(p, &j);
    return AC_MAX(AC_BLAS_WORKSPACE + score_bytes(&j) + score_bytes(&j) / 2,
                  ac_attention_wide_scratch(&j));
}

static const char *
at(const ac_attention_operand *o, int64_t image, int64_t token, int64_t channel)
{
    int64_t elements = image * o->n + token * o->t + channel;
    return (const char *)o->data + elements * (int64_t)ac_dtype_size(o->dtype);
}

/* Queries [first, first + count) of one head; channel is the head's first. */
static ac_status
run_head(ac_blas_call *call, const ac_attention_job *j, int64_t image, int64_t channel,
         int64_t first, int64_t count)
{
    char *scores = (char *)call->workspace + AC_BLAS_WORKSPACE, *shares = scores + score_bytes(j);
    int32_t dtype = j->q.dtype;
    ac_blas_key key = {.m = count, .n = j->tk, .k = j->d, .x_row = j->q.t, .w_row = j->k.t,
                       .out_row = j->tk, .dtype = dtype, .out_dtype = AC_F32};
    call->x = at(&j->q, image, first, channel);
    call->weight = at(&j->k, image, 0, channel);
    call->out = scores;
    call->factor = 1.0f;
    AC_TRY(ac_blas_multiply(call, &key));
    ac_softmax s = {.scores = (const float *)scores, .out = shares, .dtype = j->q.dtype,
                    .rows = count, .columns = j->tk, .factor = j->scale, .gain = GAIN};
    AC_TRY(ac_cuda_softmax(call->lane, &s));
    key = (ac_blas_key){.m = count, .n = j->d, .k = j->tk, .x_row = j->tk, .w_row = j->v.t,
                        .out_row = j->out.t, .dtype = dtype, .out_dtype = dtype, .w_by_k = 1};
    call->x = shares;
    call->weight = at(&j->v, image, 0, channel);
    call->out = (void *)at(&j->out, image, first, channel);
    call->factor = 1.0f / GAIN;
    return ac_blas_multiply(call, &key);
}

static ac_status
run(ac_lane *lane, ac_cuda_libraries *libraries, const ac_attention_job *j, void *scratch)
{
    ac_blas_call call = {.lane = lane, .libraries = libraries, .workspace = scratch};
    int64_t step = queries_at_once(j);
    AC_TRY(ac_blas_open(libraries));
    for (int64_t product = 0; product < j->images * j->heads; product++) {
        for (int64_t first = 0; first < j->tq; first += step) {
            AC_TRY(run_head(&call, j, product / j->heads, product % j->heads * j->d, first,
                            AC_MIN(step, j->tq - first)));
        }
    }
    return AC_OK;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_attention_job j;
    ac_cuda_libraries *libraries;
    int previous;
    (void)prepared;
    ac_attention_job_of(p, &j);
    if (!ac_attention_flash_aligned(&j)) {
        return ac_cuda_attention_wide_run(lane, &j, scratch);
    }
    AC_TRY(ac_cuda_libraries_enter(lane, &libraries, &previous));
    ac_status status = run(lane, libraries, &j, scratch);
    AC_TRY(ac_cuda_libraries_leave(lane, previous, status == AC_E_UNSUPPORTED ? AC_OK : status));
    return status == AC_E_UNSUPPORTED ? ac_cuda_attention_wide_run(lane, &j, scratch) : AC_OK;
}

const ac_kernel ac_cuda_attention_cublaslt = {
    .name = "cuda.attention.cublaslt",
    .op = AC_OP_ATTENTION,
    .supports = supports,
    .scratch = scratch_bytes,
    .launch = launch,
};
