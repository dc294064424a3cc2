/* test_cuda_large: tensors of more than 2^31 elements.  Every CUDA kernel that takes such a problem
 * runs it once, and the first items, those around element 2^31 and the last are compared with what
 * the same kernel makes of these items alone.  An index of 32 bits would read or write elsewhere,
 * and what lies there is different.  Where there is no GPU it says so and passes; needs 20 GB. */
#include "../../csrc/backend_cuda.h"
#include "../../csrc/kernel.h"
#include "test.h"

enum { MAX_INPUTS = 5, WINDOWS = 3 };
static const int64_t boundary = INT64_C(1) << 31;
static const ac_shape absent = {.rank = -1};

/* Items are what dimension 0 counts, in the output and in the inputs of `batched`. */
typedef struct large_case {
    ac_op op;
    ac_attr attr;
    int32_t n_inputs;
    ac_shape shape[MAX_INPUTS];
    uint32_t batched; /* bit i: input i has an item each */
    int64_t window;   /* items that are compared */
} large_case;

/* One problem on the GPU, and what belongs to it. */
typedef struct rig {
    ac_device *device;
    ac_lane *lane;
    ac_problem p;
    ac_tensor input[MAX_INPUTS];
    uint16_t *block; /* random halves */
} rig;

enum { BLOCK = (1 << 24) + 8 * 12345 };

static void *
place(rig *r, size_t bytes)
{
    void *memory = NULL;
    CHECK_OK(r->device->backend->alloc(r->device->self, bytes, &memory));
    return memory;
}

/* The block again and again: its length is no multiple of an item's, so items differ. */
static void
upload(rig *r, const ac_tensor *t, size_t phase)
{
    const ac_backend *b = r->device->backend;
    size_t bytes = ac_tensor_bytes(t), whole = 2 * (size_t)BLOCK;
    for (size_t at = 0; at < bytes; at += whole - phase) {
        size_t part = AC_MIN(bytes - at, whole - phase);
        CHECK_OK(b->upload(r->device->self, r->lane, (char *)t->data + at,
                           (const char *)r->block + phase, part));
    }
    CHECK_OK(b->sync(r->device->self, r->lane));
}

static bool
rig_open(rig *r)
{
    uint64_t state = 11;
    *r = (rig){.device = NULL};
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &r->device) < 0) {
        printf("(no GPU) ");
        return false;
    }
    printf("(ran on cuda) ");
    CHECK_OK(r->device->backend->lane_open(r->device->self, &r->lane));
    r->block = ac_malloc(2 * (size_t)BLOCK);
    CHECK(r->block);
    for (int i = 0; i < BLOCK; i++) {
        r->block[i] = ac_f32_to_f16((float)test_uniform(&state, -1.0, 1.0));
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
    ac_shape out = absent;
    CHECK_OK(ac_op_shape(c->op, &c->attr, c->shape, c->n_inputs, &out));
    r->p = (ac_problem){.op = c->op, .attr = c->attr, .n_inputs = c->n_inputs, .input = r->input};
    for (int32_t i = 0; i < c->n_inputs; i++) {
        r->input[i] = (ac_tensor){.dtype = AC_F16, .shape = c->shape[i]};
        if (c->shape[i].rank >= 0) {
            r->input[i] = ac_tensor_of(NULL, AC_F16, c->shape[i]);
            r->input[i].data = place(r, ac_tensor_bytes(&r->input[i]));
            upload(r, &r->input[i], 2 * 1001 * (size_t)i);
        }
    }
    r->p.output = ac_tensor_of(NULL, AC_F16, out);
    CHECK(ac_tensor_count(&r->p.output) > boundary);
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
cut(ac_tensor *t, int64_t first, int64_t items)
{
    t->data = (char *)t->data + 2 * first * t->stride[0];
    t->shape.dim[0] = items;
}

static void
download(rig *r, const ac_tensor *t, uint16_t *to)
{
    CHECK_OK(r->device->backend->download(r->device->self, r->lane, to, t->data,
                                          ac_tensor_bytes(t)));
    CHECK_OK(r->device->backend->sync(r->device->self, r->lane));
}

/* Largest difference over largest value; libraries may choose another algorithm for few items. */
static double
distance(const uint16_t *a, const uint16_t *b, int64_t count)
{
    double worst = 0.0, size = 0.0;
    for (int64_t i = 0; i < count; i++) {
        double x = ac_f16_to_f32(a[i]), y = ac_f16_to_f32(b[i]);
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
    memcpy(input, r->input, sizeof input);
    few.input = input;
    for (int32_t i = 0; i < c->n_inputs; i++) {
        if (c->batched >> i & 1) {
            cut(&input[i], first, c->window);
        }
    }
    cut(&out, first, c->window);
    few.output = ac_tensor_of(NULL, AC_F16, out.shape);
    if (!kernel->supports(&few, &r->device->caps)) {
        TEST_FAIL("%s: takes the large problem but not a part of it", kernel->name);
    }
    int64_t count = ac_tensor_count(&out);
    few.output.data = place(r, 2 * (size_t)count);
    uint16_t *found = ac_malloc(2 * (size_t)count), *expected = ac_malloc(2 * (size_t)count);
    CHECK(found && expected);
    launch(r, kernel, &few);
    download(r, &out, found);
    download(r, &few.output, expected);
    double d = distance(found, expected, count);
    if (!(d < 5e-3)) {
        TEST_FAIL("%s: items from %" PRId64 " are off by %g", kernel->name, first, d);
    }
    r->device->backend->free(r->device->self, few.output.data);
    ac_free(found);
    ac_free(expected);
}

static void
check(const large_case *c)
{
    rig r;
    int kernels = 0;
    setenv("ACCEL_TUNE", "off", 1);
    if (!rig_open(&r)) {
        return;
    }
    set_problem(&r, c);
    int64_t items = r.p.output.shape.dim[0], at = boundary / r.p.output.stride[0];
    int64_t first[WINDOWS] = {0, AC_MIN(at - c->window / 2, items - c->window),
                              items - c->window};
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

TEST_MAIN(TEST(linear), TEST(convolution), TEST(upsampling_convolution), TEST(group_norm),
          TEST(layer_norm), TEST(attention), TEST(elementwise), TEST(layouts))
