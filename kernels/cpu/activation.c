/* activation: y = act(x). */
#include "plain.h"

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *x = &p->input[0], *out = &p->output;
    int64_t columns = ac_plain_columns(out), stride = ac_plain_column_stride(out);
    double line[AC_PLAIN_CHUNK];
    for (int64_t row = first; row < first + rows; row++) {
        for (int64_t c = 0; c < columns; c += AC_PLAIN_CHUNK) {
            int64_t count = AC_MIN(columns - c, AC_PLAIN_CHUNK);
            ac_plain_load_pair(line, x, NULL, row, c, count);
            for (int64_t i = 0; i < count; i++) {
                line[i] = ac_plain_act(p->attr.activation.act, line[i]);
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

const ac_kernel ac_cpu_activation_plain = {
    .name = "cpu.activation.plain",
    .op = AC_OP_ACTIVATION,
    .supports = ac_plain_supports,
    .launch = launch,
};
