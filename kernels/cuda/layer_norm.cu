/* layer_norm: y = (x - mean) / sqrt(variance + eps) gamma + beta over the last dimension.
 *
 * A warp a row: the mean, then the squares around it and what rounding left of it, then the result;
 * the second and third reads of a row are L1's.
 * Bound: memory, one read and one write of the tensor. */
#include "element.cuh"
#include "list.h"
#include "reduce.cuh"

struct rows {
    ac_cells y, x, gamma, beta;
    ac_walk walk; /* over the rows: y, x */
    int64_t columns, y_column, x_column, gamma_stride, beta_stride;
    float eps;
};

__global__ static void __launch_bounds__(AC_THREADS)
layer_norm_kernel(rows r)
{
    int64_t row = (int64_t)blockIdx.x * (AC_THREADS / 32) + threadIdx.x / 32, at[2];
    int lane = threadIdx.x % 32;
    if (row >= r.walk.count) {
        return;
    }
    ac_walk_at(r.walk, row, at);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t c = lane; c < r.columns; c += 32) {
        sum += ac_load(r.x, at[1] + c * r.x_column);
    }
    float mean = ac_reduce_warp(sum, ac_sum_of()) / (float)r.columns, rest = 0.0f;
    for (int64_t c = lane; c < r.columns; c += 32) {
        float d = ac_load(r.x, at[1] + c * r.x_column) - mean;
        rest += d;
        squares += d * d;
    }
    rest = ac_reduce_warp(rest, ac_sum_of()) / (float)r.columns; /* rounding's part of the mean */
    squares = ac_reduce_warp(squares, ac_sum_of()) / (float)r.columns;
    float variance = fmaxf(squares - rest * rest, 0.0f);
    float scale = 1.0f / sqrtf(variance + r.eps);
    for (int64_t c = lane; c < r.columns; c += 32) {
        float d = ac_load(r.x, at[1] + c * r.x_column) - mean - rest;
        ac_store(r.y, at[0] + c * r.y_column,
                 d * scale * ac_load(r.gamma, c * r.gamma_stride) +
                     ac_load(r.beta, c * r.beta_stride));
    }
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    bool known = ac_cuda_float(p->output.dtype);
    for (int32_t i = 0; i < 3; i++) {
        known = known && ac_cuda_float(p->input[i].dtype);
    }
    return known;
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *x = &p->input[AC_LN_X], *y = &p->output;
    const int64_t *const strides[] = {y->stride, x->stride};
    ac_shape lines = y->shape;
    int32_t last = --lines.rank;
    rows r = {ac_cells_of(y),
              ac_cells_of(x),
              ac_cells_of(&p->input[AC_LN_GAMMA]),
              ac_cells_of(&p->input[AC_LN_BETA]),
              ac_walk_of(&lines, 2, strides),
              y->shape.dim[last],
              y->stride[last],
              x->stride[last],
              p->input[AC_LN_GAMMA].stride[0],
              p->input[AC_LN_BETA].stride[0],
              p->attr.layer_norm.eps};
    dim3 grid((unsigned)ac_ceil_div(r.walk.count, AC_THREADS / 32));
    return ac_cuda_launch(lane, "layer_norm", layer_norm_kernel, grid, AC_THREADS, 0, r);
}

extern "C" const ac_kernel ac_cuda_layer_norm = {
    .name = "cuda.layer_norm",
    .op = AC_OP_LAYER_NORM,
    .supports = supports,
    .launch = launch,
};
