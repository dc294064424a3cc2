/* cublaslt: linear layers through cuBLASLt: bias in the epilogue, residual as C with beta 1.
 *
 * Row-major y [m, n] = x w^T is the column-major product y^T [n, m] = w x^T, so w is the left
 * operand, transposed, and a bias runs along the rows of the result.
 *
 * The library is never linked: it is taken from the process (PyTorch's), then from NVIDIA's pip
 * packages, the system and CUDA_HOME, so that it is not in memory twice.  Algorithms come from its
 * heuristic, once for each problem of a device; atomics and sums in f16 are left out, so results
 * are the same in every run.
 *
 * Built where cublasLt.h is found; without the library, the next kernels of the list are taken. */
#include "gemm.h"
#include "list.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <glob.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKSPACE ((size_t)32 << 20) /* what NVIDIA recommends for sm_90 */

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

static const char *const sonames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

static void *
open_first(const char *folder, int flags)
{
    char path[1024];
    void *library = NULL;
    for (size_t i = 0; !library && i < AC_ARRAY_LEN(sonames); i++) {
        snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", sonames[i]);
        library = dlopen(path, RTLD_LAZY | RTLD_LOCAL | flags);
    }
    return library;
}

/* NVIDIA's packages lie beside ours: site-packages/nvidia/cu13/lib; for 12 nvidia/cublas/lib. */
static void *
open_in_site(const char *site)
{
    char folder[960];
    static const char *const parts[] = {"nvidia/cu13/lib", "nvidia/cublas/lib"};
    void *library = NULL;
    for (size_t i = 0; !library && i < AC_ARRAY_LEN(parts); i++) {
        snprintf(folder, sizeof folder, "%s/%s", site, parts[i]);
        library = open_first(folder, 0);
    }
    return library;
}

static void *
open_packages(void)
{
    char path[900];
    Dl_info self;
    void *library = NULL;
    if (dladdr((void *)&lt, &self) && self.dli_fname) {
        snprintf(path, sizeof path, "%s", self.dli_fname);
        char *slash = strrchr(path, '/');
        if (slash) {
            snprintf(slash, sizeof path - (size_t)(slash - path), "/..");
            library = open_in_site(path);
        }
    }
    const char *environment = getenv("VIRTUAL_ENV");
    glob_t sites;
    if (!library && environment) {
        snprintf(path, sizeof path, "%s/lib/python3*/site-packages", environment);
        if (glob(path, 0, NULL, &sites) == 0) {
            library = sites.gl_pathc ? open_in_site(sites.gl_pathv[0]) : NULL;
            globfree(&sites);
        }
    }
    return library;
}

static void
load_library(void)
{
    char folder[900], text[200];
    const char *home = getenv("CUDA_HOME");
    void *library = open_first("", RTLD_NOLOAD);
    library = library ? library : open_packages();
    library = library ? library : open_first("", 0);
    snprintf(folder, sizeof folder, "%s/lib64", home ? home : "/usr/local/cuda");
    library = library ? library : open_first(folder, 0);
    if (!library) {
        ac_cuda_host->log(1, "cuda: no cuBLASLt 12 or 13 was found; own kernels multiply");
        return;
    }
    lt.found = true;
#define X(name)                                                                                    \
    *(void **)&lt.name = dlsym(library, "cublasLt" #name);                                         \
    lt.found = lt.found && lt.name;
    ENTRY_POINTS(X)
#undef X
    snprintf(text, sizeof text, "cuda: cuBLASLt %zu", lt.found ? lt.GetVersion() : 0);
    ac_cuda_host->log(2, text);
}

static ac_status
check(cublasStatus_t status, const char *call)
{
    return status == CUBLAS_STATUS_SUCCESS
               ? AC_OK
               : ac_cuda_fail(AC_E_DEVICE, "cuda: %s: cuBLAS status %d", call, (int)status);
}

#define LT(call, ...) AC_TRY(check(lt.call(__VA_ARGS__), "cublasLt" #call))

/* ---- products that have been asked for ------------------------------------------------------- */

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
    cublasLtMatmulAlgo_t algo;
    bool usable; /* the library has an algorithm */
} product;

struct ac_cuda_blas {
    cublasLtHandle_t handle;
    product *products;
    int32_t count, capacity;
};

/* Handles, the table and a descriptor's bias pointer: one thread at a time, for some
 * microseconds. */
static pthread_mutex_t blas_lock = PTHREAD_MUTEX_INITIALIZER;

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
    for (int32_t i = 0; i < blas->count; i++) {
        product_free(&blas->products[i]);
    }
    if (blas->handle) {
        lt.Destroy(blas->handle);
    }
    ac_cuda_host->free(blas->products);
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
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasStatus_t status = lt.MatmulAlgoGetHeuristic(blas->handle, p->desc, p->w, p->x, p->c,
                                                      p->out, preference, 1, &result, &found);
    p->usable = status == CUBLAS_STATUS_SUCCESS && found == 1 &&
                result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE;
    p->algo = result.algo;
    return AC_OK;
}

static ac_status
choose(ac_cuda_blas *blas, product *p)
{
    cublasLtMatmulPreference_t preference;
    AC_TRY(describe(p));
    LT(MatmulPreferenceCreate, &preference);
    ac_status status = ask(blas, p, preference);
    lt.MatmulPreferenceDestroy(preference);
    return status;
}

static ac_status
grow(ac_cuda_blas *blas)
{
    int32_t capacity = blas->capacity ? 2 * blas->capacity : 128;
    product *more = ac_cuda_host->alloc(sizeof *more * (size_t)capacity);
    if (!more) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                            sizeof *more * (size_t)capacity);
    }
    if (blas->count) {
        memcpy(more, blas->products, sizeof *more * (size_t)blas->count);
    }
    ac_cuda_host->free(blas->products);
    blas->products = more;
    blas->capacity = capacity;
    return AC_OK;
}

static ac_status
find_product(ac_cuda_blas *blas, const product_key *key, product **out)
{
    for (int32_t i = 0; i < blas->count; i++) {
        if (memcmp(&blas->products[i].key, key, sizeof *key) == 0) {
            *out = &blas->products[i];
            return AC_OK;
        }
    }
    if (blas->count == blas->capacity) {
        AC_TRY(grow(blas));
    }
    product *p = &blas->products[blas->count];
    memset(p, 0, sizeof *p);
    p->key = *key;
    ac_status status = choose(blas, p);
    if (status < 0) {
        product_free(p);
        return status;
    }
    blas->count++;
    *out = p;
    return AC_OK;
}

static ac_status
find_blas(const ac_lane *lane, ac_cuda_blas **out)
{
    ac_cuda_blas **slot = ac_cuda_blas_slot(lane);
    if (!*slot) {
        ac_cuda_blas *blas = ac_cuda_host->alloc(sizeof *blas);
        if (!blas) {
            return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                                sizeof *blas);
        }
        memset(blas, 0, sizeof *blas);
        ac_status status = check(lt.Create(&blas->handle), "cublasLtCreate");
        if (status < 0) {
            ac_cuda_host->free(blas);
            return status;
        }
        *slot = blas;
    }
    *out = *slot;
    return AC_OK;
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Rows at one distance, columns side by side, everything in units of 16 bytes. */
static bool
key_of(const ac_gemm *g, product_key *key)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(g->x[0].dtype);
    bool residual = g->residual.data;
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
    if (key->m == 1) { /* one row has no distance */
        key->x_row = key->k;
        key->out_row = key->residual_row = key->n;
    }
    return g->rows == g->out_width && g->x[0].c == 1 && g->out.c == 1 && g->w_c == 1 &&
           (!residual || g->residual.c == 1) && key->n % unit == 0 && key->k % unit == 0 &&
           key->x_row % unit == 0 && key->w_row % unit == 0 && key->out_row % unit == 0 &&
           key->residual_row % unit == 0 && key->x_row >= key->k && key->w_row >= key->k &&
           key->out_row >= key->n && (!residual || key->residual_row >= key->n);
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    product_key key;
    ac_dtype dtype = p->output.dtype;
    if (p->attr.linear.gated || p->attr.linear.act != AC_ACT_NONE ||
        ac_operand(p, AC_LINEAR_X2) || !ac_gemm_of(p, &g) || !key_of(&g, &key) || g.rows < 1 ||
        caps->isa < (dtype == AC_BF16 ? 80 : 75)) {
        return false;
    }
    if (g.x[0].dtype != dtype || g.weight_dtype != dtype ||
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
    (void)p;
    (void)caps;
    return WORKSPACE;
}

static ac_status
multiply(ac_lane *lane, const ac_gemm *g, const product_key *key, void *scratch, bool *done)
{
    ac_cuda_blas *blas = NULL;
    product *p = NULL;
    float one = 1.0f, beta = key->residual ? 1.0f : 0.0f;
    AC_TRY(find_blas(lane, &blas));
    AC_TRY(find_product(blas, key, &p));
    *done = p->usable;
    if (!p->usable) {
        return AC_OK;
    }
    if (key->bias) {
        LT(MatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g->bias,
           sizeof g->bias);
    }
    const void *c = key->residual ? g->residual.data : g->out.data;
    LT(Matmul, blas->handle, p->desc, &one, g->weight, p->w, g->x[0].data, p->x, &beta, c, p->c,
       (void *)g->out.data, p->out, &p->algo, scratch, WORKSPACE, lane->stream);
    return ac_cuda_launched(lane, cudaGetLastError(), "cublasLtMatmul");
}

static bool
aligned(const ac_gemm *g)
{
    uintptr_t all = (uintptr_t)g->x[0].data | (uintptr_t)g->weight | (uintptr_t)g->out.data |
                    (uintptr_t)g->residual.data | (uintptr_t)g->bias;
    return all % 16 == 0;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)prepared;
    ac_gemm g;
    product_key key;
    int previous;
    bool done = false;
    ac_gemm_of(p, &g);
    key_of(&g, &key);
    if (aligned(&g)) {
        AC_TRY(ac_cuda_enter(lane, &previous));
        pthread_mutex_lock(&blas_lock);
        ac_status status = multiply(lane, &g, &key, scratch, &done);
        pthread_mutex_unlock(&blas_lock);
        AC_TRY(ac_cuda_leave(lane, previous, status));
    }
    return done                   ? AC_OK
           : p->output.dtype == AC_F32 || !ac_gemm_mma_aligned(&g) ? ac_cuda_gemm_plain(lane, &g)
                                                                  : ac_cuda_gemm_mma(lane, &g);
}

const ac_kernel ac_cuda_linear_cublaslt = {
    .name = "cuda.linear.cublaslt",
    .op = AC_OP_LINEAR,
    .supports = supports,
    .scratch = scratch_bytes,
    .launch = launch,
};
