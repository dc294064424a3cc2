/* timestep: row i is [cos|sin](t[i] f) or [sin|cos], f_j = 10000^(-j / (half - freq_shift)).
 *
 * An odd last channel is 0.  Frequencies and angles are made in f64: arguments reach 1000, where
 * an f32 frequency would cost three digits.  A few thousand elements a prompt. */
#include "element.cuh"
#include "list.h"

struct embed {
    ac_cells y, t;
    int64_t row_stride, column_stride, t_stride;
    ac_timestep_attr attr;
    int64_t rows;
};

__global__ static void
timestep_kernel(embed e)
{
    int64_t half = e.attr.channels / 2;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t row = i / e.attr.channels, channel = i % e.attr.channels;
    if (row >= e.rows) {
        return;
    }
    int64_t to = row * e.row_stride + channel * e.column_stride;
    if (channel >= 2 * half) {
        ac_store(e.y, to, 0.0f);
        return;
    }
    bool cosine = (channel < half) == e.attr.flip_sin_to_cos;
    double time = e.t.dtype == AC_F64           ? ((const double *)e.t.data)[row * e.t_stride]
                  : e.t.dtype <= AC_BF16 ? ac_load(e.t, row * e.t_stride)
                                                : (double)ac_load_id(e.t, row * e.t_stride);
    double f = exp(-9.210340371976182736 * (double)(channel % half) /
                   ((double)half - (double)e.attr.freq_shift));
    ac_store(e.y, to, (float)(cosine ? cos(time * f) : sin(time * f)));
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *y = &p->output, *t = &p->input[0];
    embed e = {ac_cells_of(y), ac_cells_of(t), y->stride[0], y->stride[1],
               t->stride[0],   p->attr.timestep, y->shape.dim[0]};
    dim3 grid((unsigned)ac_ceil_div(ac_tensor_count(y), AC_THREADS));
    return ac_cuda_launch(lane, "timestep", timestep_kernel, grid, AC_THREADS, 0, e);
}

extern "C" const ac_kernel ac_cuda_timestep = {
    .name = "cuda.timestep",
    .op = AC_OP_TIMESTEP,
    .supports = supports,
    .launch = launch,
};
