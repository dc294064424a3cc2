/* add: y = a + b; b has a's shape, or is [n, c] or [1, c] and holds for all that lies between.
 * Bound: memory. */
#include "element.cuh"
#include "list.h"

struct apply {
    ac_cells y, a, b;
    __device__ void
    operator()(const int64_t (&at)[3]) const
    {
        ac_store(y, at[0], ac_load(a, at[1]) + ac_load(b, at[2]));
    }
};

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[0].dtype) &&
           ac_cuda_float(p->input[1].dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *a = &p->input[0], *b = &p->input[1], *y = &p->output;
    int64_t broadcast[AC_MAX_RANK] = {0};
    int32_t last = y->shape.rank - 1;
    if (!ac_shape_equal(&a->shape, &b->shape)) {
        broadcast[0] = b->shape.dim[0] > 1 ? b->stride[0] : 0;
        broadcast[last] = b->stride[1];
    }
    const int64_t *const strides[] = {
        y->stride, a->stride, ac_shape_equal(&a->shape, &b->shape) ? b->stride : broadcast};
    return ac_cuda_each<3>(lane, "add", ac_walk_of(&y->shape, 3, strides),
                           apply{ac_cells_of(y), ac_cells_of(a), ac_cells_of(b)});
}

extern "C" const ac_kernel ac_cuda_add = {
    .name = "cuda.add",
    .op = AC_OP_ADD,
    .supports = supports,
    .launch = launch,
};
