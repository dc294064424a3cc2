/* plain: helpers of the plain reference kernels; see plain.h. */
#include "plain.h"

#include <math.h>
#include <string.h>

bool
ac_plain_supports(const ac_problem *p, const ac_caps *caps)
{
    (void)p;
    (void)caps;
    return true;
}

int64_t
ac_plain_columns(const ac_tensor *t)
{
    return t->shape.rank ? t->shape.dim[t->shape.rank - 1] : 1;
}

int64_t
ac_plain_column_stride(const ac_tensor *t)
{
    return t->shape.rank ? t->stride[t->shape.rank - 1] : 1;
}

int64_t
ac_plain_rows(const ac_tensor *t)
{
    int64_t rows = 1;
    for (int i = 0; i < t->shape.rank - 1; i++) {
        rows *= t->shape.dim[i];
    }
    return rows;
}

int64_t
ac_plain_row(const ac_tensor *t, int64_t row)
{
    int64_t offset = 0;
    for (int i = t->shape.rank - 2; i >= 0; i--) {
        offset += row % t->shape.dim[i] * t->stride[i];
        row /= t->shape.dim[i];
    }
    return offset;
}

/* ---- elements ------------------------------------------------------------------------------- */

void
ac_plain_load(double *to, const ac_tensor *t, int64_t offset, int64_t stride, int64_t count)
{
    if (t->dtype == AC_F32) {
        const float *from = (const float *)t->data + offset;
        for (int64_t i = 0; i < count; i++) {
            to[i] = from[i * stride];
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            to[i] = ac_element_get(t->data, t->dtype, offset + i * stride);
        }
    }
}

void
ac_plain_store(const double *from, const ac_tensor *t, int64_t offset, int64_t stride,
               int64_t count)
{
    if (t->dtype == AC_F32) {
        float *to = (float *)t->data + offset;
        for (int64_t i = 0; i < count; i++) {
            to[i * stride] = (float)from[i];
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            ac_element_set(t->data, t->dtype, offset + i * stride, from[i]);
        }
    }
}

void
ac_plain_load_pair(double *to, const ac_tensor *x, const ac_tensor *x2, int64_t row, int64_t from,
                   int64_t count)
{
    int64_t c1 = ac_plain_columns(x), stride = ac_plain_column_stride(x);
    int64_t first = AC_MAX(AC_MIN(c1 - from, count), 0);
    ac_plain_load(to, x, ac_plain_row(x, row) + from * stride, stride, first);
    if (first < count) {
        stride = ac_plain_column_stride(x2);
        ac_plain_load(to + first, x2, ac_plain_row(x2, row) + (from + first - c1) * stride, stride,
                      count - first);
    }
}

double
ac_plain_act(ac_act act, double x)
{
    switch (act) {
    case AC_ACT_SILU:
        return x / (1.0 + exp(-x));
    case AC_ACT_GELU:
        return 0.5 * x * (1.0 + erf(x * M_SQRT1_2));
    case AC_ACT_GELU_TANH:
        return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    case AC_ACT_QUICK_GELU:
        return x / (1.0 + exp(-1.702 * x));
    case AC_ACT_RELU:
        return x < 0.0 ? 0.0 : x; /* keeps NaN */
    default:
        return x;
    }
}

typedef double v2 __attribute__((vector_size(16), aligned(8)));

/* Four rows at a time, two sums each: what the baseline's sixteen registers hold. */
void
ac_plain_dots(double *out, const double *x, int64_t stride, int64_t rows, const double *w,
              int64_t k)
{
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * stride) {
        v2 sum[4] = {{0}};
        int64_t i = 0;
        for (; i + 2 <= k; i += 2) {
            v2 b = *(const v2 *)(w + i);
            for (int j = 0; j < 4; j++) {
                sum[j] += *(const v2 *)(x + j * stride + i) * b;
            }
        }
        for (int j = 0; j < 4; j++) {
            out[r + j] = sum[j][0] + sum[j][1] + (i < k ? x[j * stride + i] * w[i] : 0.0);
        }
    }
    for (; r < rows; r++, x += stride) {
        double sum[2] = {0.0, 0.0};
        for (int64_t i = 0; i < k; i++) {
            sum[i & 1] += x[i] * w[i];
        }
        out[r] = sum[0] + sum[1];
    }
}

/* ---- over rows ------------------------------------------------------------------------------ */

typedef struct rows_job {
    const ac_problem *p;
    ac_plain_rows_fn fn;
    int64_t rows, rows_per_tile;
} rows_job;

static void
rows_tile(void *arg, int64_t tile, void *scratch)
{
    (void)scratch;
    const rows_job *job = arg;
    int64_t first = tile * job->rows_per_tile;
    job->fn(job->p, first, AC_MIN(job->rows_per_tile, job->rows - first));
}

void
ac_plain_over_rows(ac_lane *lane, const ac_problem *p, const ac_tensor *t, ac_plain_rows_fn fn)
{
    int64_t columns = ac_plain_columns(t);
    if (ac_tensor_count(t) == 0) {
        return;
    }
    rows_job job = {.p = p,
                    .fn = fn,
                    .rows = ac_plain_rows(t),
                    .rows_per_tile = AC_MAX(16384 / AC_MAX(columns, 1), 1)};
    ac_pool_run(lane, (job.rows + job.rows_per_tile - 1) / job.rows_per_tile, rows_tile, &job);
}

/* As it is: f32 needs no way through double. */
static void
copy_f32(const ac_tensor *dst, int64_t to, const ac_tensor *src, int64_t from, int64_t columns)
{
    const float *x = (const float *)src->data + from;
    float *y = (float *)dst->data + to;
    int64_t from_stride = ac_plain_column_stride(src), to_stride = ac_plain_column_stride(dst);
    if (from_stride == 1 && to_stride == 1) {
        memcpy(y, x, sizeof *y * (size_t)columns);
        return;
    }
    for (int64_t c = 0; c < columns; c++) {
        y[c * to_stride] = x[c * from_stride];
    }
}

static void
copy_rows(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *src = &p->input[0], *dst = &p->output;
    int64_t from_stride = ac_plain_column_stride(src), to_stride = ac_plain_column_stride(dst);
    int64_t columns = ac_plain_columns(dst);
    double line[AC_PLAIN_CHUNK];
    for (int64_t row = first; row < first + rows; row++) {
        int64_t from = ac_plain_row(src, row), to = ac_plain_row(dst, row);
        if (src->dtype == AC_F32 && dst->dtype == AC_F32) {
            copy_f32(dst, to, src, from, columns);
            continue;
        }
        for (int64_t c = 0; c < columns; c += AC_PLAIN_CHUNK) {
            int64_t count = AC_MIN(columns - c, AC_PLAIN_CHUNK);
            ac_plain_load(line, src, from + c * from_stride, from_stride, count);
            ac_plain_store(line, dst, to + c * to_stride, to_stride, count);
        }
    }
}

void
ac_plain_copy(ac_lane *lane, const ac_tensor *dst, const ac_tensor *src)
{
    ac_tensor input = *src;
    ac_problem p = {.op = AC_OP_CAST, .n_inputs = 1, .input = &input, .output = *dst};
    ac_plain_over_rows(lane, &p, dst, copy_rows);
}

void
ac_plain_permute(ac_lane *lane, const ac_problem *p, const int order[4])
{
    ac_tensor view = p->input[0];
    view.shape = p->output.shape;
    for (int i = 0; i < 4; i++) {
        view.stride[i] = p->input[0].stride[order[i]];
    }
    ac_plain_copy(lane, &p->output, &view);
}
