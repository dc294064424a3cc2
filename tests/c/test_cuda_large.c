/* test_cuda_large: tensors of more than 2^31 elements.  Every CUDA kernel that takes such a problem
 * runs it once, and the first items, those around element 2^31 and the last are compared with what
 * the same kernel makes of these items alone.  An index of 32 bits would read or write elsewhere,
 * and what lies there is different.  Items are images or rows of one image; there a convolution's
 * first and last ones, which look beyond the window, are left out.  The means of a group norm are
 * of a whole image, so one image of that size has no part to compare with.  Where there is no GPU
 * it says so and passes; needs 25 GB. */
#include "../../csrc/backend_cuda.h"
#include "../../csrc/kernel.h"
#include "test.h"

enum { MAX_INPUTS = 5, WINDOWS = 3 };
static const int64_t boundary = INT64_C(1) << 31;
static const ac_shape absent = {.rank = -1};

/* Items are what dimension `axis` counts, in the output and in the inputs of `batched`. */
typedef struct large_case {
    ac_op op;
    ac_attr attr;
    int32_t n_inputs;
    ac_shape shape[MAX_INPUTS];
    ac_shape wanted;  /* UPSAMPLE */
    uint32_t batched; /* bit i: input i has an item each */
    int64_t window;   /* items that are compared */
    int axis;         /* 0, or 1 where dimension 0 is 1 */
    int64_t ratio;    /* output items of one of an input; 0 is 1 */
    int64_t halo;     /* of a window's items so many at either end depend on others */
    bool f32;
} large_case;

/* One problem on the GPU, and what belongs to it. */
typedef struct rig {
    ac_device *device;
    ac_lane *lane;
    ac_problem p;
    ac_tensor input[MAX_INPUTS];
    ac_dtype dtype;
    char *block; /* BLOCK random elements */
} rig;

enum { BLOCK = (1 << 22) + 8 * 12345 };

static double
value_at(const void *data, ac_dtype dtype, int64_t i)
{
    return dtype == AC_F32 ? ((const float *)data)[i]
                           : ac_f16_to_f32(((const uint16_t *)data)[i]);
}

static void *
place(rig *r, size_t bytes)
{
    void *memory = NULL;
    CHECK_OK(r->device->backend->alloc(r->device->self, bytes, &memory));
    return memory;
}

/* The block from element 1001 `slot` on, again and again: its length is no multiple of an item's,
 * nor a power of two, so items differ. */
static void
fill(rig *r, const ac_tensor *t, int32_t slot)
{
    const ac_backend *b = r->device->backend;
    size_t bytes = ac_tensor_bytes(t), skipped = 1001 * ac_dtype_size(r->dtype) * (size_t)slot;
    size_t whole = AC_MIN(BLOCK * ac_dtype_size(r->dtype) - skipped, bytes);
    CHECK_OK(b->upload(r->device->self, r->lane, t->data, r->block + skipped, whole));
    for (size_t at = whole; at < bytes; at += whole) {
        CHECK_OK(b->copy(r->device->self, r->lane, (char *)t->data + at, t->data,
                         AC_MIN(bytes - at, whole)));
    }
    CHECK_OK(b->sync(r->device->self, r->lane));
}

static bool
rig_open(rig *r, ac_dtype dtype)
{
    uint64_t state = 11;
    *r = (rig){.dtype = dtype};
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &r->device) < 0) {
        printf("(no GPU) ");
        return false;
    }
    printf("(ran on cuda) ");
    CHECK_OK(r->device->backend->lane_open(r->device->self, &r->lane));
    r->block = ac_malloc(ac_dtype_size(dtype) * BLOCK);
    CHECK(r->block);
    for (int i = 0; i < BLOCK; i++) {
        ac_element_set(r->block, dtype, i, test_uniform(&state, -1.0, 1.0));
    }
    return true;
}

static void
rig_close(rig *r)
{
    r->device->backend->lane_close(r->device->self, r->lane);
    ac_device_unref(r->device);
    ac_free(r->block);
}

static void
set_problem(rig *r, const large_case *c)
{
    ac_shape out = c->wanted;
    CHECK_OK(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs, &out));
    r->p = (ac_problem){.op = c->op, .attr = c->attr, .n_inputs = c->n_inputs, .input = r->input};
    for (int32_t i = 0; i < c->n_inputs; i++) {
        r->input[i] = (ac_tensor){.dtype = r->dtype, .shape = c->shape[i]};
        if (c->shape[i].rank >= 0) {
            r->input[i] = ac_tensor_of(NULL, r->dtype, c->shape[i]);
            r->input[i].data = place(r, ac_tensor_bytes(&r->input[i]));
            fill(r, &r->input[i], i);
        }
    }
    r->p.output = ac_tensor_of(NULL, r->dtype, out);
    r->p.output.data = place(r, ac_tensor_bytes(&r->p.output));
}

static void
free_problem(rig *r)
{
    const ac_backend *b = r->device->backend;
    for (int32_t i = 0; i < r->p.n_inputs; i++) {
        b->free(r->device->self, r->input[i].data);
    }
    b->free(r->device->self, r->p.output.data);
}

/* Scratch and weights of the kernel's own form come and go with the launch. */
static void
launch(rig *r, const ac_kernel *kernel, const ac_problem *p)
{
    const ac_backend *b = r->device->backend;
    const ac_caps *caps = &r->device->caps;
    void *scratch = kernel->scratch ? place(r, kernel->scratch(p, caps)) : NULL;
    size_t bytes = kernel->prepared_bytes ? kernel->prepared_bytes(p, caps) : 0;
    void *prepared = bytes ? place(r, bytes) : NULL;
    if (prepared) {
        CHECK_OK(kernel->prepare(r->lane, p, prepared));
    }
    CHECK_OK(kernel->launch(r->lane, p, scratch, prepared));
    CHECK_OK(b->sync(r->device->self, r->lane));
    b->free(r->device->self, scratch);
    b->free(r->device->self, prepared);
}

static void
cut(ac_tensor *t, int axis, int64_t first, int64_t items)
{
    t->data = (char *)t->data + first * t->stride[axis] * (int64_t)ac_dtype_size(t->dtype);
    t->shape.dim[axis] = items;
    t->stride[0] = axis ? items * t->stride[1] : t->stride[0];
}

static void
download(rig *r, const ac_tensor *t, void *to)
{
    CHECK_OK(r->device->backend->download(r->device->self, r->lane, to, t->data,
                                          ac_tensor_bytes(t)));
    CHECK_OK(r->device->backend->sync(r->device->self, r->lane));
}

/* Largest difference over largest value; libraries may choose another algorithm for few items.  Of
 * halves that are the same most need no further look. */
static double
distance(const void *a, const void *b, ac_dtype dtype, int64_t first, int64_t end)
{
    double worst = 0.0, size = 0.0;
    for (int64_t i = first; i < end; i++) {
        if (dtype == AC_F16 && i % 16 && ((const uint16_t *)a)[i] == ((const uint16_t *)b)[i]) {
            continue;
        }
        double x = value_at(a, dtype, i), y = value_at(b, dtype, i);
        CHECK(isfinite(x) && isfinite(y));
        worst = fmax(worst, fabs(x - y));
        size = fmax(size, fabs(y));
    }
    CHECK(size > 1e-3);
    return worst / size;
}

/* The window's items of the large result against those of a problem that has no others. */
static void
compare(rig *r, const ac_kernel *kernel, const large_case *c, int64_t first)
{
    ac_tensor input[MAX_INPUTS], out = r->p.output;
    ac_problem few = r->p;
    int64_t ratio = AC_MAX(c->ratio, 1);
    memcpy(input, r->input, sizeof input);
    few.input = input;
    for (int32_t i = 0; i < c->n_inputs; i++) {
        if (c->batched >> i & 1) {
            cut(&input[i], c->axis, first / ratio, c->window / ratio);
        }
    }
    cut(&out, c->axis, first, c->window);
    few.output = ac_tensor_of(NULL, r->dtype, out.shape);
    if (!kernel->supports(&few, &r->device->caps)) {
        TEST_FAIL("%s: takes the large problem but not a part of it", kernel->name);
    }
    int64_t count = ac_tensor_count(&out), halo = c->halo * out.stride[c->axis];
    size_t bytes = ac_tensor_bytes(&few.output);
    few.output.data = place(r, bytes);
    void *found = ac_malloc(bytes), *expected = ac_malloc(bytes);
    CHECK(found && expected);
    launch(r, kernel, &few);
    download(r, &out, found);
    download(r, &few.output, expected);
    double d = distance(found, expected, r->dtype, halo, count - halo);
    if (!(d < 5e-3)) {
        TEST_FAIL("%s: items from %" PRId64 " are off by %g", kernel->name, first, d);
    }
    r->device->backend->free(r->device->self, few.output.data);
    ac_free(found);
    ac_free(expected);
}

/* The output item at element 2^31 of the largest operand. */
static int64_t
item_of_boundary(const rig *r, const large_case *c)
{
    const ac_tensor *most = &r->p.output;
    for (int32_t i = 0; i < c->n_inputs; i++) {
        const ac_tensor *t = &r->input[i];
        bool larger = c->batched >> i & 1 && ac_tensor_count(t) > ac_tensor_count(most);
        most = larger ? t : most;
    }
    CHECK(ac_tensor_count(most) > boundary);
    return boundary / most->stride[c->axis] * (most == &r->p.output ? 1 : AC_MAX(c->ratio, 1));
}

static void
check(const large_case *c)
{
    rig r;
    int kernels = 0;
    setenv("ACCEL_TUNE", "off", 1);
    if (!rig_open(&r, c->f32 ? AC_F32 : AC_F16)) {
        return;
    }
    set_problem(&r, c);
    int64_t items = r.p.output.shape.dim[c->axis], ratio = AC_MAX(c->ratio, 1);
    int64_t around = AC_MIN(item_of_boundary(&r, c) - c->window / 2, items - c->window);
    int64_t first[WINDOWS] = {0, around / ratio * ratio, items - c->window};
    for (const ac_kernel *const *k = r.device->backend->kernels; *k; k++) {
        if ((*k)->op != c->op || !(*k)->supports(&r.p, &r.device->caps)) {
            continue;
        }
        launch(&r, *k, &r.p);
        for (int w = 0; w < WINDOWS; w++) {
            compare(&r, *k, c, first[w]);
        }
        kernels++;
    }
    printf("%d kernels ", kernels);
    CHECK(kernels > 0);
    free_problem(&r);
    rig_close(&r);
    unsetenv("ACCEL_TUNE");
}

/* ---- cases ----------------------------------------------------------------------------------- */

static void
linear(void)
{
    const int64_t m = (INT64_C(1) << 25) + 1000;
    check(&(large_case){.op = AC_OP_LINEAR, .n_inputs = 4, .batched = 1 | 8, .window = 300,
                        .shape = {AC_SHAPE(m, 64), AC_SHAPE(64, 64), AC_SHAPE(64),
                                  AC_SHAPE(m, 64)}});
    check(&(large_case){.op = AC_OP_LINEAR, .n_inputs = 3, .batched = 1, .window = 300,
                        .attr.linear = {AC_ACT_GELU, true},
                        .shape = {AC_SHAPE(m, 32), AC_SHAPE(128, 32), AC_SHAPE(128)}});
    check(&(large_case){.op = AC_OP_LINEAR, .n_inputs = 5, .batched = 1 | 16, .window = 300,
                        .shape = {AC_SHAPE(m, 32), AC_SHAPE(64, 64), AC_SHAPE(64), absent,
                                  AC_SHAPE(m, 32)}});
    /* A shortcut of the VAE over 17 pictures: parts of more than 2^31 bytes. */
    check(&(large_case){.op = AC_OP_LINEAR, .n_inputs = 3, .batched = 1, .window = 300,
                        .shape = {AC_SHAPE(17 << 20, 256), AC_SHAPE(128, 256), AC_SHAPE(128)}});
}

static void
convolution(void)
{
    check(&(large_case){.op = AC_OP_CONV2D, .n_inputs = 3, .batched = 1, .window = 2,
                        .attr.conv2d = {1, 1, 1, 1, 1, AC_ACT_NONE},
                        .shape = {AC_SHAPE(259, 512, 512, 32), AC_SHAPE(32, 32, 3, 3),
                                  AC_SHAPE(32)}});
    check(&(large_case){.op = AC_OP_CONV2D, .n_inputs = 4, .batched = 1 | 8, .window = 2,
                        .attr.conv2d = {1, 1, 1, 1, 1, AC_ACT_NONE},
                        .shape = {AC_SHAPE(131, 512, 512, 64), AC_SHAPE(64, 64, 3, 3),
                                  AC_SHAPE(64), AC_SHAPE(131, 512, 512, 64)}});
    check(&(large_case){.op = AC_OP_CONV2D, .n_inputs = 5, .batched = 1 | 16, .window = 2,
                        .attr.conv2d = {1, 1, 1, 1, 1, AC_ACT_NONE},
                        .shape = {AC_SHAPE(259, 512, 512, 32), AC_SHAPE(16, 40, 3, 3),
                                  AC_SHAPE(16), absent, AC_SHAPE(259, 512, 512, 8)}});
}

/* f32's rows are gathered. */
static void
convolution_by_twos(void)
{
    for (int f32 = 0; f32 < 2; f32++) {
        check(&(large_case){.op = AC_OP_CONV2D, .n_inputs = 3, .batched = 1, .window = 2,
                            .attr.conv2d = {2, 0, 0, 1, 1, AC_ACT_NONE}, .f32 = f32,
                            .shape = {AC_SHAPE(131, 512, 512, 64), AC_SHAPE(32, 64, 3, 3),
                                      AC_SHAPE(32)}});
    }
}

/* The last ones of a decoder for 4096 x 4096 pixels. */
static void
convolution_of_one_image(void)
{
    check(&(large_case){.op = AC_OP_CONV2D, .n_inputs = 3, .batched = 1, .window = 24, .axis = 1,
                        .halo = 1, .attr.conv2d = {1, 1, 1, 1, 1, AC_ACT_NONE},
                        .shape = {AC_SHAPE(1, 4104, 4096, 128), AC_SHAPE(3, 128, 3, 3),
                                  AC_SHAPE(3)}});
    check(&(large_case){.op = AC_OP_UP_CONV2D, .n_inputs = 3, .batched = 1, .window = 24,
                        .axis = 1, .ratio = 2, .halo = 2,
                        .shape = {AC_SHAPE(1, 2052, 2048, 128), AC_SHAPE(4, 128, 128, 2, 2),
                                  AC_SHAPE(128)}});
}

static void
upsampling_convolution(void)
{
    check(&(large_case){.op = AC_OP_UP_CONV2D, .n_inputs = 3, .batched = 1, .window = 2,
                        .shape = {AC_SHAPE(259, 256, 256, 32), AC_SHAPE(4, 32, 32, 2, 2),
                                  AC_SHAPE(32)}});
}

static void
group_norm(void)
{
    check(&(large_case){.op = AC_OP_GROUP_NORM, .n_inputs = 5, .batched = 1 | 16, .window = 2,
                        .attr.group_norm = {.groups = 32, .eps = 1e-5f, .act = AC_ACT_SILU},
                        .shape = {AC_SHAPE(67, 512, 512, 128), AC_SHAPE(128), AC_SHAPE(128),
                                  absent, AC_SHAPE(67, 128)}});
    check(&(large_case){.op = AC_OP_GROUP_NORM, .n_inputs = 4, .batched = 1 | 8, .window = 2,
                        .attr.group_norm = {.groups = 32, .eps = 1e-5f, .act = AC_ACT_SILU},
                        .shape = {AC_SHAPE(67, 512, 512, 64), AC_SHAPE(128), AC_SHAPE(128),
                                  AC_SHAPE(67, 512, 512, 64)}});
}

static void
layer_norm(void)
{
    check(&(large_case){.op = AC_OP_LAYER_NORM, .n_inputs = 3, .batched = 1, .window = 300,
                        .attr.layer_norm.eps = 1e-5f,
                        .shape = {AC_SHAPE(3400000, 640), AC_SHAPE(640), AC_SHAPE(640)}});
}

static void
attention(void)
{
    ac_shape q = AC_SHAPE(8200, 4096, 64), k = AC_SHAPE(8200, 77, 64);
    check(&(large_case){.op = AC_OP_ATTENTION, .n_inputs = 4, .batched = 1 | 2 | 4, .window = 2,
                        .attr.attention = {.heads = 1, .scale = 0.125f},
                        .shape = {q, k, k, absent}});
}

static void
elementwise(void)
{
    ac_shape x = AC_SHAPE(131, 512, 512, 64), wide = AC_SHAPE(131, 512, 512, 128);
    check(&(large_case){.op = AC_OP_ACTIVATION, .n_inputs = 1, .batched = 1, .window = 2,
                        .attr.activation.act = AC_ACT_SILU, .shape = {x}});
    check(&(large_case){.op = AC_OP_GATE, .n_inputs = 1, .batched = 1, .window = 2,
                        .attr.activation.act = AC_ACT_GELU, .shape = {wide}});
    check(&(large_case){.op = AC_OP_SCALE, .n_inputs = 1, .batched = 1, .window = 2,
                        .attr.scale = {0.5f, 0.25f}, .shape = {x}});
    check(&(large_case){.op = AC_OP_ADD, .n_inputs = 2, .batched = 3, .window = 2,
                        .shape = {x, x}});
    check(&(large_case){.op = AC_OP_UPSAMPLE, .n_inputs = 1, .batched = 1, .window = 2,
                        .wanted = x, .shape = {AC_SHAPE(131, 256, 256, 64)}});
    check(&(large_case){.op = AC_OP_CONCAT, .n_inputs = 2, .batched = 3, .window = 2,
                        .attr.axis.axis = 3, .shape = {x, x}});
}

static void
layouts(void)
{
    check(&(large_case){.op = AC_OP_TO_NHWC, .n_inputs = 1, .batched = 1, .window = 2,
                        .shape = {AC_SHAPE(131, 64, 512, 512)}});
    check(&(large_case){.op = AC_OP_TO_NCHW, .n_inputs = 1, .batched = 1, .window = 2,
                        .shape = {AC_SHAPE(131, 512, 512, 64)}});
}

TEST_MAIN(TEST(linear), TEST(convolution), TEST(convolution_by_twos),
          TEST(convolution_of_one_image), TEST(upsampling_convolution), TEST(group_norm),
          TEST(layer_norm), TEST(attention), TEST(elementwise), TEST(layouts))
