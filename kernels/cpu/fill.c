/* fill: y = value. */
#include "plain.h"

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *out = &p->output;
    int64_t columns = ac_plain_columns(out), stride = ac_plain_column_stride(out);
    for (int64_t row = first; row < first + rows; row++) {
        for (int64_t c = 0; c < columns; c++) {
            ac_element_set(out->data, out->dtype, ac_plain_row(out, row) + c * stride,
                           (double)p->attr.fill.value);
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

const ac_kernel ac_cpu_fill_plain = {
    .name = "cpu.fill.plain",
    .op = AC_OP_FILL,
    .supports = ac_plain_supports,
    .launch = launch,
};
