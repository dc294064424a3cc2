/* cublaslt: linear layers through cuBLASLt: bias in the epilogue, residual as C with beta 1.
 *
 *     gated       [value|gate] = x w^T + b into scratch, some rows at a time; then the gate
 *     activation  the product, then the activation in place
 *     x2          x1 w1^T + b + residual, then + x2 w2^T
 *
 * Row-major y [m, n] = x w^T is the column-major product y^T [n, m] = w x^T, so w is the left
 * operand, transposed, and a bias runs along the rows of the result.
 *
 * The library's heuristic names up to 16 algorithms; tune.c picks one, and for f16 and bf16 then
 * between the library and gemm_mma.cu, which does all of it in one kernel.  Atomics and sums in f16
 * are left out, so results are the same in every run.
 *
 * Built where cublasLt.h is found; without the library, the next kernels of the list are taken. */
#include "gemm.h"
#include "list.h"
#include "rowwise.h"
#include "tune.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define WORKSPACE ((size_t)32 << 20) /* what NVIDIA recommends for sm_90 */
#define GATED_BYTES ((size_t)96 << 20) /* of [value|gate] in scratch at once */
#define ELEMENTS INT32_MAX /* of one operand: beyond it some kernels count wrong */

enum { ALGORITHMS = 16 };

/* ---- the library ----------------------------------------------------------------------------- */

#define ENTRY_POINTS(X)                                                                            \
    X(Create)                                                                                      \
    X(Destroy)                                                                                     \
    X(GetVersion)                                                                                  \
    X(Matmul)                                                                                      \
    X(MatmulAlgoGetHeuristic)                                                                      \
    X(MatmulDescCreate)                                                                            \
    X(MatmulDescDestroy)                                                                           \
    X(MatmulDescSetAttribute)                                                                      \
    X(MatmulPreferenceCreate)                                                                      \
    X(MatmulPreferenceDestroy)                                                                     \
    X(MatmulPreferenceSetAttribute)                                                                \
    X(MatrixLayoutCreate)                                                                          \
    X(MatrixLayoutDestroy)

static struct library {
    bool found;
#define X(name) __typeof__(cublasLt##name) *name;
    ENTRY_POINTS(X)
#undef X
} lt;

static pthread_once_t lt_once = PTHREAD_ONCE_INIT;

static void
load_library(void)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    static const char *const folders[] = {"cu13", "cublas"};
    void *library = ac_cuda_library_open(&(ac_library_search){names, 2, folders, 2});
    if (!library) {
        ac_cuda_log(1, "cuda: no cuBLASLt 12 or 13 was found; own kernels multiply "
                       "(pip install nvidia-cublas)");
        return;
    }
    lt.found = true;
#define X(name)                                                                                    \
    *(void **)&lt.name = dlsym(library, "cublasLt" #name);                                         \
    lt.found = lt.found && lt.name;
    ENTRY_POINTS(X)
#undef X
    if (lt.found) {
        ac_cuda_log(2, "cuda: cuBLASLt %zu", lt.GetVersion());
    } else {
        ac_cuda_log(1, "cuda: cuBLASLt lacks entry points; own kernels multiply");
    }
}

static ac_status
check(cublasStatus_t status, const char *call)
{
    return status == CUBLAS_STATUS_SUCCESS
               ? AC_OK
               : ac_cuda_fail(AC_E_DEVICE, "cuda: %s: cuBLAS status %d", call, (int)status);
}

#define LT(call, ...) AC_TRY(check(lt.call(__VA_ARGS__), "cublasLt" #call))

/* ---- products: one call of the library ------------------------------------------------------- */

typedef struct product_key {
    int64_t m, n, k, x_row, w_row, out_row, residual_row; /* rows in elements */
    int32_t dtype;
    int32_t bias, residual;
    int32_t pad;
} product_key;

typedef struct product {
    product_key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, c, out;
    cublasLtMatmulAlgo_t algorithm[ALGORITHMS]; /* the heuristic's order; freed of all but one */
    int32_t count, chosen;                      /* chosen -1: not yet */
} product;

/* What was chosen for a whole layer: the library's products, or our kernel. */
typedef struct layer {
    product_key key;
    int64_t k2;
    int32_t gated, act;
    int32_t own; /* bool */
    int32_t pad;
} layer;

struct ac_cuda_blas {
    cublasLtHandle_t handle;
    product *products;
    layer *layers;
    int32_t n_products, products_capacity, n_layers, layers_capacity;
};

/* Addresses of one product, and where it runs; a tune context. */
typedef struct call {
    ac_lane *lane;
    ac_cuda_blas *blas;
    ac_cuda_libraries *libraries;
    product *p;
    const void *x, *weight, *bias, *residual;
    void *out, *workspace;
} call;

static void
product_free(product *p)
{
    if (p->desc) {
        lt.MatmulDescDestroy(p->desc);
    }
    cublasLtMatrixLayout_t layouts[] = {p->w, p->x, p->c, p->out};
    for (size_t i = 0; i < AC_ARRAY_LEN(layouts); i++) {
        if (layouts[i]) {
            lt.MatrixLayoutDestroy(layouts[i]);
        }
    }
}

void
ac_cuda_blas_free(ac_cuda_blas *blas)
{
    if (!blas) {
        return;
    }
    for (int32_t i = 0; i < blas->n_products; i++) {
        product_free(&blas->products[i]);
    }
    if (blas->handle) {
        lt.Destroy(blas->handle);
    }
    ac_cuda_host->free(blas->products);
    ac_cuda_host->free(blas->layers);
    ac_cuda_host->free(blas);
}

static cudaDataType_t
cuda_type(int32_t dtype)
{
    return dtype == AC_F32 ? CUDA_R_32F : dtype == AC_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

static ac_status
describe(product *p)
{
    const product_key *k = &p->key;
    cudaDataType_t type = cuda_type(k->dtype);
    cublasOperation_t transposed = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    LT(MatmulDescCreate, &p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
       sizeof transposed);
    LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    LT(MatrixLayoutCreate, &p->w, type, (uint64_t)k->k, (uint64_t)k->n, k->w_row);
    LT(MatrixLayoutCreate, &p->x, type, (uint64_t)k->k, (uint64_t)k->m, k->x_row);
    LT(MatrixLayoutCreate, &p->out, type, (uint64_t)k->n, (uint64_t)k->m, k->out_row);
    LT(MatrixLayoutCreate, &p->c, type, (uint64_t)k->n, (uint64_t)k->m,
       k->residual ? k->residual_row : k->out_row);
    return AC_OK;
}

static ac_status
ask(ac_cuda_blas *blas, product *p, cublasLtMatmulPreference_t preference)
{
    size_t workspace = WORKSPACE;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment = 16;
    static const cublasLtMatmulPreferenceAttributes_t sides[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    LT(MatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
       &workspace, sizeof workspace);
    LT(MatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
       &reduction, sizeof reduction);
    for (size_t i = 0; i < AC_ARRAY_LEN(sides); i++) {
        LT(MatmulPreferenceSetAttribute, preference, sides[i], &alignment, sizeof alignment);
    }
    cublasLtMatmulHeuristicResult_t result[ALGORITHMS];
    int found = 0;
    memset(result, 0, sizeof result);
    cublasStatus_t status = lt.MatmulAlgoGetHeuristic(blas->handle, p->desc, p->w, p->x, p->c,
                                                      p->out, preference, ALGORITHMS, result,
                                                      &found);
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; i++) {
        if (result[i].state == CUBLAS_STATUS_SUCCESS && result[i].workspaceSize <= WORKSPACE) {
            p->algorithm[p->count++] = result[i].algo;
        }
    }
    return AC_OK;
}

static ac_status
list_algorithms(ac_cuda_blas *blas, product *p)
{
    cublasLtMatmulPreference_t preference;
    AC_TRY(describe(p));
    LT(MatmulPreferenceCreate, &preference);
    ac_status status = ask(blas, p, preference);
    lt.MatmulPreferenceDestroy(preference);
    return status;
}

static ac_status
find_product(ac_cuda_blas *blas, const product_key *key, product **out)
{
    for (int32_t i = 0; i < blas->n_products; i++) {
        if (memcmp(&blas->products[i].key, key, sizeof *key) == 0) {
            *out = &blas->products[i];
            return AC_OK;
        }
    }
    AC_TRY(ac_cuda_heap_grow((void **)&blas->products, blas->n_products,
                             &blas->products_capacity, sizeof **out));
    product *p = &blas->products[blas->n_products];
    *p = (product){.key = *key, .chosen = -1};
    ac_status status = list_algorithms(blas, p);
    if (status < 0) {
        product_free(p);
        return status;
    }
    blas->n_products++;
    *out = p;
    return AC_OK;
}

static ac_status
run_product(void *context, int32_t i)
{
    call *c = context;
    product *p = c->p;
    float one = 1.0f, beta = p->key.residual ? 1.0f : 0.0f;
    if (p->key.bias) {
        LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &c->bias,
           sizeof c->bias);
    }
    LT(Matmul, c->blas->handle, p->desc, &one, c->weight, p->w, c->x, p->x, &beta,
       c->residual ? c->residual : c->out, p->c, c->out, p->out, &p->algorithm[i], c->workspace,
       WORKSPACE, c->lane->stream);
    return ac_cuda_launched(c->lane, cudaGetLastError(), "cublasLtMatmul");
}

/* The algorithm's description is opaque, but the same in every process of one version. */
static void
name_algorithm(const void *context, int32_t i, char name[AC_TUNE_WAY])
{
    const call *c = context;
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    const unsigned char *bytes = (const unsigned char *)&c->p->algorithm[i];
    for (size_t k = 0; k < sizeof c->p->algorithm[i]; k++) {
        hash = (hash ^ bytes[k]) * UINT64_C(0x100000001b3);
    }
    snprintf(name, AC_TUNE_WAY, "%016llx", (unsigned long long)hash);
}

static int
key_text(char *text, size_t size, const char *what, const product_key *k)
{
    return snprintf(text, size, "cublasLt %zu %s %s m%lld n%lld k%lld rows %lld %lld %lld %lld b%d",
                    lt.GetVersion(), what, ac_dtype_name((ac_dtype)k->dtype), (long long)k->m,
                    (long long)k->n, (long long)k->k, (long long)k->x_row, (long long)k->w_row,
                    (long long)k->out_row, (long long)k->residual_row, (int)k->bias);
}

/* One product, with the algorithm that is chosen at its first call. */
static ac_status
multiply(call *c, const product_key *key)
{
    AC_TRY(find_product(c->blas, key, &c->p));
    if (c->p->count == 0) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "cuda: cuBLASLt has no algorithm for a product");
    }
    if (c->p->chosen < 0) {
        char text[AC_TUNE_KEY];
        key_text(text, sizeof text, "product", key);
        AC_TRY(ac_tune_choose(c->lane, c->libraries,
                              &(ac_tune_ways){text, c->p->count, c, name_algorithm, run_product},
                              &c->p->chosen));
    }
    return run_product(c, c->p->chosen);
}

/* ---- layers ---------------------------------------------------------------------------------- */

/* A LINEAR, its rows at one distance, columns side by side. */
typedef struct job {
    call call;
    ac_gemm g;
    product_key key; /* of all rows */
    char *scratch;
} job;

static size_t
at(int64_t elements, int32_t dtype)
{
    return (size_t)elements * ac_dtype_size((ac_dtype)dtype);
}

/* How many rows at a time: no operand too large for the library, nor [value|gate] for scratch. */
static int64_t
rows_at_once(const ac_gemm *g, const product_key *k)
{
    int64_t widest = AC_MAX(AC_MAX(k->x_row, k->out_row), AC_MAX(k->residual_row, 2 * k->n));
    int64_t most = AC_MAX(ELEMENTS / AC_MAX(widest, g->x[1].w), 1);
    if (g->gated) {
        most = AC_MIN(most, (int64_t)(GATED_BYTES / at(2 * k->n, k->dtype)));
    }
    most = AC_MAX(most / 128 * 128, 128);
    int64_t parts = (k->m + most - 1) / most;
    return (((k->m + parts - 1) / parts) + 127) / 128 * 128; /* even parts */
}

static ac_status
multiply_gated(job *j, product_key key, int64_t rows, const char *x, char *out)
{
    call c = j->call;
    char *both = j->scratch + WORKSPACE;
    key.n *= 2;
    key.out_row = key.n;
    key.residual = 0;
    key.residual_row = 0;
    c.x = x;
    c.weight = j->g.weight;
    c.bias = j->g.bias;
    c.out = both;
    AC_TRY(multiply(&c, &key));
    ac_rowwise r = {.to = out, .from = both, .dtype = (ac_dtype)key.dtype, .rows = rows,
                    .columns = j->key.n, .to_row = j->key.out_row, .from_row = key.n,
                    .act = j->g.act};
    return ac_cuda_gate_rows(c.lane, &r);
}

static ac_status
multiply_rows(job *j, int64_t first, int64_t rows)
{
    const ac_gemm *g = &j->g;
    product_key key = j->key;
    call c = j->call;
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
    AC_TRY(multiply(&c, &key));
    if (g->channels[1] > 0) {
        key.k = g->channels[1];
        key.x_row = g->x[1].w;
        key.bias = 0;
        key.residual = 1;
        key.residual_row = key.out_row;
        c.x = (const char *)g->x[1].data + at(first * key.x_row, dtype);
        c.weight = (const char *)g->weight + at(g->channels[0], dtype);
        c.residual = out;
        AC_TRY(multiply(&c, &key));
    }
    if (g->act != AC_ACT_NONE) {
        ac_rowwise r = {.to = out, .from = out, .dtype = (ac_dtype)dtype, .rows = rows,
                        .columns = key.n, .to_row = key.out_row, .from_row = key.out_row,
                        .act = g->act};
        return ac_cuda_act_rows(c.lane, &r);
    }
    return AC_OK;
}

enum { LIBRARY, OWN };

static ac_status
run_own(ac_lane *lane, const ac_gemm *g)
{
    return g->x[0].dtype != AC_F32 && ac_gemm_mma_aligned(g) ? ac_cuda_gemm_mma(lane, g)
                                                             : ac_cuda_gemm_plain(lane, g);
}

static ac_status
run_layer(void *context, int32_t way)
{
    job *j = context;
    if (way == OWN) {
        return run_own(j->call.lane, &j->g);
    }
    int64_t step = rows_at_once(&j->g, &j->key);
    for (int64_t first = 0; first < j->key.m; first += step) {
        AC_TRY(multiply_rows(j, first, AC_MIN(step, j->key.m - first)));
    }
    return AC_OK;
}

static void
name_layer(const void *context, int32_t way, char name[AC_TUNE_WAY])
{
    (void)context;
    snprintf(name, AC_TUNE_WAY, "%s", way == OWN ? "own" : "library");
}

static ac_status
choose_layer(job *j, layer *l)
{
    char text[AC_TUNE_KEY];
    int used = key_text(text, sizeof text, "linear", &j->key);
    if (used < (int)sizeof text) {
        snprintf(text + used, sizeof text - (size_t)used, " k2 %lld gated %d act %d",
                 (long long)l->k2, (int)l->gated, (int)l->act);
    }
    bool own = j->key.dtype != AC_F32; /* the plain kernel is no match */
    ac_tune_ways ways = {text, own ? 2 : 1, j, name_layer, run_layer};
    return ac_tune_choose(j->call.lane, j->call.libraries, &ways, &l->own);
}

static ac_status
run_job(job *j)
{
    ac_cuda_blas *blas = j->call.blas;
    layer l = {.key = j->key, .k2 = j->g.channels[1], .gated = j->g.gated, .act = j->g.act};
    for (int32_t i = 0; i < blas->n_layers; i++) {
        l.own = blas->layers[i].own;
        if (memcmp(&l, &blas->layers[i], sizeof l) == 0) {
            return run_layer(j, l.own);
        }
    }
    l.own = LIBRARY;
    AC_TRY(choose_layer(j, &l));
    ac_status status = run_layer(j, l.own);
    if (status == AC_E_UNSUPPORTED) { /* the library has no algorithm */
        l.own = OWN;
        status = run_layer(j, l.own);
    }
    AC_TRY(status);
    AC_TRY(ac_cuda_heap_grow((void **)&blas->layers, blas->n_layers, &blas->layers_capacity,
                             sizeof l));
    blas->layers[blas->n_layers++] = l;
    return AC_OK;
}

static ac_status
find_blas(ac_cuda_libraries *libraries)
{
    if (!libraries->blas) {
        AC_TRY(ac_cuda_heap(sizeof *libraries->blas, (void **)&libraries->blas));
    }
    return libraries->blas->handle ? AC_OK
                                   : check(lt.Create(&libraries->blas->handle), "cublasLtCreate");
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Rows at one distance, columns side by side, everything in units of 16 bytes. */
static bool
key_of(const ac_gemm *g, product_key *key)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(g->x[0].dtype);
    bool residual = g->residual.data, two = g->channels[1] > 0;
    *key = (product_key){.m = g->rows,
                         .n = g->columns,
                         .k = g->channels[0],
                         .x_row = g->x[0].w,
                         .w_row = g->w_row,
                         .out_row = g->out.w,
                         .residual_row = residual ? g->residual.w : 0,
                         .dtype = g->x[0].dtype,
                         .bias = g->bias != NULL,
                         .residual = residual};
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
    product_key key;
    ac_dtype dtype = p->output.dtype;
    if (!ac_gemm_of(p, &g) || !key_of(&g, &key) || g.rows < 1 ||
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
    pthread_once(&lt_once, load_library);
    return lt.found;
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    product_key key;
    (void)caps;
    ac_gemm_of(p, &g);
    key_of(&g, &key);
    int64_t rows = AC_MIN(rows_at_once(&g, &key), key.m);
    return WORKSPACE + (g.gated ? at(2 * rows * key.n, key.dtype) : 0);
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
    job j = {.scratch = scratch, .call = {.lane = lane, .workspace = scratch}};
    ac_gemm_of(p, &j.g);
    key_of(&j.g, &j.key);
    if (!aligned(&j.g)) {
        return run_own(lane, &j.g);
    }
    AC_TRY(ac_cuda_libraries_enter(lane, &j.call.libraries, &previous));
    ac_status status = find_blas(j.call.libraries);
    if (status == AC_OK) {
        j.call.blas = j.call.libraries->blas;
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
