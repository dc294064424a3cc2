/* cublaslt_attention: heads too long for one pass (the autoencoder's 512 channels), and f32, as two
 * products with a softmax of rows between them, all heads of an image at once.
 *
 *     scores f32 [head][query][key] = q k^T -> shares times GAIN -> times v, over GAIN
 *
 * So many queries at a time that scores and shares stay in SCORE_BYTES; v is read as it lies; f32
 * shares take the scores' place.  Masks and causal order are attention.cu's. */
#include "attention.h"
#include "blas.h"
#include "list.h"

#define SCORE_BYTES ((size_t)200 << 20)
#define GAIN 1024.0f

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    if (!ac_attention_job_of(p, &j) || ac_operand(p, AC_ATTN_MASK) || j.causal) {
        return false;
    }
    bool here = j.q.dtype == AC_F32 || caps->isa >= (j.q.dtype == AC_F16 ? 75 : 80);
    return here && ac_attention_in_vectors(&j) && (j.q.dtype == AC_F32 || j.tk % 8 == 0) &&
           j.tk > 0 && j.tq > 0 && j.tk <= AC_SOFTMAX_COLUMNS && ac_blas_found();
}

/* A row of scores begins at a multiple of 16 bytes. */
static int64_t
pitch_of(const ac_attention_job *j)
{
    return (j->tk + 3) / 4 * 4;
}

static int64_t
queries_at_once(const ac_attention_job *j)
{
    size_t key = j->q.dtype == AC_F32 ? sizeof(float) : sizeof(float) + 2;
    int64_t most = (int64_t)(SCORE_BYTES / (key * (size_t)(pitch_of(j) * j->heads))) / 128 * 128;
    return AC_MIN(j->tq, AC_MAX(most, 128));
}

static size_t
score_bytes(const ac_attention_job *j)
{
    size_t scores = (size_t)(j->heads * queries_at_once(j) * pitch_of(j));
    return ac_align_up(scores * sizeof(float), 256);
}

static size_t
share_bytes(const ac_attention_job *j)
{
    return j->q.dtype == AC_F32 ? 0 : score_bytes(j) / 2;
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    (void)caps;
    ac_attention_job_of(p, &j);
    return AC_MAX(AC_BLAS_WORKSPACE + score_bytes(&j) + share_bytes(&j),
                  ac_attention_wide_scratch(&j));
}

static const char *
at(const ac_attention_operand *o, int64_t image, int64_t token)
{
    int64_t elements = image * o->n + token * o->t;
    return (const char *)o->data + elements * (int64_t)ac_dtype_size(o->dtype);
}

/* Queries [first, first + count) of all heads of an image. */
static ac_status
run_part(ac_blas_call *call, const ac_attention_job *j, bool tf32, int64_t image, int64_t first,
         int64_t count)
{
    int32_t dtype = j->q.dtype;
    char *scores = (char *)call->workspace + AC_BLAS_WORKSPACE;
    char *shares = scores + (dtype == AC_F32 ? 0 : score_bytes(j));
    float gain = dtype == AC_F32 ? 1.0f : GAIN;
    int64_t pitch = pitch_of(j), head = count * pitch;
    ac_blas_key key = {.m = count, .n = j->tk, .k = j->d, .x_row = j->q.t, .w_row = j->k.t,
                       .out_row = pitch, .dtype = dtype, .out_dtype = AC_F32, .tf32 = tf32};
    if (j->heads > 1) {
        key.batch = j->heads;
        key.x_batch = key.w_batch = j->d;
        key.out_batch = head;
    }
    call->x = at(&j->q, image, first);
    call->weight = at(&j->k, image, 0);
    call->out = scores;
    call->factor = 1.0f;
    AC_TRY(ac_blas_multiply(call, &key));
    ac_softmax s = {.scores = (const float *)scores, .out = shares, .dtype = j->q.dtype,
                    .rows = count * j->heads, .columns = j->tk, .pitch = pitch, .factor = j->scale,
                    .gain = gain};
    AC_TRY(ac_cuda_softmax(call->lane, &s));
    key = (ac_blas_key){.m = count, .n = j->d, .k = j->tk, .x_row = pitch, .w_row = j->v.t,
                        .out_row = j->out.t, .dtype = dtype, .out_dtype = dtype, .w_by_k = 1,
                        .tf32 = tf32};
    if (j->heads > 1) {
        key.batch = j->heads;
        key.x_batch = head;
        key.w_batch = key.out_batch = j->d;
    }
    call->x = shares;
    call->weight = at(&j->v, image, 0);
    call->out = (void *)at(&j->out, image, first);
    call->factor = 1.0f / gain;
    return ac_blas_multiply(call, &key);
}

static ac_status
run(ac_lane *lane, ac_cuda_libraries *libraries, const ac_attention_job *j, bool tf32,
    void *scratch)
{
    ac_blas_call call = {.lane = lane, .libraries = libraries, .workspace = scratch};
    int64_t step = queries_at_once(j);
    AC_TRY(ac_blas_open(libraries));
    for (int64_t image = 0; image < j->images; image++) {
        for (int64_t first = 0; first < j->tq; first += step) {
            AC_TRY(run_part(&call, j, tf32, image, first, AC_MIN(step, j->tq - first)));
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
    ac_status status = run(lane, libraries, &j, p->tf32, scratch);
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
