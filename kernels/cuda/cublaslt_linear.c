/* cublaslt_linear: linear layers through cuBLASLt: bias in the epilogue, residual as C with beta 1.
 *
 *     gated       [value|gate] = x w^T + b into scratch, some rows at a time; then the gate
 *     activation  the product, then the activation in place
 *     x2          x1 w1^T + b + residual, then + x2 w2^T; or one product of [x1|x2] in scratch
 *
 * tune.c picks between these: the fewer rows at a time, the more of [value|gate] is still in the
 * cache when the gate reads it.  For f16 and bf16 gemm_mma.cu, which does it all in one kernel, is
 * another way. */
#include "blas.h"
#include "gemm.h"
#include "list.h"
#include "rowwise.h"
#include "tune.h"

#include <stdio.h>
#include <string.h>

#define SCRATCH_BYTES ((size_t)96 << 20) /* of [value|gate] or [x1|x2] at once */
#define CACHED_BYTES ((int64_t)8 << 20) /* of [value|gate]: less stays in any cache */
#define ELEMENTS INT32_MAX /* of one operand: beyond it some kernels count wrong */

/* A LINEAR, its rows at one distance, columns side by side. */
typedef struct job {
    ac_blas_call call;
    ac_gemm g;
    ac_blas_key key; /* of all rows */
    char *scratch;
} job;

static size_t
at(int64_t elements, int32_t dtype)
{
    return (size_t)elements * ac_dtype_size((ac_dtype)dtype);
}

/* How many rows at a time: no operand too large for the library, nor [value|gate] or [x1|x2] for
 * scratch. */
static int64_t
rows_at_once(const ac_gemm *g, const ac_blas_key *k, int32_t least_parts)
{
    int64_t widest = AC_MAX(AC_MAX(k->x_row, k->out_row), AC_MAX(k->residual_row, 2 * k->n));
    int64_t most = AC_MAX(ELEMENTS / AC_MAX(widest, g->x[1].w), 1);
    if (g->gated || g->channels[1] > 0) {
        int64_t row = g->gated ? 2 * k->n : k->k + g->channels[1];
        most = AC_MIN(most, (int64_t)(SCRATCH_BYTES / at(row, k->dtype)));
    }
    return ac_blas_even_rows(k->m, most, least_parts);
}

static ac_status
multiply_gated(job *j, ac_blas_key key, int64_t rows, const char *x, char *out)
{
    ac_blas_call c = j->call;
    char *both = j->scratch + AC_BLAS_WORKSPACE;
    key.n *= 2;
    key.out_row = key.n;
    key.residual = 0;
    key.residual_row = 0;
    c.x = x;
    c.weight = j->g.weight;
    c.bias = j->g.bias;
    c.out = both;
    AC_TRY(ac_blas_multiply(&c, &key));
    ac_rowwise r = {.to = out, .from = both, .dtype = (ac_dtype)key.dtype, .rows = rows,
                    .columns = j->key.n, .to_row = j->key.out_row, .from_row = key.n,
                    .act = j->g.act};
    return ac_cuda_gate_rows(c.lane, &r);
}

/* [x1|x2] of these rows, behind the library's workspace. */
static ac_status
join_rows(const job *j, int64_t first, int64_t rows)
{
    const ac_gemm *g = &j->g;
    int32_t dtype = j->key.dtype;
    ac_join_rows r = {.to = j->scratch + AC_BLAS_WORKSPACE, .rows = rows,
                      .dtype = (ac_dtype)dtype};
    for (int i = 0; i < 2; i++) {
        r.from[i] = (const char *)g->x[i].data + at(first * g->x[i].w, dtype);
        r.from_row[i] = g->x[i].w;
        r.columns[i] = g->channels[i];
    }
    return ac_cuda_join_rows(j->call.lane, &r);
}

static ac_status
multiply_rows(job *j, int64_t first, int64_t rows, bool joined)
{
    const ac_gemm *g = &j->g;
    ac_blas_key key = j->key;
    ac_blas_call c = j->call;
    int32_t dtype = key.dtype;
    const char *x = (const char *)g->x[0].data + at(first * key.x_row, dtype);
    char *out = (char *)g->out.data + at(first * key.out_row, dtype);
    key.m = rows;
    if (g->gated) {
        return multiply_gated(j, key, rows, x, out);
    }
    c.x = x;
    c.weight = g->weight;
    c.bias = g->bias;
    c.out = out;
    if (key.residual) {
        c.residual = (const char *)g->residual.data + at(first * key.residual_row, dtype);
    }
    if (joined) {
        key.k += g->channels[1];
        key.x_row = key.k;
        c.x = j->scratch + AC_BLAS_WORKSPACE;
        AC_TRY(join_rows(j, first, rows));
    }
    AC_TRY(ac_blas_multiply(&c, &key));
    if (g->channels[1] > 0 && !joined) {
        key.k = g->channels[1];
        key.x_row = g->x[1].w;
        key.bias = 0;
        key.residual = 1;
        key.residual_row = key.out_row;
        c.x = (const char *)g->x[1].data + at(first * key.x_row, dtype);
        c.weight = (const char *)g->weight + at(g->channels[0], dtype);
        c.residual = out;
        AC_TRY(ac_blas_multiply(&c, &key));
    }
    if (g->act != AC_ACT_NONE) {
        ac_rowwise r = {.to = out, .from = out, .dtype = (ac_dtype)dtype, .rows = rows,
                        .columns = key.n, .to_row = key.out_row, .from_row = key.out_row,
                        .act = g->act};
        return ac_cuda_act_rows(c.lane, &r);
    }
    return AC_OK;
}

enum { LIBRARY, OWN, HALVES, QUARTERS, JOINED, WAYS };

static const char *const way_names[] = {"library", "own", "library in 2", "library in 4",
                                        "library, joined"};

static ac_status
run_layer(job *j, int32_t way)
{
    if (way == OWN) {
        return ac_cuda_gemm_own(j->call.lane, &j->g);
    }
    int64_t step = rows_at_once(&j->g, &j->key, way == HALVES ? 2 : way == QUARTERS ? 4 : 1);
    for (int64_t first = 0; first < j->key.m; first += step) {
        AC_TRY(multiply_rows(j, first, AC_MIN(step, j->key.m - first), way == JOINED));
    }
    return AC_OK;
}

/* Those worth measuring for a job. */
typedef struct choice {
    job *j;
    int32_t way[WAYS], count;
} choice;

static void
list_layer(choice *c)
{
    const job *j = c->j;
    int64_t both = j->g.gated ? (int64_t)at(2 * j->key.m * j->key.n, j->key.dtype) : 0;
    c->way[c->count++] = LIBRARY;
    if (j->key.dtype != AC_F32) { /* where the plain kernel is no match */
        c->way[c->count++] = OWN;
    }
    if (both > CACHED_BYTES && j->key.m >= 1024) {
        c->way[c->count++] = HALVES;
    }
    if (both > 2 * CACHED_BYTES && j->key.m >= 2048) {
        c->way[c->count++] = QUARTERS;
    }
    if (j->g.channels[1] > 0) {
        c->way[c->count++] = JOINED;
    }
}

static ac_status
run_choice(void *context, int32_t i)
{
    const choice *c = context;
    return run_layer(c->j, c->way[i]);
}

static void
name_choice(const void *context, int32_t i, char name[AC_TUNE_WAY])
{
    snprintf(name, AC_TUNE_WAY, "%s", way_names[((const choice *)context)->way[i]]);
}

static ac_status
choose_layer(job *j, ac_blas_layer *l)
{
    char text[AC_TUNE_KEY];
    int used = ac_blas_key_text(text, sizeof text, "linear", &j->key);
    if (used < (int)sizeof text) {
        snprintf(text + used, sizeof text - (size_t)used, " k2 %lld gated %d act %d",
                 (long long)l->k2, (int)l->gated, (int)l->act);
    }
    choice c = {.j = j};
    list_layer(&c);
    ac_tune_ways ways = {text, c.count, &c, name_choice, run_choice};
    int32_t best;
    AC_TRY(ac_tune_choose(j->call.lane, j->call.libraries, &ways, &best));
    l->way = c.way[best];
    return AC_OK;
}

static ac_status
remember(ac_cuda_blas *blas, const ac_blas_layer *l)
{
    ac_blas_layer *kept;
    AC_TRY(ac_cuda_heap(sizeof *kept, (void **)&kept));
    *kept = *l;
    ac_status status = ac_cuda_known_add(&blas->layers, kept, offsetof(ac_blas_layer, way));
    if (status < 0) {
        ac_cuda_host->free(kept);
    }
    return status;
}

static ac_status
run_job(job *j)
{
    ac_cuda_blas *blas = j->call.libraries->blas;
    ac_blas_layer l = {.key = j->key, .k2 = j->g.channels[1], .gated = j->g.gated, .act = j->g.act};
    const ac_blas_layer *known =
        ac_cuda_known_find(&blas->layers, &l, offsetof(ac_blas_layer, way));
    if (known) {
        return run_layer(j, known->way);
    }
    ac_status status = choose_layer(j, &l);
    if (status == AC_OK) {
        status = run_layer(j, l.way);
    }
    if (status == AC_OK && l.way == LIBRARY && l.k2 > 0) { /* the second product was measured on
                                                            * top of the first */
        status = run_layer(j, l.way);
    }
    if (status == AC_E_UNSUPPORTED) { /* the library has no algorithm */
        l.way = OWN;
        status = run_layer(j, l.way);
    }
    AC_TRY(status);
    return remember(blas, &l);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Rows at one distance, columns side by side, everything in units of 16 bytes. */
static bool
key_of(const ac_gemm *g, bool tf32, ac_blas_key *key)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(g->x[0].dtype);
    bool residual = g->residual.data, two = g->channels[1] > 0;
    *key = (ac_blas_key){.m = g->rows,
                         .n = g->columns,
                         .k = g->channels[0],
                         .x_row = g->x[0].w,
                         .w_row = g->w_row,
                         .out_row = g->out.w,
                         .residual_row = residual ? g->residual.w : 0,
                         .dtype = g->x[0].dtype,
                         .out_dtype = g->x[0].dtype,
                         .bias = g->bias != NULL,
                         .residual = residual,
                         .tf32 = tf32};
    if (key->m == 1 && !two) { /* one row has no distance */
        key->x_row = key->k;
        key->out_row = key->n;
        key->residual_row = residual ? key->n : 0;
    }
    return g->rows == g->out_width && g->x[0].c == 1 && g->out.c == 1 && g->w_c == 1 &&
           (!residual || g->residual.c == 1) && key->n % unit == 0 && key->k % unit == 0 &&
           key->x_row % unit == 0 && key->w_row % unit == 0 && key->out_row % unit == 0 &&
           key->residual_row % unit == 0 && key->x_row >= key->k && key->w_row >= key->k &&
           key->out_row >= key->n && (!residual || key->residual_row >= key->n) &&
           (!two || (g->x[1].c == 1 && g->channels[1] % unit == 0 && g->x[1].w % unit == 0 &&
                     g->x[1].w >= g->channels[1]));
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_blas_key key;
    ac_dtype dtype = p->output.dtype;
    if (!ac_gemm_of(p, &g) || !key_of(&g, p->tf32, &key) || g.rows < 1 ||
        caps->isa < (dtype == AC_BF16 ? 80 : 75)) {
        return false;
    }
    if (g.residual.data && (g.gated || g.act != AC_ACT_NONE)) {
        return false; /* the residual is added after the activation */
    }
    if (g.x[0].dtype != dtype || g.weight_dtype != dtype ||
        (g.channels[1] > 0 && (g.x[1].dtype != dtype || g.gated)) ||
        (g.residual.data && g.residual.dtype != dtype) ||
        (g.bias && (g.bias_dtype != dtype || g.bias_stride != 1))) {
        return false;
    }
    return ac_blas_found();
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_blas_key key;
    (void)caps;
    ac_gemm_of(p, &g);
    key_of(&g, p->tf32, &key);
    int64_t rows = AC_MIN(rows_at_once(&g, &key, 1), key.m);
    int64_t row = g.gated ? 2 * key.n : g.channels[1] > 0 ? key.k + g.channels[1] : 0;
    return AC_BLAS_WORKSPACE + at(rows * row, key.dtype);
}

static bool
aligned(const ac_gemm *g)
{
    uintptr_t all = (uintptr_t)g->x[0].data | (uintptr_t)g->weight | (uintptr_t)g->out.data |
                    (uintptr_t)g->residual.data | (uintptr_t)g->bias |
                    (g->channels[1] > 0 ? (uintptr_t)g->x[1].data : 0);
    return all % 16 == 0;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)prepared;
    int previous;
    job j = {.scratch = scratch, .call = {.lane = lane, .workspace = scratch, .factor = 1.0f}};
    ac_gemm_of(p, &j.g);
    key_of(&j.g, p->tf32, &j.key);
    if (!aligned(&j.g)) {
        return ac_cuda_gemm_own(lane, &j.g);
    }
    AC_TRY(ac_cuda_libraries_enter(lane, &j.call.libraries, &previous));
    ac_status status = ac_blas_open(j.call.libraries);
    if (status == AC_OK) {
        status = run_job(&j);
    }
    return ac_cuda_libraries_leave(lane, previous, status);
}

const ac_kernel ac_cuda_linear_cublaslt = {
    .name = "cuda.linear.cublaslt",
    .op = AC_OP_LINEAR,
    .supports = supports,
    .scratch = scratch_bytes,
    .launch = launch,
};
