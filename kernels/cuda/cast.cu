/* cast: the same elements in another dtype. */
#include "element.cuh"
#include "list.h"

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_dtype_is_float(p->output.dtype) || p->output.dtype == p->input[0].dtype;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    return ac_cuda_copy(lane, &p->output, &p->input[0]);
}

extern "C" const ac_kernel ac_cuda_cast = {
    .name = "cuda.cast",
    .op = AC_OP_CAST,
    .supports = supports,
    .launch = launch,
};
