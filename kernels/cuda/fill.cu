/* fill: y = value. */
#include "element.cuh"
#include "list.h"

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_dtype_is_float(p->output.dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    return ac_cuda_fill_tensor(lane, &p->output, p->attr.fill.value);
}

extern "C" const ac_kernel ac_cuda_fill = {
    .name = "cuda.fill",
    .op = AC_OP_FILL,
    .supports = supports,
    .launch = launch,
};
