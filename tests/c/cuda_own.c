/* cuda_own: the launchers that only the ways through NVIDIA's libraries call: softmax, gather,
 * interleave, repeat, join.  Against loops on the host.  Racecheck breaks down once a kernel of
 * those libraries runs, so what test_kernels reaches only through them is seen by the sanitizers
 * here.  The launchers are hidden in libaccel_cuda.so: the backend's objects are linked in, and the
 * Makefile builds this program only where nvcc is.  Where there is no GPU it says so and passes. */
#include "../../kernels/cuda/attention.h"
#include "../../kernels/cuda/blas_conv.h"
#include "../../kernels/cuda/interleave.h"
#include "../../kernels/cuda/library.h"
#include "../../kernels/cuda/rowwise.h"
#include "test.h"

static const ac_dtype dtypes[] = {AC_F16, AC_BF16, AC_F32};

ac_status ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out);

static void
print_log(int level, const char *message)
{
    (void)level, (void)message;
}

static const ac_host host = {AC_ABI, ac_malloc, ac_free, ac_verror, ac_error_message, print_log};

typedef struct rig {
    ac_backend backend;
    void *self;
    ac_lane *lane;
    uint64_t random;
} rig;

static bool
rig_open(rig *r)
{
    ac_caps caps;
    *r = (rig){.random = 7};
    CHECK_OK(ac_backend_cuda(AC_ABI, &host, &r->backend));
    if (r->backend.open(0, &r->self, &caps) < 0) {
        printf("(no GPU) ");
        return false;
    }
    CHECK_OK(r->backend.lane_open(r->self, &r->lane));
    printf("(ran on cuda) ");
    return true;
}

static void
rig_close(rig *r)
{
    r->backend.lane_close(r->self, r->lane);
    r->backend.close(r->self);
}

/* A buffer on both sides; what lies on the GPU is no larger, so that memcheck sees its end. */
typedef struct buffer {
    void *host, *gpu;
    ac_dtype dtype;
    int64_t count;
} buffer;

/* Random, or what no kernel writes where `value` is not 0. */
static buffer
buffer_new(rig *r, ac_dtype dtype, int64_t count, double value)
{
    size_t bytes = (size_t)count * ac_dtype_size(dtype);
    buffer b = {.host = ac_malloc(bytes), .dtype = dtype, .count = count};
    CHECK(b.host);
    for (int64_t i = 0; i < count; i++) {
        ac_element_set(b.host, dtype, i, value != 0.0 ? value : test_uniform(&r->random, -4, 4));
    }
    CHECK_OK(r->backend.alloc(r->self, bytes, &b.gpu));
    CHECK_OK(r->backend.upload(r->self, r->lane, b.gpu, b.host, bytes));
    CHECK_OK(r->backend.sync(r->self, r->lane));
    return b;
}

static void
buffer_fetch(rig *r, buffer *b)
{
    size_t bytes = (size_t)b->count * ac_dtype_size(b->dtype);
    CHECK_OK(r->backend.download(r->self, r->lane, b->host, b->gpu, bytes));
    CHECK_OK(r->backend.sync(r->self, r->lane));
}

static void
buffer_free(rig *r, buffer *b)
{
    r->backend.free(r->self, b->gpu);
    ac_free(b->host);
}

static double
at(const buffer *b, int64_t i)
{
    return ac_element_get(b->host, b->dtype, i);
}

static void
check_same(const buffer *found, int64_t i, double expected)
{
    if (at(found, i) != expected) {
        TEST_FAIL("%s, element %" PRId64 ": found %g, expected %g", ac_dtype_name(found->dtype), i,
                  at(found, i), expected);
    }
}

/* ---- softmax --------------------------------------------------------------------------------- */

static void
check_shares(const ac_softmax *s, const buffer *scores, const buffer *out)
{
    double rounding = s->dtype == AC_F32 ? 1e-5 : s->dtype == AC_F16 ? 1e-3 : 8e-3;
    for (int64_t row = 0; row < s->rows; row++) {
        double most = -INFINITY, sum = 0.0;
        for (int64_t i = 0; i < s->columns; i++) {
            most = fmax(most, s->factor * at(scores, row * s->pitch + i));
        }
        for (int64_t i = 0; i < s->columns; i++) {
            sum += exp(s->factor * at(scores, row * s->pitch + i) - most);
        }
        for (int64_t i = 0; i < s->pitch; i++) {
            double score = s->factor * at(scores, row * s->pitch + i);
            double share = i < s->columns ? s->gain * exp(score - most) / sum : 0.0;
            CHECK_CLOSE(at(out, row * s->pitch + i), share, rounding * share + 6e-8);
        }
    }
}

/* Each way to spread a row over registers, at its ends. */
static void
softmax(void)
{
    rig r;
    if (!rig_open(&r)) {
        return;
    }
    static const int64_t columns[] = {1, 77, 1021, 1024, 1025, 4096, 4099, AC_SOFTMAX_COLUMNS};
    for (size_t i = 0; i < AC_ARRAY_LEN(columns) * AC_ARRAY_LEN(dtypes) * 2; i++) {
        ac_softmax s = {.dtype = dtypes[i / 2 % 3], .rows = 3, .columns = columns[i / 6],
                        .pitch = (columns[i / 6] + 3) / 4 * 4, .factor = 0.5f, .gain = 1024.0f};
        bool in_place = i % 2;
        if (in_place && s.dtype != AC_F32) {
            continue;
        }
        buffer scores = buffer_new(&r, AC_F32, s.rows * s.pitch, 0.0);
        buffer out = buffer_new(&r, s.dtype, s.rows * s.pitch, 9.0);
        buffer *to = in_place ? &scores : &out;
        buffer given = {.host = ac_malloc((size_t)scores.count * 4), .dtype = AC_F32};
        CHECK(given.host);
        memcpy(given.host, scores.host, (size_t)scores.count * 4);
        s.scores = scores.gpu;
        s.out = to->gpu;
        CHECK_OK(ac_cuda_softmax(r.lane, &s));
        buffer_fetch(&r, to);
        check_shares(&s, &given, to);
        ac_free(given.host);
        buffer_free(&r, &scores);
        buffer_free(&r, &out);
    }
    rig_close(&r);
}

/* ---- gather ---------------------------------------------------------------------------------- */

static void
check_rows(const ac_blas_conv *c, const buffer *x, const buffer *rows, int64_t first)
{
    int64_t row = c->kernel_h * c->kernel_w * c->c_in;
    for (int64_t i = 0; i < rows->count; i++) {
        int64_t pixel = first + i / row, tap = i % row / c->c_in, channel = i % c->c_in;
        int64_t line = pixel / c->out_width, n = line / c->out_height;
        int64_t from_y = line % c->out_height * c->stride - c->pad_top + tap / c->kernel_w;
        int64_t from_x = pixel % c->out_width * c->stride - c->pad_left + tap % c->kernel_w;
        bool inside = from_y >= 0 && from_y < c->height && from_x >= 0 && from_x < c->width;
        int64_t from = ((n * c->height + from_y) * c->width + from_x) * c->c_in + channel;
        check_same(rows, i, inside ? at(x, from) : 0.0);
    }
}

static void
gather(void)
{
    rig r;
    if (!rig_open(&r)) {
        return;
    }
    /* images, height, width, c_in, kernel, stride, padding before, after */
    static const int32_t shape[][8] = {{2, 7, 5, 8, 3, 1, 1, 1},   {1, 8, 9, 16, 3, 2, 0, 1},
                                       {3, 4, 4, 320, 3, 1, 1, 1}, {1, 5, 6, 24, 5, 1, 2, 2},
                                       {2, 6, 4, 40, 1, 2, 0, 0},  {1, 3, 1, 8, 3, 1, 0, 2}};
    for (size_t i = 0; i < AC_ARRAY_LEN(shape) * AC_ARRAY_LEN(dtypes); i++) {
        const int32_t *s = shape[i / 3];
        ac_blas_conv c = {.dtype = dtypes[i % 3], .images = s[0], .height = s[1], .width = s[2],
                          .c_in = s[3], .kernel_h = s[4], .kernel_w = s[2] < s[4] ? 1 : s[4],
                          .stride = s[5], .pad_top = s[6], .pad_left = s[6]};
        c.out_height = (c.height + s[6] + s[7] - c.kernel_h) / c.stride + 1;
        c.out_width = (c.width + s[6] + s[7] - c.kernel_w) / c.stride + 1;
        int64_t all = c.images * c.out_height * c.out_width, first = all / 3;
        int64_t row = c.kernel_h * c.kernel_w * c.c_in;
        buffer x = buffer_new(&r, c.dtype, c.images * c.height * c.width * c.c_in, 0.0);
        buffer rows = buffer_new(&r, c.dtype, (all - first) * row, 9.0);
        c.x = x.gpu;
        CHECK_OK(ac_cuda_gather(r.lane, &c, first, all - first, rows.gpu));
        buffer_fetch(&r, &rows);
        check_rows(&c, &x, &rows, first);
        buffer_free(&r, &x);
        buffer_free(&r, &rows);
    }
    rig_close(&r);
}

/* ---- interleave, repeat, join ---------------------------------------------------------------- */

static void
check_phases(const ac_interleave *v, const buffer *from, const buffer *to)
{
    for (int64_t i = 0; i < to->count; i++) {
        int64_t c = i % v->channels, pixel = i / v->channels, x = pixel % (2 * v->width);
        int64_t line = pixel / (2 * v->width), y = line % (2 * v->height);
        int64_t n = line / (2 * v->height), a = y % 2, b = x % 2;
        int64_t row = (n * (v->height + 1) + y / 2 + a) * (v->width + 1) + x / 2 + b;
        check_same(to, i, at(from, (row * 4 + 2 * a + b) * v->channels + c));
    }
}

static void
interleave(void)
{
    rig r;
    if (!rig_open(&r)) {
        return;
    }
    static const int32_t shape[][4] = {{1, 1, 1, 8}, {2, 3, 5, 24}, {3, 7, 4, 320}};
    for (size_t i = 0; i < AC_ARRAY_LEN(shape) * AC_ARRAY_LEN(dtypes); i++) {
        const int32_t *s = shape[i / 3];
        ac_interleave v = {.dtype = dtypes[i % 3], .images = s[0], .height = s[1], .width = s[2],
                           .channels = s[3]};
        int64_t wide = v.images * (v.height + 1) * (v.width + 1) * 4 * v.channels;
        buffer from = buffer_new(&r, v.dtype, wide, 0.0);
        buffer to = buffer_new(&r, v.dtype, v.images * 4 * v.height * v.width * v.channels, 9.0);
        v.from = from.gpu;
        v.to = to.gpu;
        CHECK_OK(ac_cuda_interleave(r.lane, &v));
        buffer_fetch(&r, &to);
        check_phases(&v, &from, &to);
        buffer_free(&r, &from);
        buffer_free(&r, &to);
    }
    rig_close(&r);
}

static void
repeat(void)
{
    rig r;
    if (!rig_open(&r)) {
        return;
    }
    for (size_t i = 0; i < AC_ARRAY_LEN(dtypes); i++) {
        buffer from = buffer_new(&r, dtypes[i], 333, 0.0);
        buffer to = buffer_new(&r, dtypes[i], 4 * from.count, 9.0);
        CHECK_OK(ac_cuda_repeat(r.lane, to.gpu, from.gpu, from.count, 4, dtypes[i]));
        buffer_fetch(&r, &to);
        for (int64_t k = 0; k < to.count; k++) {
            check_same(&to, k, at(&from, k % from.count));
        }
        buffer_free(&r, &from);
        buffer_free(&r, &to);
    }
    rig_close(&r);
}

static void
join(void)
{
    rig r;
    if (!rig_open(&r)) {
        return;
    }
    /* rows, columns of both, what follows a row of each */
    static const int64_t shape[][5] = {{1, 8, 8, 0, 0}, {37, 24, 320, 0, 8}, {300, 40, 16, 16, 0}};
    for (size_t i = 0; i < AC_ARRAY_LEN(shape) * AC_ARRAY_LEN(dtypes); i++) {
        const int64_t *s = shape[i / 3];
        ac_join_rows j = {.dtype = dtypes[i % 3], .rows = s[0], .columns = {s[1], s[2]},
                          .from_row = {s[1] + s[3], s[2] + s[4]}};
        buffer a = buffer_new(&r, j.dtype, s[0] * j.from_row[0] - s[3], 0.0);
        buffer b = buffer_new(&r, j.dtype, s[0] * j.from_row[1] - s[4], 0.0);
        buffer to = buffer_new(&r, j.dtype, s[0] * (s[1] + s[2]), 9.0);
        j.from[0] = a.gpu;
        j.from[1] = b.gpu;
        j.to = to.gpu;
        CHECK_OK(ac_cuda_join_rows(r.lane, &j));
        buffer_fetch(&r, &to);
        for (int64_t k = 0; k < to.count; k++) {
            int64_t row = k / (s[1] + s[2]), column = k % (s[1] + s[2]);
            bool first = column < s[1];
            check_same(&to, k, first ? at(&a, row * j.from_row[0] + column)
                                     : at(&b, row * j.from_row[1] + column - s[1]));
        }
        buffer_free(&r, &a);
        buffer_free(&r, &b);
        buffer_free(&r, &to);
    }
    rig_close(&r);
}

/* ---- known: needs no GPU --------------------------------------------------------------------- */

typedef struct thing {
    int64_t key[3];
    int32_t value;
} thing;

static void
known(void)
{
    ac_backend backend;
    ac_cuda_known all = {0};
    CHECK_OK(ac_backend_cuda(AC_ABI, &host, &backend));
    for (int32_t i = 0; i < 500; i++) {
        thing *t = ac_malloc(sizeof *t);
        CHECK(t);
        *t = (thing){{i % 7, i, -i}, 10 * i};
        CHECK(!ac_cuda_known_find(&all, t, sizeof t->key));
        CHECK_OK(ac_cuda_known_add(&all, t, sizeof t->key));
    }
    for (int64_t i = 0; i < 500; i++) {
        const thing *t = ac_cuda_known_find(&all, (int64_t[]){i % 7, i, -i}, sizeof t->key);
        CHECK(t && t->value == 10 * i);
    }
    CHECK(!ac_cuda_known_find(&all, (int64_t[]){1, 1, 1}, sizeof(int64_t[3])));
    ac_cuda_known_free(&all);
}

TEST_MAIN(TEST(known), TEST(softmax), TEST(gather), TEST(interleave), TEST(repeat), TEST(join))
