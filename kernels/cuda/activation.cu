/* activation: y = act(x).  Bound: memory, each element read and written once. */
#include "element.cuh"
#include "list.h"
#include "rowwise.h"

struct apply {
    ac_cells y, x;
    ac_act act;
    __device__ void
    operator()(const int64_t (&at)[2]) const
    {
        ac_store(y, at[0], ac_act_apply(act, ac_load(x, at[1])));
    }
};

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[0].dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *x = &p->input[0], *y = &p->output;
    ac_rows from, to;
    if (x->dtype == y->dtype && ac_tensor_rows(x, &from) && ac_tensor_rows(y, &to)) {
        ac_rowwise r = {y->data, x->data, y->dtype, to.rows, to.columns, to.row_stride,
                        from.row_stride, p->attr.activation.act};
        if (ac_rowwise_fits(&r)) {
            return ac_cuda_act_rows(lane, &r);
        }
    }
    const int64_t *const strides[] = {y->stride, x->stride};
    return ac_cuda_each<2>(lane, "activation", ac_walk_of(&y->shape, 2, strides),
                           apply{ac_cells_of(y), ac_cells_of(x), p->attr.activation.act});
}

extern "C" const ac_kernel ac_cuda_activation = {
    .name = "cuda.activation",
    .op = AC_OP_ACTIVATION,
    .supports = supports,
    .launch = launch,
};
