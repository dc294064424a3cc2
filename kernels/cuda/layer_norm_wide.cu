/* layer_norm, rows in registers: y = (x - mean) / sqrt(variance + eps) gamma + beta.
 *
 * As many lanes a row as give each a few loads of 16 bytes, so that a warp takes up to four rows
 * and waits once for all of it; each element is read once: the mean, then the squares around it and
 * what rounding left of it, then the result, all from registers.
 * Bound: memory, one read and one write of the tensor. */
#include "list.h"
#include "vector.cuh"

static constexpr int WARPS = 4; /* of a block: few rows still fill many multiprocessors */
static constexpr int FEW = 5;   /* loads of a lane, before a row takes more lanes */
static constexpr int MOST = 10; /* when it cannot */

struct rows {
    void *y;
    const void *x, *gamma, *beta;
    int64_t count, y_row, x_row; /* rows, and elements between them */
    int32_t columns;
    float eps;
};

template <int LANES>
__device__ static inline float
sum_of(float v)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, step);
    }
    return v;
}

/* LANES LOADS vectors are a row, or the last load goes beyond it. */
template <typename T, int LANES, int LOADS>
__global__ static void __launch_bounds__(32 * WARPS)
layer_norm_kernel(const __grid_constant__ rows r)
{
    constexpr int N = ac_wide<T>, STEP = LANES * N;
    int64_t row = (int64_t)blockIdx.x * (WARPS * 32 / LANES) + threadIdx.x / LANES;
    int first = (int)(threadIdx.x % LANES) * N;
    bool mine = row < r.count; /* others compute row 0 and keep it: warps stay whole */
    const T *x = (const T *)r.x + (mine ? row : 0) * r.x_row;
    uint4 raw[LOADS], gamma[LOADS], beta[LOADS];
    float v[LOADS][N], sum = 0.0f, squares = 0.0f, rest = 0.0f, each = 1.0f / (float)r.columns;
    auto there = [&](int i) { return i < LOADS - 1 || first + i * STEP < r.columns; };
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        raw[i] = there(i) ? *(const uint4 *)(x + first + i * STEP) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) { /* in flight with the row */
        int c = there(i) ? first + i * STEP : 0;
        gamma[i] = *(const uint4 *)((const T *)r.gamma + c);
        beta[i] = *(const uint4 *)((const T *)r.beta + c);
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        ac_unpack_wide<T>(v[i], raw[i]);
#pragma unroll
        for (int e = 0; e < N; e++) {
            sum += v[i][e];
        }
    }
    float mean = sum_of<LANES>(sum) * each;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
#pragma unroll
        for (int e = 0; e < N; e++) {
            v[i][e] = there(i) ? v[i][e] - mean : 0.0f;
            rest += v[i][e];
            squares += v[i][e] * v[i][e];
        }
    }
    rest = sum_of<LANES>(rest) * each; /* rounding's part of the mean */
    squares = sum_of<LANES>(squares) * each;
    float scale = rsqrtf(fmaxf(squares - rest * rest, 0.0f) + r.eps);
    T *y = (T *)r.y + row * r.y_row;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        float by[N], add[N];
        ac_unpack_wide<T>(by, gamma[i]);
        ac_unpack_wide<T>(add, beta[i]);
#pragma unroll
        for (int e = 0; e < N; e++) {
            v[i][e] = (v[i][e] - rest) * scale * by[e] + add[e];
        }
        if (mine && there(i)) {
            ac_store_wide<T>(y + first + i * STEP, v[i]);
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
        columns < wide || columns > 32 * MOST * wide || x->stride[last] != 1 ||
        y->stride[last] != 1 || gamma->stride[0] != 1 || beta->stride[0] != 1) {
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

template <typename T, int LANES, int LOADS>
static ac_status
launch_loads(ac_lane *lane, const rows &r, int loads)
{
    constexpr int LIMIT = LANES < 32 ? FEW : MOST;
    if constexpr (LOADS < LIMIT) {
        if (loads > LOADS) {
            return launch_loads<T, LANES, LOADS + 1>(lane, r, loads);
        }
    }
    dim3 grid((unsigned)ac_ceil_div(r.count, WARPS * 32 / LANES));
    return ac_cuda_launch(lane, "layer_norm", layer_norm_kernel<T, LANES, LOADS>, grid,
                          32 * WARPS, 0, r);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const rows &r)
{
    int vectors = r.columns / ac_wide<T>;
    return vectors <= 8 * FEW    ? launch_loads<T, 8, 1>(lane, r, (int)ac_ceil_div(vectors, 8))
           : vectors <= 16 * FEW ? launch_loads<T, 16, 3>(lane, r, (int)ac_ceil_div(vectors, 16))
                                 : launch_loads<T, 32, 3>(lane, r, (int)ac_ceil_div(vectors, 32));
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
