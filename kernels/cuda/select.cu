/* select: y = table[index[0]], the index read on the device, so that a recorded graph follows it.
 * An index outside the table reads its nearest row. */
#include "element.cuh"
#include "list.h"

struct row {
    ac_cells y, table, index;
    int64_t limit, table_row;
    __device__ void
    operator()(const int64_t (&at)[2]) const
    {
        int64_t i = ac_load_id(index, 0);
        i = i < 0 ? 0 : i < limit ? i : limit - 1;
        ac_store(y, at[0], ac_load(table, i * table_row + at[1]));
    }
};

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_dtype_is_float(p->output.dtype) && ac_dtype_is_float(p->input[0].dtype) &&
           p->input[0].shape.dim[0] > 0;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *table = &p->input[0], *index = &p->input[1], *y = &p->output;
    const int64_t *const strides[] = {y->stride, table->stride + 1};
    return ac_cuda_each<2>(lane, "select", ac_walk_of(&y->shape, 2, strides),
                           row{ac_cells_of(y), ac_cells_of(table), ac_cells_of(index),
                               table->shape.dim[0], table->stride[0]});
}

extern "C" const ac_kernel ac_cuda_select = {
    .name = "cuda.select",
    .op = AC_OP_SELECT,
    .supports = supports,
    .launch = launch,
};
