/* upsample: nearest neighbour, NHWC: y[n, i, j] = x[n, i * h / H, j * w / W].
 *
 * The product is made in f32 as PyTorch makes it; only then odd sizes pick the same pixels.
 * Bound: memory. */
#include "element.cuh"
#include "list.h"

struct view {
    ac_cells cells;
    int64_t dim[4], stride[4];
};

__device__ static inline int64_t
source(int64_t at, int64_t from, int64_t to)
{
    if (to == 2 * from) {
        return at / 2;
    }
    int64_t i = (int64_t)floorf(__fmul_rn((float)at, __fdiv_rn((float)from, (float)to)));
    return i < from ? i : from - 1;
}

__global__ static void
upsample_kernel(view y, view x, int64_t count)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        int64_t c = i % y.dim[3], pixel = i / y.dim[3], column = pixel % y.dim[2];
        int64_t row = pixel / y.dim[2] % y.dim[1], n = pixel / y.dim[2] / y.dim[1];
        int64_t to = n * y.stride[0] + row * y.stride[1] + column * y.stride[2] + c * y.stride[3];
        int64_t from = n * x.stride[0] + source(row, x.dim[1], y.dim[1]) * x.stride[1] +
                       source(column, x.dim[2], y.dim[2]) * x.stride[2] + c * x.stride[3];
        ac_store(y.cells, to, ac_load(x.cells, from));
    }
}

static view
view_of(const ac_tensor *t)
{
    view v = {ac_cells_of(t), {}, {}};
    for (int i = 0; i < 4; i++) {
        v.dim[i] = t->shape.dim[i];
        v.stride[i] = t->stride[i];
    }
    return v;
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[0].dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    int64_t count = ac_tensor_count(&p->output), blocks = ac_ceil_div(count, AC_THREADS);
    dim3 grid((unsigned)AC_MIN(blocks, (int64_t)1 << 20));
    return ac_cuda_launch(lane, "upsample", upsample_kernel, grid, AC_THREADS, 0,
                          view_of(&p->output), view_of(&p->input[0]), count);
}

extern "C" const ac_kernel ac_cuda_upsample = {
    .name = "cuda.upsample",
    .op = AC_OP_UPSAMPLE,
    .supports = supports,
    .launch = launch,
};
