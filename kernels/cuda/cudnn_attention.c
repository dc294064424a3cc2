/* cudnn_attention: attention through cuDNN's one operation for it (9.13 and later, sm_80).
 *
 * Token strides are free, so slices of a merged query-key-value product are read where they are;
 * heads lie side by side.  The library compiles it at run time, a quarter of a second a problem.
 * No mask and no causal order: those are short texts, for attention_flash.cu, which is also what
 * tune.c compares with. */
#include "attention.h"
#include "dnn.h"
#include "list.h"

#include <string.h>

#define WORKSPACE ((size_t)4 << 20)

enum { Q = 1, K, V, OUT, SCALE };

/* key.value; strides of image and token follow each other, in the order of operands */
enum { IMAGES, HEADS, TOKENS, KEYS, SIZE, STRIDES };

#if CUDNN_VERSION >= 91300

static ac_dnn_descriptor
operand(ac_dnn_graph *g, const ac_dnn_key *key, int64_t id)
{
    const int64_t *v = key->value, *stride = &v[STRIDES + 2 * (id - Q)];
    ac_dnn_tensor t = {.id = id, .dtype = (ac_dtype)key->dtype,
                       .dim = {v[IMAGES], v[HEADS], id == K || id == V ? v[KEYS] : v[TOKENS],
                               v[SIZE]},
                       .stride = {stride[0], v[SIZE], stride[1], 1}};
    return ac_dnn_tensor_new(g, &t);
}

static void
describe(ac_dnn_graph *g, const ac_dnn_key *key)
{
    ac_dnn_tensor scale = {.id = SCALE, .dtype = AC_F32, .dim = {1, 1, 1, 1},
                           .stride = {1, 1, 1, 1}, .by_value = true};
    ac_dnn_descriptor op = ac_dnn_begin(g, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, operand(g, key, Q));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, operand(g, key, K));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, operand(g, key, V));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, operand(g, key, OUT));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, ac_dnn_tensor_new(g, &scale));
    ac_dnn_end(g, op, true);
}

#else /* headers that lack the operation */

static void
describe(ac_dnn_graph *g, const ac_dnn_key *key)
{
    (void)key;
    g->status = CUDNN_STATUS_NOT_SUPPORTED;
}

#endif

/* ---- the kernel ------------------------------------------------------------------------------ */

static ac_status
run_own(ac_lane *lane, const void *context)
{
    return ac_cuda_flash(lane, context);
}

/* How many images at a time: no offset reaches 2^31 elements. */
static int64_t
images_at_once(const ac_attention_job *j)
{
    int64_t most = AC_MAX(AC_MAX(j->q.n, j->k.n), AC_MAX(j->v.n, j->out.n));
    return AC_MIN(j->images, INT32_MAX / AC_MAX(most, 1));
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    if (!ac_attention_job_of(p, &j) || caps->isa < 80 || j.mask || ac_operand(p, AC_ATTN_MASK) ||
        j.causal) {
        return false;
    }
    return ac_attention_flash_fits(&j, caps->isa) && /* another way that it is measured against */
           j.images > 0 && j.tq > 0 && j.tk > 0 && images_at_once(&j) > 0 &&
           CUDNN_VERSION >= 91300 && ac_dnn_found(13);
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    (void)p;
    (void)caps;
    return WORKSPACE;
}

static void
move(ac_attention_operand *o, int64_t images)
{
    o->data = (const char *)o->data + images * o->n * (int64_t)ac_dtype_size(o->dtype);
}

static ac_status
run_part(ac_lane *lane, const ac_attention_job *whole, int64_t first, int64_t count, void *scratch)
{
    ac_attention_job j = *whole;
    ac_attention_operand *all[] = {&j.q, &j.k, &j.v, &j.out};
    j.images = count;
    ac_dnn_call call = {.lane = lane, .describe = describe, .workspace = scratch,
                        .workspace_bytes = WORKSPACE, .own = {{"own", run_own}},
                        .n_own = 1, .context = &j, .n_operands = 5};
    memset(&call.key, 0, sizeof call.key);
    call.key.kind = AC_DNN_ATTENTION;
    call.key.dtype = j.q.dtype;
    int64_t *v = call.key.value;
    v[IMAGES] = count;
    v[HEADS] = j.heads;
    v[TOKENS] = j.tq;
    v[KEYS] = j.tk;
    v[SIZE] = j.d;
    for (int i = 0; i < 4; i++) {
        move(all[i], first);
        v[STRIDES + 2 * i] = all[i]->n;
        v[STRIDES + 2 * i + 1] = all[i]->t;
        call.id[i] = Q + i;
        call.address[i] = all[i]->data;
    }
    call.id[4] = SCALE;
    call.address[4] = &j.scale;
    return ac_dnn_run(&call);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_attention_job j;
    (void)prepared;
    ac_attention_job_of(p, &j);
    if (!ac_attention_flash_aligned(&j)) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "attention: found an operand that does not begin at "
                                              "a multiple of 16 bytes");
    }
    int64_t step = images_at_once(&j);
    for (int64_t first = 0; first < j.images; first += step) {
        AC_TRY(run_part(lane, &j, first, AC_MIN(step, j.images - first), scratch));
    }
    return AC_OK;
}

const ac_kernel ac_cuda_attention_cudnn = {
    .name = "cuda.attention.cudnn",
    .op = AC_OP_ATTENTION,
    .supports = supports,
    .scratch = scratch_bytes,
    .launch = launch,
};
