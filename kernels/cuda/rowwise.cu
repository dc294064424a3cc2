/* rowwise: see rowwise.h.  A thread makes 16 bytes.  Bound: memory. */
#include "element.cuh"
#include "rowwise.h"

template <typename T>
__device__ static inline float
to_float(T x)
{
    return (float)x;
}

/* x Phi(x), to 2e-6, or 2e-5 of a result above -5: far below what f16 and bf16 show.  log2 Phi(-a)
 * is smooth, so a polynomial and one exponential do where erff takes three times as long. */
__device__ static inline float
gelu_short(float x)
{
    float a = fabsf(x), p = -1.34383140e-6f;
    p = fmaf(p, a, 5.08242410e-5f);
    p = fmaf(p, a, -8.38365871e-4f);
    p = fmaf(p, a, 8.11824761e-3f);
    p = fmaf(p, a, -5.31124994e-2f);
    p = fmaf(p, a, -4.59352106e-1f);
    p = fmaf(p, a, -1.15089142f);
    p = fmaf(p, a, -1.00002193f);
    float tail = ac_exp2_fast(p);
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

/* ACT is AC_ACT_NONE where it is looked up as the kernel runs. */
template <typename T, int ACT>
__device__ static inline float
activate(ac_act act, float x)
{
    if constexpr (ACT == AC_ACT_GELU) {
        return gelu_short(x);
    } else if constexpr (ACT == AC_ACT_SILU) {
        return __fdividef(x, 1.0f + __expf(-x));
    } else if constexpr (ACT == AC_ACT_QUICK_GELU) {
        return __fdividef(x, 1.0f + __expf(-1.702f * x));
    } else {
        return ac_act_apply(act, x);
    }
}

template <typename T, bool GATED, int ACT>
__global__ static void __launch_bounds__(AC_THREADS)
rowwise_kernel(ac_rowwise r, uint32_t groups, uint32_t count)
{
    constexpr int N = 16 / sizeof(T);
    uint32_t i = blockIdx.x * AC_THREADS + threadIdx.x;
    if (i >= count) {
        return;
    }
    int64_t row = i / groups, column = (int64_t)(i % groups) * N;
    const T *from = (const T *)r.from + row * r.from_row + column;
    alignas(16) T value[N], gate[N], out[N];
    *(uint4 *)value = *(const uint4 *)from;
    if (GATED) {
        *(uint4 *)gate = *(const uint4 *)(from + r.columns);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        float v = to_float(value[k]);
        out[k] = (T)(GATED ? v * activate<T, ACT>(r.act, to_float(gate[k]))
                           : activate<T, ACT>(r.act, v));
    }
    *(uint4 *)((T *)r.to + row * r.to_row + column) = *(const uint4 *)out;
}

bool
ac_rowwise_fits(const ac_rowwise *r)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(r->dtype);
    return ac_cuda_float(r->dtype) && r->columns % unit == 0 && r->to_row % unit == 0 &&
           r->from_row % unit == 0 && (uintptr_t)r->to % 16 == 0 && (uintptr_t)r->from % 16 == 0 &&
           r->rows * (r->columns / unit) <= INT32_MAX;
}

template <typename T, int ACT>
static ac_status
launch_act(ac_lane *lane, const ac_rowwise *r, bool gated)
{
    uint32_t groups = (uint32_t)(r->columns * (int64_t)sizeof(T) / 16);
    uint32_t count = (uint32_t)r->rows * groups;
    dim3 grid((unsigned)ac_ceil_div(count, AC_THREADS));
    return gated ? ac_cuda_launch(lane, "gate", rowwise_kernel<T, true, ACT>, grid, AC_THREADS, 0,
                                  *r, groups, count)
                 : ac_cuda_launch(lane, "activation", rowwise_kernel<T, false, ACT>, grid,
                                  AC_THREADS, 0, *r, groups, count);
}

/* The short forms are for halves. */
template <typename T>
static ac_status
launch(ac_lane *lane, const ac_rowwise *r, bool gated)
{
    if constexpr (sizeof(T) == 2) {
        switch (r->act) {
        case AC_ACT_GELU:
            return launch_act<T, AC_ACT_GELU>(lane, r, gated);
        case AC_ACT_SILU:
            return launch_act<T, AC_ACT_SILU>(lane, r, gated);
        case AC_ACT_QUICK_GELU:
            return launch_act<T, AC_ACT_QUICK_GELU>(lane, r, gated);
        default:
            break;
        }
    }
    return launch_act<T, AC_ACT_NONE>(lane, r, gated);
}

static ac_status
launch_dtype(ac_lane *lane, const ac_rowwise *r, bool gated)
{
    return r->dtype == AC_F32   ? launch<float>(lane, r, gated)
           : r->dtype == AC_F16 ? launch<__half>(lane, r, gated)
                                : launch<__nv_bfloat16>(lane, r, gated);
}

ac_status
ac_cuda_act_rows(ac_lane *lane, const ac_rowwise *r)
{
    return launch_dtype(lane, r, false);
}

ac_status
ac_cuda_gate_rows(ac_lane *lane, const ac_rowwise *r)
{
    return launch_dtype(lane, r, true);
}

/* ---- two side by side ------------------------------------------------------------------------ */

/* Counts and distances of 16 bytes. */
__global__ static void __launch_bounds__(AC_THREADS)
join_kernel(uint4 *to, const uint4 *a, const uint4 *b, uint32_t a_row, uint32_t b_row,
            uint32_t a_count, uint32_t row, uint32_t count)
{
    uint32_t i = blockIdx.x * AC_THREADS + threadIdx.x;
    if (i < count) {
        uint32_t line = i / row, at = i - line * row;
        bool first = at < a_count;
        to[i] = first ? a[(size_t)line * a_row + at] : b[(size_t)line * b_row + at - a_count];
    }
}

ac_status
ac_cuda_join_rows(ac_lane *lane, const ac_join_rows *r)
{
    int64_t unit = 16 / (int64_t)ac_dtype_size(r->dtype);
    uint32_t a = (uint32_t)(r->columns[0] / unit), row = a + (uint32_t)(r->columns[1] / unit);
    uint32_t count = (uint32_t)r->rows * row;
    return ac_cuda_launch(lane, "join", join_kernel, dim3((unsigned)ac_ceil_div(count, AC_THREADS)),
                          AC_THREADS, 0, (uint4 *)r->to, (const uint4 *)r->from[0],
                          (const uint4 *)r->from[1], (uint32_t)(r->from_row[0] / unit),
                          (uint32_t)(r->from_row[1] / unit), a, row, count);
}
