/* layer_norm, rows in registers: y = (x - mean) / sqrt(variance + eps) gamma + beta.
 *
 * A warp a row, 16 bytes a load, each element read once: the mean, then the squares around it and
 * what rounding left of it, then the result, all from registers.
 * Bound: memory, one read and one write of the tensor. */
#include "list.h"
#include "reduce.cuh"
#include "vector.cuh"

static constexpr unsigned WARPS = 4; /* of a block: few rows still fill many multiprocessors */
static constexpr int MOST = 10;      /* loads of a lane */

struct rows {
    void *y;
    const void *x, *gamma, *beta;
    int64_t count, y_row, x_row; /* rows, and elements between them */
    int32_t columns;
    float eps;
};

template <typename T, int LOADS>
__global__ static void __launch_bounds__(32 * WARPS)
layer_norm_kernel(rows r)
{
    constexpr int N = ac_wide<T>;
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
    int first = (int)(threadIdx.x % 32) * N;
    if (row >= r.count) {
        return;
    }
    const T *x = (const T *)r.x + row * r.x_row;
    T *y = (T *)r.y + row * r.y_row;
    float v[LOADS][N], sum = 0.0f, squares = 0.0f, rest = 0.0f;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        if (first + i * 32 * N < r.columns) {
            ac_load_wide<T>(v[i], x + first + i * 32 * N);
#pragma unroll
            for (int e = 0; e < N; e++) {
                sum += v[i][e];
            }
        }
    }
    float mean = ac_reduce_warp(sum, ac_sum_of()) / (float)r.columns;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        if (first + i * 32 * N < r.columns) {
#pragma unroll
            for (int e = 0; e < N; e++) {
                v[i][e] -= mean;
                rest += v[i][e];
                squares += v[i][e] * v[i][e];
            }
        }
    }
    rest = ac_reduce_warp(rest, ac_sum_of()) / (float)r.columns; /* rounding's part of the mean */
    squares = ac_reduce_warp(squares, ac_sum_of()) / (float)r.columns;
    float variance = fmaxf(squares - rest * rest, 0.0f);
    float scale = 1.0f / sqrtf(variance + r.eps);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int c = first + i * 32 * N;
        if (c < r.columns) {
            float gamma[N], beta[N];
            ac_load_wide<T>(gamma, (const T *)r.gamma + c);
            ac_load_wide<T>(beta, (const T *)r.beta + c);
#pragma unroll
            for (int e = 0; e < N; e++) {
                v[i][e] = (v[i][e] - rest) * scale * gamma[e] + beta[e];
            }
            ac_store_wide<T>(y + c, v[i]);
        }
    }
}

/* ---- when, and how --------------------------------------------------------------------------- */

static bool
rows_of(const ac_problem *p, rows *r)
{
    const ac_tensor *x = &p->input[AC_LN_X], *y = &p->output;
    const ac_tensor *gamma = &p->input[AC_LN_GAMMA], *beta = &p->input[AC_LN_BETA];
    const int64_t *const strides[] = {y->stride, x->stride};
    ac_shape lines = y->shape;
    int32_t last = --lines.rank;
    int64_t columns = y->shape.dim[last];
    int wide = 16 / (int)ac_dtype_size(y->dtype);
    ac_walk walk = ac_walk_of(&lines, 2, strides);
    if (!ac_cuda_float(y->dtype) || x->dtype != y->dtype || gamma->dtype != y->dtype ||
        beta->dtype != y->dtype || walk.rank > 1 || columns % wide ||
        columns > 32 * MOST * wide || x->stride[last] != 1 || y->stride[last] != 1 ||
        gamma->stride[0] != 1 || beta->stride[0] != 1) {
        return false;
    }
    *r = rows{y->data, x->data, gamma->data, beta->data, walk.count,
              walk.rank ? walk.stride[0][0] : columns, walk.rank ? walk.stride[1][0] : columns,
              (int32_t)columns, p->attr.layer_norm.eps};
    return r->y_row % wide == 0 && r->x_row % wide == 0;
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    rows r;
    return rows_of(p, &r);
}

template <typename T, int LOADS>
static ac_status
launch_loads(ac_lane *lane, const rows &r, int loads)
{
    if constexpr (LOADS < MOST) {
        if (loads > LOADS) {
            return launch_loads<T, LOADS + 1>(lane, r, loads);
        }
    }
    dim3 grid((unsigned)ac_ceil_div(r.count, WARPS));
    return ac_cuda_launch(lane, "layer_norm", layer_norm_kernel<T, LOADS>, grid, 32 * WARPS, 0, r);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const rows &r)
{
    return launch_loads<T, 1>(lane, r, (int)ac_ceil_div(r.columns, 32 * ac_wide<T>));
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    rows r;
    if (!rows_of(p, &r) || !ac_is_wide(r.y) || !ac_is_wide(r.x) || !ac_is_wide(r.gamma) ||
        !ac_is_wide(r.beta)) {
        return ac_cuda_layer_norm.launch(lane, p, scratch, prepared);
    }
    return p->output.dtype == AC_F32   ? launch_dtype<float>(lane, r)
           : p->output.dtype == AC_F16 ? launch_dtype<__half>(lane, r)
                                       : launch_dtype<__nv_bfloat16>(lane, r);
}

extern "C" const ac_kernel ac_cuda_layer_norm_wide = {
    .name = "cuda.layer_norm.wide",
    .op = AC_OP_LAYER_NORM,
    .supports = supports,
    .launch = launch,
};
