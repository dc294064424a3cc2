/* cudnn_conv: convolutions through cuDNN: NHWC, weights [c_out, kh, kw, c_in].
 *
 *     conv -> + residual -> + bias
 *
 * The order decides the kernel: this one reaches the precompiled ones for Hopper (engine 41), while
 * bias before residual, or an activation after them, means one that is compiled at run time and 20
 * to 40 % slower.  So activations are left to gemm_mma.cu, and tensors with gaps, which would cost
 * a copy; tune.c compares with it where both can.  Beyond 2^31 elements the images go in several
 * parts.
 *
 * up_conv2d: the four phases as one 2x2 convolution with four times the channels, padded by one all
 * around; each phase reads its own of the (h + 1) x (w + 1) results, which a kernel interleaves. */
#include "dnn.h"
#include "gemm.h"
#include "interleave.h"
#include "list.h"

#include <string.h>

#define WORKSPACE ((size_t)16 << 20)

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

static bool
mma_fits(const ac_gemm *g)
{
    return ac_gemm_mma_fits(g, g->x[0].dtype == AC_BF16 ? 80 : 75) && ac_gemm_mma_aligned(g);
}

static ac_status
run_own(ac_lane *lane, const void *context)
{
    return mma_fits(context) ? ac_cuda_gemm_mma(lane, context)
                             : ac_cuda_gemm_plain(lane, context);
}

static void
key_of(const ac_problem *p, ac_dnn_key *key)
{
    const ac_tensor *x = &p->input[AC_CONV_X], *w = &p->input[AC_CONV_W], *y = &p->output;
    const ac_conv2d_attr *a = &p->attr.conv2d;
    memset(key, 0, sizeof *key);
    key->kind = AC_DNN_CONV;
    key->dtype = y->dtype;
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

static const void *
image_at(const void *base, int64_t elements, int32_t dtype)
{
    return base ? (const char *)base + (size_t)elements * ac_dtype_size((ac_dtype)dtype) : NULL;
}

static ac_status
run_part(ac_lane *lane, const ac_dnn_key *key, const ac_gemm *all, int64_t first, int64_t count,
         void *scratch)
{
    ac_gemm g = *all;
    const int64_t *v = key->value;
    int64_t y = first * v[OUT_HEIGHT] * v[OUT_WIDTH] * v[C_OUT];
    g.x[0].data = image_at(g.x[0].data, first * v[HEIGHT] * v[WIDTH] * v[C_IN], key->dtype);
    g.out.data = image_at(g.out.data, y, key->dtype);
    g.residual.data = image_at(g.residual.data, y, key->dtype);
    g.rows = count * v[OUT_HEIGHT] * v[OUT_WIDTH];
    ac_dnn_call call = {.lane = lane, .key = *key, .describe = describe, .workspace = scratch,
                        .workspace_bytes = WORKSPACE, .own = run_own, .context = &g,
                        .own_is_slow = !mma_fits(&g),
                        .id = {X, W, Y}, .n_operands = 3,
                        .address = {g.x[0].data, g.weight, g.out.data}};
    call.key.value[IMAGES] = count;
    if (v[HAS_BIAS]) {
        call.id[call.n_operands] = B;
        call.address[call.n_operands++] = g.bias;
    }
    if (v[HAS_RESIDUAL]) {
        call.id[call.n_operands] = RESIDUAL;
        call.address[call.n_operands++] = g.residual.data;
    }
    return ac_dnn_run(&call);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

static bool
whole(const ac_tensor *t, ac_dtype dtype)
{
    return !t || (t->dtype == dtype && ac_tensor_is_contiguous(t));
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_dnn_key key;
    ac_dtype dtype = p->output.dtype;
    if (ac_operand(p, AC_CONV_X2) || p->attr.conv2d.act != AC_ACT_NONE || !ac_gemm_of(p, &g) ||
        caps->isa < (dtype == AC_BF16 ? 80 : 75)) {
        return false;
    }
    if (!whole(&p->input[AC_CONV_X], dtype) || !whole(&p->output, dtype) ||
        !whole(ac_operand(p, AC_CONV_RESIDUAL), dtype) || !whole(ac_operand(p, AC_CONV_B), dtype) ||
        !whole(&p->input[AC_CONV_W], dtype) || ac_tensor_count(&p->output) < 1) {
        return false;
    }
    key_of(p, &key);
    return images_at_once(key.value) > 0 && ac_dnn_found(0);
}

static size_t
scratch_bytes(const ac_problem *p, const ac_caps *caps)
{
    (void)p;
    (void)caps;
    return WORKSPACE;
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
    if (!prepared && ac_conv_prepared_bytes(p, NULL) > 0) { /* not a weight */
        ac_gemm_of(p, &g);
        return ac_cuda_gemm_plain(lane, &g);
    }
    ac_conv_gemm(p, prepared, &g);
    if (!aligned(&g)) {
        return run_own(lane, &g);
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

static bool
supports_phases(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    ac_dnn_key key;
    ac_dtype dtype = p->output.dtype;
    if (ac_operand(p, AC_CONV_RESIDUAL) || p->attr.up_conv2d.act != AC_ACT_NONE ||
        !ac_conv_gemm(p, NULL, &g) || !ac_gemm_mma_fits(&g, caps->isa) ||
        ac_tensor_count(&p->output) < 1) {
        return false; /* f16 and bf16, channels in eights; what fails here goes to gemm_mma.cu */
    }
    if (!whole(&p->input[AC_CONV_X], dtype) || !whole(&p->output, dtype) ||
        !whole(ac_operand(p, AC_CONV_B), dtype) || !whole(&p->input[AC_CONV_W], dtype) ||
        p->output.shape.dim[3] % 8 != 0) {
        return false;
    }
    phases_key(p, &key);
    return images_at_once(key.value) > 0 && ac_dnn_found(0);
}

static size_t
phases_scratch(const ac_problem *p, const ac_caps *caps)
{
    ac_dnn_key key;
    (void)caps;
    phases_key(p, &key);
    return WORKSPACE + phase_bytes(&key, phase_images(&key)) +
           ac_align_up((size_t)key.value[C_OUT] * ac_dtype_size((ac_dtype)key.dtype), 256);
}

/* x, y: of the first of these images. */
static ac_status
run_phases(ac_lane *lane, const ac_dnn_key *key, const ac_gemm *g, int64_t first, int64_t count,
           char *scratch)
{
    const int64_t *v = key->value;
    char *all = scratch + WORKSPACE, *bias = all + phase_bytes(key, phase_images(key));
    int64_t channels = v[C_OUT] / 4;
    const void *x = image_at(g->x[0].data, first * v[HEIGHT] * v[WIDTH] * v[C_IN], key->dtype);
    ac_dnn_call call = {.lane = lane, .key = *key, .describe = describe, .workspace = scratch,
                        .workspace_bytes = WORKSPACE, .id = {X, W, Y, B},
                        .address = {x, g->weight, all, bias},
                        .n_operands = v[HAS_BIAS] ? 4 : 3};
    call.key.value[IMAGES] = count;
    AC_TRY(ac_dnn_run(&call));
    ac_interleave i = {.from = all, .dtype = (ac_dtype)key->dtype, .images = count,
                       .height = (int32_t)v[HEIGHT], .width = (int32_t)v[WIDTH],
                       .channels = channels,
                       .to = (void *)image_at(g->out.data, first * 4 * v[HEIGHT] * v[WIDTH] *
                                                               channels, key->dtype)};
    return ac_cuda_interleave(lane, &i);
}

static ac_status
launch_phases(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_dnn_key key;
    ac_gemm g;
    if (!prepared) { /* not a weight */
        ac_gemm_of(p, &g);
        return ac_cuda_gemm_plain(lane, &g);
    }
    ac_conv_gemm(p, prepared, &g);
    if (!aligned(&g)) {
        return run_own(lane, &g);
    }
    phases_key(p, &key);
    int64_t step = phase_images(&key), images = key.value[IMAGES];
    if (g.bias) { /* one for each phase */
        char *bias = (char *)scratch + WORKSPACE + phase_bytes(&key, step);
        AC_TRY(ac_cuda_repeat(lane, bias, g.bias, key.value[C_OUT] / 4, 4, (ac_dtype)key.dtype));
    }
    ac_status status = AC_OK;
    for (int64_t first = 0; first < images && status == AC_OK; first += step) {
        status = run_phases(lane, &key, &g, first, AC_MIN(step, images - first), scratch);
    }
    return status == AC_E_UNSUPPORTED ? run_own(lane, &g) : status;
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
