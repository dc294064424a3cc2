/* add: y = a + b; b has a's shape, or is [n, c] or [1, c] and holds for all that lies between. */
#include "plain.h"

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *x = &p->input[0], *b = &p->input[1], *out = &p->output;
    int64_t columns = ac_plain_columns(out), stride = ac_plain_column_stride(out);
    bool same = ac_shape_equal(&x->shape, &b->shape);
    int64_t between = ac_plain_rows(out) / (same ? 1 : out->shape.dim[0]);
    double line[AC_PLAIN_CHUNK], other[AC_PLAIN_CHUNK];
    for (int64_t row = first; row < first + rows; row++) {
        int64_t b_row = same ? row : b->shape.dim[0] > 1 ? row / between : 0;
        for (int64_t c = 0; c < columns; c += AC_PLAIN_CHUNK) {
            int64_t count = AC_MIN(columns - c, AC_PLAIN_CHUNK);
            ac_plain_load_pair(line, x, NULL, row, c, count);
            ac_plain_load_pair(other, b, NULL, b_row, c, count);
            for (int64_t i = 0; i < count; i++) {
                line[i] += other[i];
            }
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

const ac_kernel ac_cpu_add_plain = {
    .name = "cpu.add.plain",
    .op = AC_OP_ADD,
    .supports = ac_plain_supports,
    .launch = launch,
};
