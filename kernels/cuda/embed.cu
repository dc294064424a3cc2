/* embed: y[..., :] = table[ids[...], :].  An id outside the table gives NaN: a kernel cannot raise,
 * and whoever has the ids on the host names it before. */
#include "element.cuh"
#include "list.h"

struct rows {
    ac_cells y, ids, table;
    int64_t limit, table_row;
    __device__ void
    operator()(const int64_t (&at)[3]) const
    {
        int64_t id = ac_load_id(ids, at[1]);
        bool inside = id >= 0 && id < limit;
        ac_store(y, at[0], inside ? ac_load(table, id * table_row + at[2]) : nanf(""));
    }
};

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[1].dtype) &&
           p->input[1].shape.dim[0] > 0;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *ids = &p->input[0], *table = &p->input[1], *y = &p->output;
    int64_t id_stride[AC_MAX_RANK] = {0}, column[AC_MAX_RANK] = {0};
    for (int32_t d = 0; d < ids->shape.rank; d++) {
        id_stride[d] = ids->stride[d];
    }
    column[y->shape.rank - 1] = table->stride[1];
    const int64_t *const strides[] = {y->stride, id_stride, column};
    return ac_cuda_each<3>(lane, "embed", ac_walk_of(&y->shape, 3, strides),
                           rows{ac_cells_of(y), ac_cells_of(ids), ac_cells_of(table),
                                table->shape.dim[0], table->stride[0]});
}

extern "C" const ac_kernel ac_cuda_embed = {
    .name = "cuda.embed",
    .op = AC_OP_EMBED,
    .supports = supports,
    .launch = launch,
};
