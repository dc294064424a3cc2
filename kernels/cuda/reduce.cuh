/* reduce: sums, maxima and moments over the threads of a warp or a block, in a fixed order. */
#ifndef AC_CUDA_REDUCE_CUH
#define AC_CUDA_REDUCE_CUH

#include "launch.cuh"

template <typename V, typename F>
__device__ static inline V
ac_reduce_warp(V v, F f)
{
    for (int step = 16; step > 0; step /= 2) {
        v = f(v, __shfl_xor_sync(0xffffffffu, v, step));
    }
    return v;
}

/* Of a block of AC_THREADS; `shared` holds one value a warp and is not used again after. */
template <typename F>
__device__ static inline float
ac_reduce_block(float v, float *shared, F f)
{
    v = ac_reduce_warp(v, f);
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = v;
    }
    __syncthreads();
    v = shared[0];
    for (int i = 1; i < (int)AC_THREADS / 32; i++) {
        v = f(v, shared[i]);
    }
    return v;
}

struct ac_sum_of {
    template <typename V>
    __device__ V
    operator()(V a, V b) const
    {
        return a + b;
    }
};

struct ac_most_of {
    __device__ float
    operator()(float a, float b) const
    {
        return fmaxf(a, b);
    }
};

/* Moments: count, mean, sum of squares around it; of none all are 0 (Chan et al. 1979). */
__device__ static inline float3
ac_moments_merge(float3 a, float3 b)
{
    if (b.x == 0.0f) {
        return a;
    }
    if (a.x == 0.0f) {
        return b;
    }
    float n = a.x + b.x, d = b.y - a.y, share = b.x / n;
    return make_float3(n, a.y + d * share, a.z + b.z + d * d * a.x * share);
}

/* What moments of T are summed in: of a double's digits enough are left where the pivot is an
 * outlier, which costs a half none that it has. */
template <typename T> using ac_moments_type = std::conditional_t<sizeof(T) == 4, double, float>;

__device__ static inline float
ac_quotient(float a, float b)
{
    return __fdividef(a, b);
}

__device__ static inline double
ac_quotient(double a, double b)
{
    return a / b;
}

/* The same of many, around a pivot near their means: sums alone, where a chain of merges is one
 * division after the other. */
template <typename S> struct ac_moments_sum {
    S pivot, count, sum, squares; /* all lanes' pivot is the same */

    __device__ explicit ac_moments_sum(float near) : pivot(near), count(0), sum(0), squares(0) {}

    __device__ void
    add(float n, float mean, float around)
    {
        S d = (S)mean - pivot, part = (S)n * d;
        count += (S)n;
        sum += part;
        squares += (S)around + part * d;
    }

    /* Every lane's result is the warp's. */
    __device__ float3
    warp() const
    {
        S n = ac_reduce_warp(count, ac_sum_of()), s = ac_reduce_warp(sum, ac_sum_of());
        S q = ac_reduce_warp(squares, ac_sum_of()), mean = n > (S)0 ? ac_quotient(s, n) : (S)0;
        return make_float3((float)n, (float)(pivot + mean), fmaxf((float)(q - s * mean), 0.0f));
    }
};

/* Lane 0's result is the warp's. */
__device__ static inline float3
ac_moments_warp(float3 a)
{
    for (int step = 16; step > 0; step /= 2) {
        a = ac_moments_merge(a, make_float3(__shfl_down_sync(0xffffffffu, a.x, step),
                                            __shfl_down_sync(0xffffffffu, a.y, step),
                                            __shfl_down_sync(0xffffffffu, a.z, step)));
    }
    return a;
}

#endif
