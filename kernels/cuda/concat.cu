/* concat: each operand is copied into its range of the output along one axis. */
#include "element.cuh"
#include "list.h"

static bool
supports(const ac_problem *p, const ac_caps *)
{
    bool same = true;
    for (int32_t i = 0; i < p->n_inputs; i++) {
        same = same && p->input[i].dtype == p->output.dtype;
    }
    return same || ac_dtype_is_float(p->output.dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    int32_t axis = p->attr.axis.axis;
    int64_t at = 0, step = p->output.stride[axis] * (int64_t)ac_dtype_size(p->output.dtype);
    for (int32_t i = 0; i < p->n_inputs; i++) {
        ac_tensor part = p->output;
        part.data = (char *)part.data + at * step;
        part.shape = p->input[i].shape;
        AC_TRY(ac_cuda_copy(lane, &part, &p->input[i]));
        at += p->input[i].shape.dim[axis];
    }
    return AC_OK;
}

extern "C" const ac_kernel ac_cuda_concat = {
    .name = "cuda.concat",
    .op = AC_OP_CONCAT,
    .supports = supports,
    .launch = launch,
};
