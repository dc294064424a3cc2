/* concat: each operand is copied into its range of the output along one axis. */
#include "plain.h"

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    int32_t axis = p->attr.axis.axis;
    int64_t at = 0, step = p->output.stride[axis] * (int64_t)ac_dtype_size(p->output.dtype);
    for (int32_t i = 0; i < p->n_inputs; i++) {
        ac_tensor part = p->output;
        part.data = (char *)part.data + at * step;
        part.shape = p->input[i].shape;
        ac_plain_copy(lane, &part, &p->input[i]);
        at += p->input[i].shape.dim[axis];
    }
    return AC_OK;
}

const ac_kernel ac_cpu_concat_plain = {
    .name = "cpu.concat.plain",
    .op = AC_OP_CONCAT,
    .supports = ac_plain_supports,
    .launch = launch,
};
