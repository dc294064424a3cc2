/* upsample: nearest neighbour, NHWC: y[n, i, j] = x[n, i * h / H, j * w / W].
 *
 * The product is made in f32 as PyTorch makes it; only then odd sizes pick the same pixels.
 */
#include "plain.h"

#include <math.h>

static int64_t
source(int64_t at, int64_t from, int64_t to)
{
    if (to == 2 * from) {
        return at / 2;
    }
    float scale = (float)from / (float)to;
    return AC_MIN((int64_t)floorf((float)at * scale), from - 1);
}

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *x = &p->input[0], *out = &p->output;
    int64_t columns = ac_plain_columns(out), stride = ac_plain_column_stride(out);
    int64_t height = x->shape.dim[1], width = x->shape.dim[2];
    double line[AC_PLAIN_CHUNK];
    for (int64_t row = first; row < first + rows; row++) {
        int64_t column = row % out->shape.dim[2], line_of = row / out->shape.dim[2];
        int64_t image = line_of / out->shape.dim[1];
        int64_t y = source(line_of % out->shape.dim[1], height, out->shape.dim[1]);
        int64_t x_row = (image * height + y) * width + source(column, width, out->shape.dim[2]);
        for (int64_t c = 0; c < columns; c += AC_PLAIN_CHUNK) {
            int64_t count = AC_MIN(columns - c, AC_PLAIN_CHUNK);
            ac_plain_load_pair(line, x, NULL, x_row, c, count);
            ac_plain_store(line, out, ac_plain_row(out, row) + c * stride, stride, count);
        }
    }
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    ac_plain_over_rows(lane, p, &p->output, rows_of);
    return AC_OK;
}

const ac_kernel ac_cpu_upsample_plain = {
    .name = "cpu.upsample.plain",
    .op = AC_OP_UPSAMPLE,
    .supports = ac_plain_supports,
    .launch = launch,
};
