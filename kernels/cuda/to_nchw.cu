/* to_nchw: y[n, c, h, w] = x[n, h, w, c], converting the dtype: a copy through a permuted view. */
#include "element.cuh"
#include "list.h"

static const int order[4] = {0, 3, 1, 2}; /* of x's dimensions in y */

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_dtype_is_float(p->output.dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    ac_tensor view = p->input[0];
    view.shape = p->output.shape;
    for (int i = 0; i < 4; i++) {
        view.stride[i] = p->input[0].stride[order[i]];
    }
    return ac_cuda_copy(lane, &p->output, &view);
}

extern "C" const ac_kernel ac_cuda_to_nchw = {
    .name = "cuda.to_nchw",
    .op = AC_OP_TO_NCHW,
    .supports = supports,
    .launch = launch,
};
