/* cublaslt: products through cuBLASLt, for linear layers and attention; see blas.h.
 *
 * Row-major y [m, n] = x w^T is the column-major product y^T [n, m] = w x^T, so w is the left
 * operand, and a bias runs along the rows of the result.
 *
 * tune.c picks one of the algorithms that the heuristic names, eight or so, and of those that it
 * names for other sizes (pool), among which a UNet's layers often have their best one.  Atomics and
 * sums in f16 are left out, so results are the same in every run.
 *
 * Built where cublasLt.h is found; without the library, the next kernels of the list are taken. */
#include "blas.h"
#include "tune.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { ALGORITHMS = 16, POOL = 64, WAYS = ALGORITHMS + POOL };
enum { POOL_ROWS = 1 << 16, POOL_COLUMNS = 320 }; /* where the pool is measured */

/* ---- the library ----------------------------------------------------------------------------- */

#define ENTRY_POINTS(X)                                                                            \
    X(Create)                                                                                      \
    X(Destroy)                                                                                     \
    X(GetVersion)                                                                                  \
    X(Matmul)                                                                                      \
    X(MatmulAlgoCheck)                                                                             \
    X(MatmulAlgoGetHeuristic)                                                                      \
    X(MatmulDescCreate)                                                                            \
    X(MatmulDescDestroy)                                                                           \
    X(MatmulDescSetAttribute)                                                                      \
    X(MatmulPreferenceCreate)                                                                      \
    X(MatmulPreferenceDestroy)                                                                     \
    X(MatmulPreferenceSetAttribute)                                                                \
    X(MatrixLayoutCreate)                                                                          \
    X(MatrixLayoutDestroy)                                                                         \
    X(MatrixLayoutSetAttribute)

static struct library {
    bool found;
#define X(name) __typeof__(cublasLt##name) *name;
    ENTRY_POINTS(X)
#undef X
} lt;

static pthread_once_t lt_once = PTHREAD_ONCE_INIT;
static const char *lt_missing; /* why it is not used; NULL: it is */

static void
load_library(void)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    static const char *const folders[] = {"cu13", "cublas"};
    void *library = ac_cuda_library_open(&(ac_library_search){names, 2, folders, 2});
    if (!library) {
        lt_missing = "no cuBLASLt 12 or 13 was found: own kernels multiply, slower "
                     "(pip install nvidia-cublas)";
        ac_cuda_log(1, "cuda: %s", lt_missing);
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
        lt_missing = "cuBLASLt lacks entry points: own kernels multiply, slower";
        ac_cuda_log(1, "cuda: %s", lt_missing);
    }
}

bool
ac_cuda_describe_blas(char *text, size_t size)
{
    if (!ac_blas_found()) {
        snprintf(text, size, "%s", lt_missing);
        return false;
    }
    size_t version = lt.GetVersion(); /* 130100, 120805 */
    snprintf(text, size, "cuBLASLt %zu.%zu.%zu", version / 10000, version / 100 % 100,
             version % 100);
    return true;
}

static ac_status
check(cublasStatus_t status, const char *call)
{
    return status == CUBLAS_STATUS_SUCCESS        ? AC_OK
           : status == CUBLAS_STATUS_ALLOC_FAILED ? ac_cuda_no_memory(call)
           : ac_cuda_fail(AC_E_DEVICE, "cuda: %s: cuBLAS status %d", call, (int)status);
}

#define LT(call, ...) AC_TRY(check(lt.call(__VA_ARGS__), "cublasLt" #call))

bool
ac_blas_found(void)
{
    pthread_once(&lt_once, load_library);
    return lt.found;
}

ac_status
ac_blas_open(ac_cuda_libraries *libraries)
{
    if (!libraries->blas) {
        AC_TRY(ac_cuda_heap(sizeof *libraries->blas, (void **)&libraries->blas));
    }
    return libraries->blas->handle ? AC_OK
                                   : check(lt.Create(&libraries->blas->handle), "cublasLtCreate");
}

/* ---- products: one call of the library ------------------------------------------------------- */

typedef struct product {
    ac_blas_key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, c, out;
    /* In the heuristic's order, then the pool's; the caller's, or gone once one is chosen. */
    cublasLtMatmulAlgo_t *algorithm;
    cublasLtMatmulAlgo_t best;
    int32_t count, chosen; /* chosen -1: not yet */
} product;

/* Algorithms that the heuristic names for the sizes below; the same in every process, so that a
 * choice that was remembered is found. */
struct ac_blas_pool {
    int32_t dtype, out_dtype, w_by_k, tf32;
    cublasLtMatmulAlgo_t algorithm[POOL];
    int32_t count;
};

/* A call with what was found for it; a tune context. */
typedef struct trial {
    const ac_blas_call *call;
    ac_cuda_blas *blas;
    product *p;
} trial;

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
    for (int32_t i = 0; i < blas->products.count; i++) {
        product *p = blas->products.at[i].item;
        product_free(p);
        ac_cuda_host->free(p->algorithm);
    }
    if (blas->handle) {
        lt.Destroy(blas->handle);
    }
    ac_cuda_known_free(&blas->products);
    ac_cuda_known_free(&blas->layers);
    ac_cuda_host->free(blas->pools);
    ac_cuda_host->free(blas);
}

static cudaDataType_t
cuda_type(int32_t dtype)
{
    return dtype == AC_F32 ? CUDA_R_32F : dtype == AC_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

static ac_status
set_batch(cublasLtMatrixLayout_t layout, int32_t batch, int64_t stride)
{
    LT(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
    LT(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
       sizeof stride);
    return AC_OK;
}

static ac_status
describe(product *p)
{
    const ac_blas_key *k = &p->key;
    cudaDataType_t type = cuda_type(k->dtype);
    cudaDataType_t out_type = cuda_type(k->out_dtype);
    cublasOperation_t w_as = k->w_by_k ? CUBLAS_OP_N : CUBLAS_OP_T;
    uint64_t w_size[2] = {(uint64_t)(k->w_by_k ? k->n : k->k), (uint64_t)(k->w_by_k ? k->k : k->n)};
    cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    LT(MatmulDescCreate, &p->desc, k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
       CUDA_R_32F);
    LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &w_as, sizeof w_as);
    LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    LT(MatrixLayoutCreate, &p->w, type, w_size[0], w_size[1], k->w_row);
    LT(MatrixLayoutCreate, &p->x, type, (uint64_t)k->k, (uint64_t)k->m, k->x_row);
    LT(MatrixLayoutCreate, &p->out, out_type, (uint64_t)k->n, (uint64_t)k->m, k->out_row);
    LT(MatrixLayoutCreate, &p->c, out_type, (uint64_t)k->n, (uint64_t)k->m,
       k->residual ? k->residual_row : k->out_row);
    if (k->batch > 1) {
        AC_TRY(set_batch(p->w, k->batch, k->w_batch));
        AC_TRY(set_batch(p->x, k->batch, k->x_batch));
        AC_TRY(set_batch(p->out, k->batch, k->out_batch));
        AC_TRY(set_batch(p->c, k->batch, k->out_batch));
    }
    return AC_OK;
}

static ac_status
ask(ac_cuda_blas *blas, product *p, cublasLtMatmulPreference_t preference)
{
    size_t workspace = AC_BLAS_WORKSPACE;
    const ac_blas_key *k = &p->key;
    bool even = k->dtype != AC_F32 || (k->n % 4 == 0 && k->out_row % 4 == 0);
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment[] = {16, 16, 16, 16};
    alignment[2] = alignment[3] = even ? 16 : 4;
    static const cublasLtMatmulPreferenceAttributes_t sides[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    LT(MatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
       &workspace, sizeof workspace);
    LT(MatmulPreferenceSetAttribute, preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
       &reduction, sizeof reduction);
    for (size_t i = 0; i < AC_ARRAY_LEN(sides); i++) {
        LT(MatmulPreferenceSetAttribute, preference, sides[i], &alignment[i],
           sizeof alignment[i]);
    }
    cublasLtMatmulHeuristicResult_t result[ALGORITHMS];
    int found = 0;
    memset(result, 0, sizeof result);
    cublasStatus_t status = lt.MatmulAlgoGetHeuristic(blas->handle, p->desc, p->w, p->x, p->c,
                                                      p->out, preference, ALGORITHMS, result,
                                                      &found);
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; i++) {
        if (result[i].state == CUBLAS_STATUS_SUCCESS &&
            result[i].workspaceSize <= AC_BLAS_WORKSPACE) {
            p->algorithm[p->count++] = result[i].algo;
        }
    }
    return AC_OK;
}

static ac_status
ask_heuristic(ac_cuda_blas *blas, product *p)
{
    cublasLtMatmulPreference_t preference;
    AC_TRY(describe(p));
    LT(MatmulPreferenceCreate, &preference);
    ac_status status = ask(blas, p, preference);
    lt.MatmulPreferenceDestroy(preference);
    return status;
}

static bool
has(const cublasLtMatmulAlgo_t *list, int32_t count, const cublasLtMatmulAlgo_t *algorithm)
{
    for (int32_t i = 0; i < count; i++) {
        if (memcmp(&list[i], algorithm, sizeof *algorithm) == 0) {
            return true;
        }
    }
    return false;
}

/* Layers of the real models, from text encoders to the widest ones. */
static const int64_t pool_sizes[][3] = {
    {128, 1280, 1280}, {154, 768, 768}, {154, 3072, 768}, {512, 1280, 1280}, {512, 10240, 1280},
    {512, 1280, 5120}, {2048, 640, 640}, {2048, 5120, 640}, {2048, 1280, 1280},
    {2048, 3840, 1280}, {2048, 10240, 1280}, {2048, 1280, 5120}, {8192, 320, 320},
    {8192, 2560, 320}, {8192, 320, 1280}, {8192, 640, 640}, {8192, 1920, 640}, {8192, 5120, 640},
    {8192, 640, 2560}, {128, 1280, 11520}, {512, 1280, 11520},
};

static ac_status
fill_pool(ac_cuda_blas *blas, const ac_blas_key *like, ac_blas_pool *pool)
{
    for (size_t i = 0; i < AC_ARRAY_LEN(pool_sizes); i++) {
        const int64_t *size = pool_sizes[i];
        cublasLtMatmulAlgo_t algorithm[ALGORITHMS];
        product p = {.algorithm = algorithm,
                     .key = {.m = size[0], .n = size[1], .k = size[2], .x_row = size[2],
                             .w_row = like->w_by_k ? size[1] : size[2], .out_row = size[1],
                             .dtype = like->dtype, .out_dtype = like->out_dtype,
                             .bias = like->out_dtype == like->dtype, .w_by_k = like->w_by_k,
                             .tf32 = like->tf32}};
        ac_status status = ask_heuristic(blas, &p);
        for (int32_t k = 0; status == AC_OK && k < p.count && pool->count < POOL; k++) {
            if (!has(pool->algorithm, pool->count, &p.algorithm[k])) {
                pool->algorithm[pool->count++] = p.algorithm[k];
            }
        }
        product_free(&p);
        AC_TRY(status);
    }
    return AC_OK;
}

static ac_status
find_pool(ac_cuda_blas *blas, const ac_blas_key *key, const ac_blas_pool **out)
{
    ac_blas_pool *pool;
    for (int32_t i = 0; i < blas->n_pools; i++) {
        pool = &blas->pools[i];
        if (pool->dtype == key->dtype && pool->out_dtype == key->out_dtype &&
            pool->w_by_k == key->w_by_k && pool->tf32 == key->tf32) {
            *out = pool;
            return AC_OK;
        }
    }
    AC_TRY(ac_cuda_heap_grow((void **)&blas->pools, blas->n_pools, &blas->pools_capacity,
                             sizeof *pool));
    pool = &blas->pools[blas->n_pools];
    *pool = (ac_blas_pool){.dtype = key->dtype, .out_dtype = key->out_dtype,
                           .w_by_k = key->w_by_k, .tf32 = key->tf32};
    AC_TRY(fill_pool(blas, key, pool));
    blas->n_pools++;
    *out = pool;
    return AC_OK;
}

/* The pool's algorithms are for products like those they were named for.  On 2^20 and more rows of
 * 128 columns, where none is faster than the heuristic's, the GPU was lost three times while they
 * were measured; many of them are clusters of blocks that are wider than that. */
static bool
is_for_pool(const ac_blas_key *k)
{
    int64_t row = AC_MAX(AC_MAX(k->x_row, k->out_row), k->residual_row);
    return k->batch <= 1 && k->m <= POOL_ROWS && k->n >= POOL_COLUMNS &&
           k->m * row * (int64_t)ac_dtype_size((ac_dtype)k->dtype) <= INT32_MAX;
}

static ac_status
list_algorithms(ac_cuda_blas *blas, product *p)
{
    const ac_blas_pool *pool;
    AC_TRY(ask_heuristic(blas, p));
    if (p->count == 0 || !is_for_pool(&p->key)) {
        return AC_OK;
    }
    AC_TRY(find_pool(blas, &p->key, &pool));
    for (int32_t i = 0; i < pool->count && p->count < WAYS; i++) {
        cublasLtMatmulHeuristicResult_t result;
        const cublasLtMatmulAlgo_t *algorithm = &pool->algorithm[i];
        if (!has(p->algorithm, p->count, algorithm) &&
            lt.MatmulAlgoCheck(blas->handle, p->desc, p->w, p->x, p->c, p->out, algorithm,
                               &result) == CUBLAS_STATUS_SUCCESS &&
            result.workspaceSize <= AC_BLAS_WORKSPACE) {
            p->algorithm[p->count++] = *algorithm;
        }
    }
    return AC_OK;
}

static ac_status
make_product(ac_cuda_blas *blas, product *p)
{
    AC_TRY(ac_cuda_heap(sizeof *p->algorithm * WAYS, (void **)&p->algorithm));
    AC_TRY(list_algorithms(blas, p));
    return ac_cuda_known_add(&blas->products, p, sizeof p->key);
}

static ac_status
find_product(ac_cuda_blas *blas, const ac_blas_key *key, product **out)
{
    *out = ac_cuda_known_find(&blas->products, key, sizeof *key);
    if (*out) {
        return AC_OK;
    }
    product *p;
    AC_TRY(ac_cuda_heap(sizeof *p, (void **)&p));
    p->key = *key;
    p->chosen = -1;
    ac_status status = make_product(blas, p);
    if (status < 0) {
        product_free(p);
        ac_cuda_host->free(p->algorithm);
        ac_cuda_host->free(p);
        return status;
    }
    *out = p;
    return AC_OK;
}

/* Thousands of products may be known, and each has up to 80 algorithms. */
static void
keep_chosen(product *p)
{
    p->best = p->algorithm[p->chosen];
    ac_cuda_host->free(p->algorithm);
    p->algorithm = NULL;
}

static ac_status
run_product(void *context, int32_t i)
{
    const trial *t = context;
    const ac_blas_call *c = t->call;
    product *p = t->p;
    float beta = p->key.residual ? 1.0f : 0.0f;
    if (p->key.bias) {
        LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &c->bias,
           sizeof c->bias);
    }
    LT(Matmul, t->blas->handle, p->desc, &c->factor, c->weight, p->w, c->x, p->x, &beta,
       p->key.residual ? c->residual : c->out, p->c, c->out, p->out,
       p->algorithm ? &p->algorithm[i] : &p->best, c->workspace, AC_BLAS_WORKSPACE,
       c->lane->stream);
    return ac_cuda_launched(c->lane, cudaGetLastError(), "cublasLtMatmul");
}

/* The algorithm's description is opaque, but the same in every process of one version. */
static void
name_algorithm(const void *context, int32_t i, char name[AC_TUNE_WAY])
{
    const trial *t = context;
    const cublasLtMatmulAlgo_t *algorithm = &t->p->algorithm[i];
    uint64_t hash = ac_tune_hash(AC_TUNE_HASH, algorithm, sizeof *algorithm);
    snprintf(name, AC_TUNE_WAY, "%016llx", (unsigned long long)hash);
}

int
ac_blas_key_text(char *text, size_t size, const char *what, const ac_blas_key *k)
{
    int used = snprintf(text, size,
                        "cublasLt %zu %s %s%s%s m%lld n%lld k%lld rows %lld %lld%s %lld %lld b%d",
                        lt.GetVersion(), what, ac_dtype_name((ac_dtype)k->dtype),
                        k->out_dtype == k->dtype ? "" : " to float32", k->tf32 ? " tf32" : "",
                        (long long)k->m, (long long)k->n, (long long)k->k, (long long)k->x_row,
                        (long long)k->w_row, k->w_by_k ? "k" : "", (long long)k->out_row,
                        (long long)k->residual_row, (int)k->bias);
    if (k->batch > 1 && used > 0 && used < (int)size) {
        used += snprintf(text + used, size - (size_t)used, " x%d %lld %lld %lld", (int)k->batch,
                         (long long)k->x_batch, (long long)k->w_batch, (long long)k->out_batch);
    }
    return used;
}

ac_status
ac_blas_multiply(const ac_blas_call *call, const ac_blas_key *key)
{
    trial t = {.call = call, .blas = call->libraries->blas};
    AC_TRY(find_product(t.blas, key, &t.p));
    if (t.p->count == 0) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "cuda: cuBLASLt has no algorithm for a product");
    }
    if (t.p->chosen < 0) {
        char text[AC_TUNE_KEY];
        ac_blas_key_text(text, sizeof text, "product", key);
        AC_TRY(ac_tune_choose(call->lane, call->libraries,
                              &(ac_tune_ways){text, t.p->count, &t, name_algorithm, run_product},
                              &t.p->chosen));
        keep_chosen(t.p);
    }
    return run_product(&t, t.p->chosen);
}
