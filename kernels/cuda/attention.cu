/* attention: y = softmax(q k^T scale + mask) v, heads side by side in the columns.
 *
 * Three kernels: flash (attention_flash.cu); wide, for heads that do not fit into registers, as two
 * tensor-core GEMMs with a row softmax between them; plain, the same with the plain GEMM, for any
 * dtype and strides.  The last two take so many queries at a time that scores stay in SCORE_BYTES:
 *
 *     scores f32 [image][head][query][key] -> exp(score - row maximum), row sums -> p v / sum
 *
 * The division comes last: exponents of 16384 keys over their sum would be subnormal in f16. */
#include "attention.h"
#include "element.cuh"
#include "gemm.h"
#include "list.h"
#include "reduce.cuh"

static constexpr size_t SCORE_BYTES = (size_t)128 << 20;

/* ---- the softmax between two GEMMs ----------------------------------------------------------- */

struct rows {
    const float *scores;  /* [z][queries][pitch] */
    ac_cells out;         /* the same shape; zeros from tk to pitch */
    float *scale;         /* [z][queries]: 1 / sum */
    int64_t queries, first, tk, pitch;
    const void *mask;
    ac_dtype mask_dtype;
    int64_t mask_n, mask_t;
    int32_t heads;
    float factor;
    bool causal;
};

__device__ static inline float
score(const rows &r, const float *line, int64_t key, int64_t image)
{
    float s = line[key] * r.factor;
    return r.mask ? s + ac_load(r.mask, r.mask_dtype, image * r.mask_n + key * r.mask_t) : s;
}

/* grid: queries, products */
__global__ static void __launch_bounds__(AC_THREADS)
softmax_kernel(rows r)
{
    __shared__ float shared[2][AC_THREADS / 32];
    int64_t row = (int64_t)blockIdx.y * r.queries + blockIdx.x, image = blockIdx.y / r.heads;
    const float *line = r.scores + row * r.pitch;
    int64_t keys = r.causal ? min(r.tk, r.first + blockIdx.x + 1) : r.tk;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t key = threadIdx.x; key < keys; key += AC_THREADS) {
        most = fmaxf(most, score(r, line, key, image));
    }
    most = ac_reduce_block(most, shared[0], ac_most_of());
    for (int64_t key = threadIdx.x; key < r.pitch; key += AC_THREADS) {
        float p = key < keys ? expf(score(r, line, key, image) - most) : 0.0f;
        ac_store(r.out, row * r.pitch + key, p);
        sum += p;
    }
    sum = ac_reduce_block(sum, shared[1], ac_sum_of());
    if (threadIdx.x == 0) {
        r.scale[row] = 1.0f / sum;
    }
}

/* ---- scratch --------------------------------------------------------------------------------- */

struct layout {
    int64_t products, pitch, queries; /* queries taken at a time */
    size_t scores, exponents, values, scale, total; /* offsets in scratch, and its size */
};

static layout
layout_of(const ac_attention_job &j, bool wide)
{
    layout l = {.products = j.images * j.heads, .pitch = (int64_t)ac_align_up((size_t)j.tk, 8)};
    size_t key = wide ? sizeof(float) + ac_dtype_size(j.q.dtype) : sizeof(float);
    size_t query = AC_MAX((size_t)(l.products * l.pitch) * key, (size_t)1);
    int64_t most = (int64_t)(SCORE_BYTES / query) / 128 * 128;
    l.queries = AC_MIN(AC_MAX(most, (int64_t)128), j.tq);
    size_t scores = (size_t)(l.products * l.queries * l.pitch), at = 0;
    l.scores = at;
    at = ac_align_up(at + scores * sizeof(float), 256);
    l.exponents = wide ? at : l.scores;
    at = ac_align_up(at + (wide ? scores * ac_dtype_size(j.q.dtype) : 0), 256);
    l.values = at;
    size_t values = (size_t)(l.products * j.d * l.pitch) * ac_dtype_size(j.q.dtype);
    at = ac_align_up(at + (wide ? values : 0), 256);
    l.scale = at;
    l.total = at + (size_t)(l.products * l.queries) * sizeof(float);
    return l;
}

/* ---- the two GEMMs --------------------------------------------------------------------------- */

static ac_gemm_image
image_of(const void *data, ac_dtype dtype, int64_t row, int64_t column, int64_t image, int64_t head)
{
    return {data, dtype, 0, 0, row, column, {image, head}};
}

/* Queries [first, first + count) of every head. */
static ac_gemm
product(const ac_attention_job &j, int64_t count)
{
    ac_gemm g = {};
    g.height = g.out_height = g.kernel_h = g.kernel_w = g.stride = 1;
    g.width = g.out_width = (int32_t)count;
    g.rows = count;
    g.batch = (int32_t)(j.images * j.heads);
    g.inner = j.heads;
    return g;
}

static const char *
token(const ac_attention_operand &o, int64_t t)
{
    return (const char *)o.data + t * o.t * (int64_t)ac_dtype_size(o.dtype);
}

static ac_gemm
scores_of(const ac_attention_job &j, const layout &l, char *scratch, int64_t first, int64_t count)
{
    ac_gemm g = product(j, count);
    int64_t head = l.queries * l.pitch;
    g.x[0] = image_of(token(j.q, first), j.q.dtype, j.q.t, j.q.c, j.q.n, j.d * j.q.c);
    g.channels[0] = j.d;
    g.weight = j.k.data;
    g.weight_dtype = j.k.dtype;
    g.w_row = j.k.t;
    g.w_c = j.k.c;
    g.w_batch[0] = j.k.n;
    g.w_batch[1] = j.d * j.k.c;
    g.out = image_of(scratch + l.scores, AC_F32, l.pitch, 1, j.heads * head, head);
    g.columns = j.tk;
    return g;
}

static ac_gemm
values_of(const ac_attention_job &j, const layout &l, char *scratch, bool wide, int64_t first,
          int64_t count)
{
    ac_gemm g = product(j, count);
    int64_t head = l.queries * l.pitch, values = j.d * l.pitch;
    g.x[0] = image_of(scratch + l.exponents, wide ? j.q.dtype : AC_F32, l.pitch, 1,
                      j.heads * head, head);
    g.channels[0] = wide ? l.pitch : j.tk;
    g.weight = wide ? scratch + l.values : j.v.data;
    g.weight_dtype = j.v.dtype;
    g.w_row = wide ? l.pitch : j.v.c;
    g.w_c = wide ? 1 : j.v.t;
    g.w_batch[0] = wide ? j.heads * values : j.v.n;
    g.w_batch[1] = wide ? values : j.d * j.v.c;
    g.out = image_of(token(j.out, first), j.out.dtype, j.out.t, j.out.c, j.out.n, j.d * j.out.c);
    g.columns = j.d;
    g.row_scale = (const float *)(scratch + l.scale);
    return g;
}

/* v as [image][head][d][pitch], zeros past the last key: exponents there are 0, but 0 times what
 * lay in scratch may be NaN. */
static ac_status
transpose_values(ac_lane *lane, const ac_attention_job &j, const layout &l, char *scratch)
{
    int64_t head = j.d * l.pitch;
    ac_tensor to = {scratch + l.values, j.v.dtype, {4, {j.images, j.heads, j.d, j.tk}},
                    {j.heads * head, head, l.pitch, 1}};
    ac_tensor from = {(void *)j.v.data, j.v.dtype, to.shape, {j.v.n, j.d * j.v.c, j.v.c, j.v.t}};
    if (l.pitch != j.tk) {
        ac_tensor rest = to;
        rest.data = scratch + l.values + j.tk * (int64_t)ac_dtype_size(j.v.dtype);
        rest.shape.dim[3] = l.pitch - j.tk;
        AC_TRY(ac_cuda_fill_tensor(lane, &rest, 0.0f));
    }
    return ac_cuda_copy(lane, &to, &from);
}

static ac_status
run(ac_lane *lane, const ac_attention_job &j, bool wide, char *scratch)
{
    layout l = layout_of(j, wide);
    if (wide) {
        AC_TRY(transpose_values(lane, j, l, scratch));
    }
    for (int64_t first = 0; first < j.tq; first += l.queries) {
        int64_t count = AC_MIN(l.queries, j.tq - first);
        layout part = l;
        part.queries = count; /* the last part may be smaller: its rows lie closer */
        ac_gemm g = scores_of(j, part, scratch, first, count);
        AC_TRY(wide ? ac_cuda_gemm_mma(lane, &g) : ac_cuda_gemm_plain(lane, &g));
        rows r = {(const float *)(scratch + l.scores),
                  {scratch + l.exponents, wide ? j.q.dtype : AC_F32},
                  (float *)(scratch + l.scale),
                  count, first, j.tk, l.pitch, j.mask, j.mask_dtype, j.mask_n, j.mask_t,
                  j.heads, j.scale, j.causal};
        dim3 grid((unsigned)count, (unsigned)l.products);
        AC_TRY(ac_cuda_launch(lane, "attention softmax", softmax_kernel, grid, AC_THREADS, 0, r));
        g = values_of(j, part, scratch, wide, first, count);
        AC_TRY(wide ? ac_cuda_gemm_mma(lane, &g) : ac_cuda_gemm_plain(lane, &g));
    }
    return AC_OK;
}

/* ---- the kernels ----------------------------------------------------------------------------- */

static ac_attention_operand
operand_of(const ac_tensor *t)
{
    return {t->data, t->dtype, t->stride[0], t->stride[1], t->stride[2]};
}

bool
ac_attention_job_of(const ac_problem *p, ac_attention_job *j)
{
    const ac_tensor *mask = ac_operand(p, AC_ATTN_MASK);
    *j = {};
    j->q = operand_of(&p->input[AC_ATTN_Q]);
    j->k = operand_of(&p->input[AC_ATTN_K]);
    j->v = operand_of(&p->input[AC_ATTN_V]);
    j->out = operand_of(&p->output);
    if (mask) {
        j->mask = mask->data;
        j->mask_dtype = mask->dtype;
        j->mask_n = mask->stride[0];
        j->mask_t = mask->stride[1];
    }
    j->images = p->output.shape.dim[0];
    j->tq = p->output.shape.dim[1];
    j->tk = p->input[AC_ATTN_K].shape.dim[1];
    j->heads = p->attr.attention.heads;
    j->d = (int32_t)(p->output.shape.dim[2] / j->heads);
    j->scale = p->attr.attention.scale;
    j->causal = p->attr.attention.causal;
    return ac_cuda_float(j->q.dtype) && ac_cuda_float(j->k.dtype) && ac_cuda_float(j->v.dtype) &&
           ac_cuda_float(j->out.dtype) && ac_cuda_float(j->mask_dtype) &&
           j->images * j->heads <= 65535;
}

bool
ac_attention_in_vectors(const ac_attention_job *j)
{
    const ac_attention_operand *const all[] = {&j->q, &j->k, &j->v, &j->out};
    int64_t unit = 16 / (int64_t)ac_dtype_size(j->q.dtype);
    bool whole = j->d % unit == 0;
    for (const ac_attention_operand *o : all) {
        whole = whole && o->dtype == j->q.dtype && o->c == 1 && (o->t | o->n) % unit == 0;
    }
    return whole;
}

static bool
supports_flash(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    return ac_attention_job_of(p, &j) && ac_attention_flash_fits(&j, caps->isa);
}

static bool
wide_fits(const ac_attention_job &j, int32_t arch)
{
    layout l = layout_of(j, true);
    ac_gemm scores = scores_of(j, l, NULL, 0, l.queries);
    ac_gemm values = values_of(j, l, NULL, true, 0, l.queries);
    return ac_gemm_mma_fits(&scores, arch) && ac_gemm_mma_fits(&values, arch) &&
           j.v.dtype == j.q.dtype;
}

static bool
supports_wide(const ac_problem *p, const ac_caps *caps)
{
    ac_attention_job j;
    return ac_attention_job_of(p, &j) && wide_fits(j, caps->isa);
}

static bool
supports_plain(const ac_problem *p, const ac_caps *)
{
    ac_attention_job j;
    return ac_attention_job_of(p, &j);
}

size_t
ac_attention_wide_scratch(const ac_attention_job *j)
{
    return AC_MAX(layout_of(*j, true).total, layout_of(*j, false).total);
}

ac_status
ac_cuda_attention_wide_run(ac_lane *lane, const ac_attention_job *j, void *scratch)
{
    bool wide = ac_attention_flash_aligned(j) && wide_fits(*j, j->q.dtype == AC_BF16 ? 80 : 75);
    return run(lane, *j, wide, (char *)scratch);
}

static size_t
scratch_wide(const ac_problem *p, const ac_caps *)
{
    ac_attention_job j;
    ac_attention_job_of(p, &j);
    return ac_attention_wide_scratch(&j);
}

static size_t
scratch_plain(const ac_problem *p, const ac_caps *)
{
    ac_attention_job j;
    ac_attention_job_of(p, &j);
    return layout_of(j, false).total;
}

static ac_status
launch_flash(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    ac_attention_job j;
    ac_attention_job_of(p, &j);
    if (!ac_attention_flash_aligned(&j)) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "attention: found an operand that does not begin at "
                                              "a multiple of 16 bytes");
    }
    return ac_cuda_flash(lane, &j);
}

static ac_status
launch_wide(ac_lane *lane, const ac_problem *p, void *scratch, const void *)
{
    ac_attention_job j;
    ac_attention_job_of(p, &j);
    return ac_cuda_attention_wide_run(lane, &j, scratch);
}

static ac_status
launch_plain(ac_lane *lane, const ac_problem *p, void *scratch, const void *)
{
    ac_attention_job j;
    ac_attention_job_of(p, &j);
    return run(lane, j, false, (char *)scratch);
}

extern "C" const ac_kernel ac_cuda_attention_flash = {
    .name = "cuda.attention.flash",
    .op = AC_OP_ATTENTION,
    .supports = supports_flash,
    .launch = launch_flash,
};

extern "C" const ac_kernel ac_cuda_attention_wide = {
    .name = "cuda.attention.wide",
    .op = AC_OP_ATTENTION,
    .supports = supports_wide,
    .scratch = scratch_wide,
    .launch = launch_wide,
};

extern "C" const ac_kernel ac_cuda_attention_plain = {
    .name = "cuda.attention.plain",
    .op = AC_OP_ATTENTION,
    .supports = supports_plain,
    .scratch = scratch_plain,
    .launch = launch_plain,
};
