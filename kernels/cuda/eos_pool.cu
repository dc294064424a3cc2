/* eos_pool: y[n] = x[n, position of the end token of text n].
 *
 * eos_id 2 stands for old configs that name a wrong token: there the highest id ends the text.  A
 * text without the token takes position 0, as argmax over no match does.  A block a text. */
#include "element.cuh"
#include "list.h"

struct texts {
    ac_cells y, x, ids;
    int64_t y_stride[2], x_stride[3], id_stride[2];
    int64_t tokens, channels, eos_id;
};

__global__ static void
eos_pool_kernel(texts t)
{
    __shared__ int64_t position;
    int64_t text = blockIdx.x;
    if (threadIdx.x == 0) {
        int64_t most = INT64_MIN;
        position = 0;
        for (int64_t i = 0; i < t.tokens; i++) {
            int64_t id = ac_load_id(t.ids, text * t.id_stride[0] + i * t.id_stride[1]);
            if (t.eos_id != 2 && id == t.eos_id) {
                position = i;
                break;
            }
            if (t.eos_id == 2 && id > most) {
                most = id;
                position = i;
            }
        }
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < t.channels; c += blockDim.x) {
        float value = ac_load(t.x, text * t.x_stride[0] + position * t.x_stride[1] +
                                       c * t.x_stride[2]);
        ac_store(t.y, text * t.y_stride[0] + c * t.y_stride[1], value);
    }
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[0].dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *x = &p->input[0], *ids = &p->input[1], *y = &p->output;
    texts t = {ac_cells_of(y),
               ac_cells_of(x),
               ac_cells_of(ids),
               {y->stride[0], y->stride[1]},
               {x->stride[0], x->stride[1], x->stride[2]},
               {ids->stride[0], ids->stride[1]},
               ids->shape.dim[1],
               y->shape.dim[1],
               p->attr.eos_pool.eos_id};
    return ac_cuda_launch(lane, "eos_pool", eos_pool_kernel, dim3((unsigned)y->shape.dim[0]),
                          AC_THREADS, 0, t);
}

extern "C" const ac_kernel ac_cuda_eos_pool = {
    .name = "cuda.eos_pool",
    .op = AC_OP_EOS_POOL,
    .supports = supports,
    .launch = launch,
};
