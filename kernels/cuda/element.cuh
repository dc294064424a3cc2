/* element: one element in any dtype, activations, and walks over strided operands.
 *
 * The kernels built on this are the list's last resort: any dtype, any strides, one element a
 * thread and the dtype looked up as they run (a branch that all threads take alike). */
#ifndef AC_CUDA_ELEMENT_CUH
#define AC_CUDA_ELEMENT_CUH

#include "launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* An address and its dtype: what is left of a tensor once strides are in a walk. */
struct ac_cells {
    void *data;
    ac_dtype dtype;
};

static inline ac_cells
ac_cells_of(const ac_tensor *t)
{
    return t ? ac_cells{t->data, t->dtype} : ac_cells{nullptr, AC_F32};
}

__device__ static inline float
ac_load(const void *data, ac_dtype dtype, int64_t at)
{
    switch (dtype) {
    case AC_F32:
        return ((const float *)data)[at];
    case AC_F16:
        return __half2float(((const __half *)data)[at]);
    case AC_BF16:
        return __bfloat162float(((const __nv_bfloat16 *)data)[at]);
    case AC_F64:
        return (float)((const double *)data)[at];
    default:
        return 0.0f;
    }
}

__device__ static inline float
ac_load(ac_cells c, int64_t at)
{
    return ac_load(c.data, c.dtype, at);
}

__device__ static inline void
ac_store(ac_cells c, int64_t at, float value)
{
    switch (c.dtype) {
    case AC_F32:
        ((float *)c.data)[at] = value;
        break;
    case AC_F16:
        ((__half *)c.data)[at] = __float2half(value);
        break;
    case AC_BF16:
        ((__nv_bfloat16 *)c.data)[at] = __float2bfloat16(value);
        break;
    case AC_F64:
        ((double *)c.data)[at] = value;
        break;
    default:
        break;
    }
}

__device__ static inline int64_t
ac_load_id(ac_cells c, int64_t at)
{
    switch (c.dtype) {
    case AC_I64:
        return ((const int64_t *)c.data)[at];
    case AC_I32:
        return ((const int32_t *)c.data)[at];
    case AC_I16:
        return ((const int16_t *)c.data)[at];
    case AC_I8:
        return ((const int8_t *)c.data)[at];
    case AC_U8:
    case AC_BOOL:
        return ((const uint8_t *)c.data)[at];
    default:
        return (int64_t)ac_load(c, at);
    }
}

__device__ static inline float
ac_act_apply(ac_act act, float x)
{
    switch (act) {
    case AC_ACT_SILU:
        return x / (1.0f + expf(-x));
    case AC_ACT_GELU:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case AC_ACT_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case AC_ACT_QUICK_GELU:
        return x / (1.0f + expf(-1.702f * x));
    case AC_ACT_RELU:
        return x < 0.0f ? 0.0f : x; /* keeps NaN */
    default:
        return x;
    }
}

/* 2^x in one instruction, to two ulps; 0 below 2^-126. */
__device__ static inline float
ac_exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static inline bool
ac_cuda_float(ac_dtype dtype)
{
    return dtype == AC_F32 || dtype == AC_F16 || dtype == AC_BF16;
}

/* ---- walks ----------------------------------------------------------------------------------- */

/* The output's dimensions with the strides of up to four operands, those of no effect merged:
 * contiguous operands are one dimension. */
struct ac_walk {
    int64_t count;
    int32_t rank;
    int64_t dim[AC_MAX_RANK];
    int64_t stride[4][AC_MAX_RANK]; /* elements; 0: broadcast */
};

static inline ac_walk
ac_walk_of(const ac_shape *shape, int32_t operands, const int64_t *const *stride)
{
    ac_walk w = {.count = ac_shape_count(shape)};
    for (int32_t d = 0; d < shape->rank; d++) {
        if (shape->dim[d] == 1) {
            continue;
        }
        bool merge = w.rank > 0;
        for (int32_t k = 0; merge && k < operands; k++) {
            merge = w.stride[k][w.rank - 1] == stride[k][d] * shape->dim[d];
        }
        if (!merge) {
            w.dim[w.rank++] = 1;
        }
        w.dim[w.rank - 1] *= shape->dim[d];
        for (int32_t k = 0; k < operands; k++) {
            w.stride[k][w.rank - 1] = stride[k][d];
        }
    }
    return w;
}

/* Where element i of the walk is in each of N operands. */
template <int N>
__device__ static inline void
ac_walk_at(const ac_walk &w, int64_t i, int64_t (&at)[N])
{
    for (int k = 0; k < N; k++) {
        at[k] = 0;
    }
    for (int32_t d = w.rank - 1; d >= 0; d--) {
        int64_t index = i;
        if (d > 0 && w.count <= INT32_MAX) { /* a 64-bit division is some 100 instructions */
            index = (uint32_t)i % (uint32_t)w.dim[d];
            i = (uint32_t)i / (uint32_t)w.dim[d];
        } else if (d > 0) {
            index = i % w.dim[d];
            i /= w.dim[d];
        }
        for (int k = 0; k < N; k++) {
            at[k] += index * w.stride[k][d];
        }
    }
}

template <int N, typename F>
__global__ static void
ac_each_kernel(ac_walk w, F f)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < w.count; i += step) {
        int64_t at[N];
        ac_walk_at(w, i, at);
        f(at);
    }
}

/* f(at) for every element, at[k] where it is in operand k. */
template <int N, typename F>
static ac_status
ac_cuda_each(ac_lane *lane, const char *name, const ac_walk &w, F f)
{
    int64_t blocks = ac_ceil_div(w.count, AC_THREADS);
    dim3 grid((unsigned)AC_MIN(blocks, (int64_t)1 << 20));
    return ac_cuda_launch(lane, name, ac_each_kernel<N, F>, grid, AC_THREADS, 0, w, f);
}

/* Copies src into dst, which have the same shape,
 * converting on the way; fills a float tensor.  Both in copy.cu. */
ac_status ac_cuda_copy(ac_lane *lane, const ac_tensor *dst, const ac_tensor *src);
ac_status ac_cuda_fill_tensor(ac_lane *lane, const ac_tensor *dst, float value);

#endif
