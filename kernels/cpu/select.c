/* select: y = table[index[0]]. */
#include "plain.h"

#include <string.h>

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    const ac_tensor *table = &p->input[0], *index = &p->input[1];
    int64_t row = (int64_t)ac_element_get(index->data, index->dtype, 0);
    if (row < 0 || row >= table->shape.dim[0]) {
        return ac_error(AC_E_INVALID, "index: found %lld, expected 0 to %lld", (long long)row,
                        (long long)table->shape.dim[0] - 1);
    }
    ac_tensor from = {.dtype = table->dtype, .shape = p->output.shape};
    size_t start = (size_t)(row * table->stride[0]) * ac_dtype_size(table->dtype);
    from.data = (char *)table->data + start;
    memcpy(from.stride, table->stride + 1, sizeof(int64_t) * (AC_MAX_RANK - 1));
    ac_plain_copy(lane, &p->output, &from);
    return AC_OK;
}

const ac_kernel ac_cpu_select_plain = {
    .name = "cpu.select.plain",
    .op = AC_OP_SELECT,
    .supports = ac_plain_supports,
    .launch = launch,
};
