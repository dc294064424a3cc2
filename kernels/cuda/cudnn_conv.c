/* cudnn_conv: convolutions through cuDNN: NHWC, weights [c_out, kh, kw, c_in].
 *
 *     conv -> + residual -> + bias
 *
 * The order decides the kernel: this one reaches the precompiled ones for Hopper (engine 41), while
 * bias before residual, or an activation after them, means one that is compiled at run time and 20
 * to 40 % slower.  So activations are left to gemm_mma.cu, and tensors with gaps, which would cost
 * a copy; tune.c compares with it where both can, and with one product of gathered rows
 * (blas_conv.h) where the image is small.  f32 without TF32 is such a product: cuDNN's exact
 * engines do 10 TFLOP/s and copy the image through their workspace.  Beyond 2^31 elements the
 * images go in several parts.
 *
 * up_conv2d: the four phases as one 2x2 convolution with four times the channels, padded by one all
 * around; each phase reads its own of the (h + 1) x (w + 1) results, which a kernel interleaves. */
#include "blas_conv.h"
#include "dnn.h"
#include "gemm.h"
#include "interleave.h"
#include "list.h"

#include <string.h>

#define WORKSPACE ((size_t)16 << 20)
#define SMALL 1024 /* rows: of halves, fewer may be worth gathering */

enum { X = 1, W, B, RESIDUAL, Y, SUM, BIASED };

/* key.value */
enum {
    IMAGES, HEIGHT, WIDTH, C_IN, OUT_HEIGHT, OUT_WIDTH, C_OUT, KERNEL_H, KERNEL_W, STRIDE,
    TOP, LEFT, BOTTOM, RIGHT, HAS_BIAS, HAS_RESIDUAL
};

/* ---- description ----------------------------------------------------------------------------- */

/* [n, c, h, w] as cuDNN counts, c innermost in memory. */
static ac_dnn_tensor
image(int64_t id, int32_t dtype, int64_t n, int64_t c, int64_t h, int64_t w)
{
    return (ac_dnn_tensor){.id = id, .dtype = (ac_dtype)dtype, .dim = {n, c, h, w},
                           .stride = {h * w * c, 1, w * c, c}};
}

static ac_dnn_descriptor
geometry(ac_dnn_graph *g, const ac_dnn_key *key)
{
    const int64_t *v = key->value;
    int64_t axes = 2, ones[2] = {1, 1}, strides[2] = {v[STRIDE], v[STRIDE]};
    int64_t before[2] = {v[TOP], v[LEFT]}, after[2] = {v[BOTTOM], v[RIGHT]};
    cudnnDataType_t precision = CUDNN_DATA_FLOAT;
    cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
    ac_dnn_descriptor d = ac_dnn_begin(g, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &precision);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, 1, &axes);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, ones);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, strides);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, before);
    ac_dnn_set(g, d, CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, after);
    ac_dnn_end(g, d, false);
    return d;
}

/* Sums stay f32 between the operations. */
static ac_dnn_descriptor
sum_tensor(ac_dnn_graph *g, const ac_dnn_tensor *y, int64_t id, bool last)
{
    ac_dnn_tensor t = *y;
    if (!last) {
        t.id = id;
        t.dtype = AC_F32;
        t.inner = true;
    }
    return ac_dnn_tensor_new(g, &t);
}

static void
describe(ac_dnn_graph *g, const ac_dnn_key *key)
{
    const int64_t *v = key->value;
    float one = 1.0f, zero = 0.0f;
    int32_t dtype = key->dtype;
    ac_dnn_tensor x = image(X, dtype, v[IMAGES], v[C_IN], v[HEIGHT], v[WIDTH]);
    ac_dnn_tensor w = image(W, dtype, v[C_OUT], v[C_IN], v[KERNEL_H], v[KERNEL_W]);
    ac_dnn_tensor y = image(Y, dtype, v[IMAGES], v[C_OUT], v[OUT_HEIGHT], v[OUT_WIDTH]);
    ac_dnn_tensor b = image(B, dtype, 1, v[C_OUT], 1, 1), residual = y;
    ac_dnn_descriptor how = geometry(g, key);
    ac_dnn_descriptor sum = sum_tensor(g, &y, SUM, !v[HAS_BIAS] && !v[HAS_RESIDUAL]);
    ac_dnn_descriptor op = ac_dnn_begin(g, CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, how);
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, ac_dnn_tensor_new(g, &x));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, ac_dnn_tensor_new(g, &w));
    ac_dnn_set_part(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, sum);
    ac_dnn_set(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1, &one);
    ac_dnn_set(g, op, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 1, &zero);
    ac_dnn_end(g, op, true);
    residual.id = RESIDUAL;
    if (v[HAS_RESIDUAL]) {
        ac_dnn_descriptor next = sum_tensor(g, &y, BIASED, !v[HAS_BIAS]);
        ac_dnn_add(g, sum, ac_dnn_tensor_new(g, &residual), next);
        sum = next;
    }
    if (v[HAS_BIAS]) {
        ac_dnn_add(g, sum, ac_dnn_tensor_new(g, &b), sum_tensor(g, &y, Y, true));
    }
}

/* ---- one call -------------------------------------------------------------------------------- */

/* The same for the library, for a product of gathered rows, for our implicit GEMM. */
typedef struct job {
    ac_dnn_key key;
    ac_blas_conv rows;
    ac_gemm gemm; /* of no use to phases, which have no way of their own with four times the
                   * channels */
    void *scratch;
} job;

static ac_status
run_own(ac_lane *lane, const void *context)
{
    return ac_cuda_gemm_own(lane, &((const job *)context)->gemm);
}

static ac_status
run_gathered(ac_lane *lane, const void *context)
{
    const job *j = context;
    return ac_blas_conv_run(lane, &j->rows, j->scratch);
}

static ac_blas_conv
rows_of(const ac_dnn_key *key)
{
    const int64_t *v = key->value;
    return (ac_blas_conv){.dtype = (ac_dtype)key->dtype, .tf32 = key->tf32, .images = v[IMAGES],
                          .height = v[HEIGHT], .width = v[WIDTH], .c_in = v[C_IN],
                          .out_height = v[OUT_HEIGHT], .out_width = v[OUT_WIDTH],
                          .c_out = v[C_OUT], .kernel_h = (int32_t)v[KERNEL_H],
                          .kernel_w = (int32_t)v[KERNEL_W], .stride = (int32_t)v[STRIDE],
                          .pad_top = (int32_t)v[TOP], .pad_left = (int32_t)v[LEFT]};
}

static bool
gathers(const ac_dnn_key *key)
{
    const int64_t *v = key->value;
    ac_blas_conv rows = rows_of(key);
    return ac_blas_conv_fits(&rows) &&
           (key->dtype == AC_F32 || v[IMAGES] * v[OUT_HEIGHT] * v[OUT_WIDTH] <= SMALL);
}

/* Of the library, or of gathering. */
static size_t
workspace_of(const ac_dnn_key *key)
{
    ac_blas_conv rows = rows_of(key);
    return gathers(key) ? AC_MAX(WORKSPACE, ac_blas_conv_scratch(&rows)) : WORKSPACE;
}

/* For all parts of `step` images: the last one may be smaller, and be gathered. */
static size_t
workspace_of_parts(const ac_dnn_key *key, int64_t step)
{
    ac_dnn_key part = *key;
    part.value[IMAGES] = step;
    size_t bytes = workspace_of(&part);
    part.value[IMAGES] = key->value[IMAGES] % step;
    return part.value[IMAGES] > 0 ? AC_MAX(bytes, workspace_of(&part)) : bytes;
}

/* Operands and ways; rows.x and so on are set, the key's images are those of this call. */
static ac_status
run_job(ac_lane *lane, job *j, bool has_gemm)
{
    const ac_dnn_key *key = &j->key;
    const ac_blas_conv *r = &j->rows;
    ac_dnn_call call = {.lane = lane, .key = *key, .describe = describe, .workspace = j->scratch,
                        .workspace_bytes = WORKSPACE, .context = j, .id = {X, W, Y},
                        .n_operands = 3, .address = {r->x, r->weight, r->out}};
    bool fast = has_gemm && ac_gemm_is_fast(&j->gemm), gathered = gathers(key);
    if (fast) {
        call.own[call.n_own++] = (ac_dnn_own){"own", run_own};
    }
    if (gathered) {
        call.own[call.n_own++] = (ac_dnn_own){"gather", run_gathered};
    }
    if (has_gemm && !fast) {
        call.own[call.n_own++] = (ac_dnn_own){"own", run_own};
        call.n_slow = 1;
    }
    call.without = (key->dtype == AC_F32 && !key->tf32) || !ac_dnn_found(0);
    if (r->bias) {
        call.id[call.n_operands] = B;
        call.address[call.n_operands++] = r->bias;
    }
    if (r->residual) {
        call.id[call.n_operands] = RESIDUAL;
        call.address[call.n_operands++] = r->residual;
    }
    return ac_dnn_run(&call);
}

static void
key_of(const ac_problem *p, ac_dnn_key *key)
{
    const ac_tensor *x = &p->input[AC_CONV_X], *w = &p->input[AC_CONV_W], *y = &p->output;
    const ac_conv2d_attr *a = &p->attr.conv2d;
    memset(key, 0, sizeof *key);
    key->kind = AC_DNN_CONV;
    key->dtype = y->dtype;
    key->tf32 = p->tf32;
    int64_t *v = key->value;
    v[IMAGES] = x->shape.dim[0];
    v[HEIGHT] = x->shape.dim[1];
    v[WIDTH] = x->shape.dim[2];
    v[C_IN] = x->shape.dim[3];
    v[OUT_HEIGHT] = y->shape.dim[1];
    v[OUT_WIDTH] = y->shape.dim[2];
    v[C_OUT] = y->shape.dim[3];
    v[KERNEL_H] = w->shape.dim[2];
    v[KERNEL_W] = w->shape.dim[3];
    v[STRIDE] = a->stride;
    v[TOP] = a->pad_top;
    v[LEFT] = a->pad_left;
    v[BOTTOM] = a->pad_bottom;
    v[RIGHT] = a->pad_right;
    v[HAS_BIAS] = ac_operand(p, AC_CONV_B) != NULL;
    v[HAS_RESIDUAL] = ac_operand(p, AC_CONV_RESIDUAL) != NULL;
}

/* So many images that no tensor has 2^31 elements; 0: one image has. */
static int64_t
images_at_once(const int64_t *v)
{
    int64_t one = AC_MAX(v[HEIGHT] * v[WIDTH] * v[C_IN], v[OUT_HEIGHT] * v[OUT_WIDTH] * v[C_OUT]);
    int64_t most = INT32_MAX / one;
    int64_t parts = most ? (v[IMAGES] + most - 1) / most : 1;
    return most ? (v[IMAGES] + parts - 1) / parts : 0;
}

static ac_status
run_part(ac_lane *lane, const ac_dnn_key *key, const ac_gemm *all, int64_t first, int64_t count,
         void *scratch)
{
    const int64_t *v = key->value;
    int64_t y = first * v[OUT_HEIGHT] * v[OUT_WIDTH] * v[C_OUT];
    job j = {.key = *key, .gemm = *all, .scratch = scratch};
    ac_gemm *g = &j.gemm;
    g->x[0].data = ac_cuda_at(g->x[0].data, first * v[HEIGHT] * v[WIDTH] * v[C_IN], key->dtype);
    g->out.data = ac_cuda_at(g->out.data, y, key->dtype);
    g->residual.data = ac_cuda_at(g->residual.data, y, key->dtype);
    g->rows = count * v[OUT_HEIGHT] * v[OUT_WIDTH];
    j.key.value[IMAGES] = count;
    j.rows = rows_of(&j.key);
    j.rows.x = g->x[0].data;
    j.rows.weight = g->weight;
    j.rows.bias = g->bias;
    j.rows.residual = g->residual.data;
    j.rows.out = (void *)g->out.data;
    return run_job(lane, &j, true);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

static bool
whole(const ac_tensor *t, ac_dtype dtype)
{
    return !t || (t->dtype == dtype && ac_tensor_is_contiguous(t));
}

/* Of the result's dtype and without gaps, and not of nothing. */
static bool
operands_are_whole(const ac_problem *p)
{
    ac_dtype dtype = p->output.dtype;
    return whole(&p->input[AC_CONV_X], dtype) && whole(&p->input[AC_CONV_W], dtype) &&
           whole(ac_operand(p, AC_CONV_B), dtype) &&
           whole(ac_operand(p, AC_CONV_RESIDUAL), dtype) && whole(&p->output, dtype) &&
           ac_tensor_count(&p->output) > 0;
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_dnn_key key;
    ac_dtype dtype = p->output.dtype;
    if (ac_operand(p, AC_CONV_X2) || p->attr.conv2d.act != AC_ACT_NONE || !ac_gemm_of(p, &g) ||
        caps->isa < (dtype == AC_BF16 ? 80 : 75) || !operands_are_whole(p)) {
        return false;
    }
    key_of(p, &key);
    return images_at_once(key.value) > 0 &&
           (ac_dnn_found(0) || (dtype == AC_F32 && gathers(&key)));
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    ac_dnn_key key;
    (void)caps;
    key_of(p, &key);
    return workspace_of_parts(&key, AC_MIN(images_at_once(key.value), key.value[IMAGES]));
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
    ac_dnn_key key;
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(p, prepared, &g)) {
        return ac_cuda_gemm_plain(lane, &g);
    }
    if (!aligned(&g)) {
        return ac_cuda_gemm_own(lane, &g);
    }
    key_of(p, &key);
    int64_t step = images_at_once(key.value), images = key.value[IMAGES];
    for (int64_t first = 0; first < images; first += step) {
        AC_TRY(run_part(lane, &key, &g, first, AC_MIN(step, images - first), scratch));
    }
    return AC_OK;
}

/* ---- phases ---------------------------------------------------------------------------------- */

#define PHASE_BYTES ((size_t)128 << 20) /* of all phases in scratch at once, or of one image */

static void
phases_key(const ac_problem *p, ac_dnn_key *key)
{
    const ac_tensor *x = &p->input[AC_CONV_X];
    memset(key, 0, sizeof *key);
    key->kind = AC_DNN_CONV;
    key->dtype = p->output.dtype;
    key->tf32 = p->tf32;
    int64_t *v = key->value;
    v[IMAGES] = x->shape.dim[0];
    v[HEIGHT] = x->shape.dim[1];
    v[WIDTH] = x->shape.dim[2];
    v[C_IN] = x->shape.dim[3];
    v[OUT_HEIGHT] = v[HEIGHT] + 1;
    v[OUT_WIDTH] = v[WIDTH] + 1;
    v[C_OUT] = 4 * p->output.shape.dim[3];
    v[KERNEL_H] = v[KERNEL_W] = 2;
    v[STRIDE] = v[TOP] = v[LEFT] = v[BOTTOM] = v[RIGHT] = 1;
    v[HAS_BIAS] = ac_operand(p, AC_CONV_B) != NULL;
}

static size_t
phase_bytes(const ac_dnn_key *key, int64_t images)
{
    const int64_t *v = key->value;
    return ac_align_up((size_t)(images * v[OUT_HEIGHT] * v[OUT_WIDTH] * v[C_OUT]) *
                           ac_dtype_size((ac_dtype)key->dtype), 256);
}

static int64_t
phase_images(const ac_dnn_key *key)
{
    int64_t most = (int64_t)(PHASE_BYTES / phase_bytes(key, 1));
    return AC_MIN(AC_MAX(most, 1), AC_MIN(images_at_once(key->value), key->value[IMAGES]));
}

/* Before the phases in scratch. */
static size_t
phases_workspace(const ac_dnn_key *key)
{
    return ac_align_up(workspace_of_parts(key, phase_images(key)), 256);
}

static bool
supports_phases(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_dnn_key key;
    ac_dtype dtype = p->output.dtype;
    if (ac_operand(p, AC_CONV_RESIDUAL) || p->attr.up_conv2d.act != AC_ACT_NONE ||
        !ac_conv_gemm(p, NULL, &g) || !operands_are_whole(p) || p->output.shape.dim[3] % 8 != 0) {
        return false; /* what fails here goes to gemm_mma.cu or gemm.cu */
    }
    phases_key(p, &key);
    bool fits = dtype == AC_F32 ? gathers(&key) : ac_gemm_mma_fits(&g, caps->isa);
    return fits && images_at_once(key.value) > 0 && (dtype == AC_F32 || ac_dnn_found(0));
}

static size_t
phases_scratch(const ac_problem *p, const ac_caps *caps)
{
    ac_dnn_key key;
    (void)caps;
    phases_key(p, &key);
    return phases_workspace(&key) + phase_bytes(&key, phase_images(&key)) +
           ac_align_up((size_t)key.value[C_OUT] * ac_dtype_size((ac_dtype)key.dtype), 256);
}

/* x, y: of the first of these images. */
static ac_status
run_phases(ac_lane *lane, const ac_dnn_key *key, const ac_gemm *g, int64_t first, int64_t count,
           char *scratch)
{
    const int64_t *v = key->value;
    char *all = scratch + phases_workspace(key), *bias = all + phase_bytes(key, phase_images(key));
    int64_t channels = v[C_OUT] / 4;
    job j = {.key = *key, .scratch = scratch};
    j.key.value[IMAGES] = count;
    j.rows = rows_of(&j.key);
    j.rows.x = ac_cuda_at(g->x[0].data, first * v[HEIGHT] * v[WIDTH] * v[C_IN], key->dtype);
    j.rows.weight = g->weight;
    j.rows.bias = v[HAS_BIAS] ? bias : NULL;
    j.rows.out = all;
    AC_TRY(run_job(lane, &j, false));
    ac_interleave i = {.from = all, .dtype = (ac_dtype)key->dtype, .images = count,
                       .height = (int32_t)v[HEIGHT], .width = (int32_t)v[WIDTH],
                       .channels = channels,
                       .to = (void *)ac_cuda_at(g->out.data, first * 4 * v[HEIGHT] * v[WIDTH] *
                                                               channels, key->dtype)};
    return ac_cuda_interleave(lane, &i);
}

static ac_status
launch_phases(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_dnn_key key;
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(p, prepared, &g)) {
        return ac_cuda_gemm_plain(lane, &g);
    }
    if (!aligned(&g)) {
        return ac_cuda_gemm_own(lane, &g);
    }
    phases_key(p, &key);
    int64_t step = phase_images(&key), images = key.value[IMAGES];
    if (g.bias) { /* one for each phase */
        char *bias = (char *)scratch + phases_workspace(&key) + phase_bytes(&key, step);
        AC_TRY(ac_cuda_repeat(lane, bias, g.bias, key.value[C_OUT] / 4, 4, (ac_dtype)key.dtype));
    }
    ac_status status = AC_OK;
    for (int64_t first = 0; first < images && status == AC_OK; first += step) {
        status = run_phases(lane, &key, &g, first, AC_MIN(step, images - first), scratch);
    }
    return status == AC_E_UNSUPPORTED ? ac_cuda_gemm_own(lane, &g) : status;
}

const ac_kernel ac_cuda_up_conv2d_cudnn = {
    .name = "cuda.up_conv2d.cudnn",
    .op = AC_OP_UP_CONV2D,
    .supports = supports_phases,
    .scratch = phases_scratch,
    .prepared_bytes = ac_conv_prepared_bytes,
    .prepare = ac_conv_prepare,
    .form = AC_FORM_OHWI,
    .launch = launch_phases,
};

const ac_kernel ac_cuda_conv2d_cudnn = {
    .name = "cuda.conv2d.cudnn",
    .op = AC_OP_CONV2D,
    .supports = supports,
    .scratch = scratch_bytes,
    .prepared_bytes = ac_conv_prepared_bytes,
    .prepare = ac_conv_prepare,
    .form = AC_FORM_OHWI,
    .launch = launch,
};
