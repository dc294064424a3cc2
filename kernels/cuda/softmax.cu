/* softmax: rows of f32 scores to shares in f16, bf16 or f32 (in place, too), times a gain.
 *
 * A block takes a row and keeps it in registers, so each score is read once.  Shares of 16384 keys
 * would be subnormal in f16: the gain lifts them, and the product that follows takes it back.
 * Bound: memory. */
#include "attention.h"
#include "element.cuh"
#include "reduce.cuh"

/* FOURS times four scores a thread. */
template <typename T, int FOURS>
__global__ static void __launch_bounds__(AC_THREADS)
softmax_rows_kernel(ac_softmax s)
{
    __shared__ float shared[2][AC_THREADS / 32];
    const float *line = s.scores + (int64_t)blockIdx.x * s.pitch;
    T *out = (T *)s.out + (int64_t)blockIdx.x * s.pitch;
    float v[FOURS][4], most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        int64_t at = ((int64_t)i * AC_THREADS + threadIdx.x) * 4;
        float4 four = at < s.pitch ? *(const float4 *)(line + at) : make_float4(0, 0, 0, 0);
        v[i][0] = at < s.columns ? four.x * s.factor : -INFINITY;
        v[i][1] = at + 1 < s.columns ? four.y * s.factor : -INFINITY;
        v[i][2] = at + 2 < s.columns ? four.z * s.factor : -INFINITY;
        v[i][3] = at + 3 < s.columns ? four.w * s.factor : -INFINITY;
        most = fmaxf(most, fmaxf(fmaxf(v[i][0], v[i][1]), fmaxf(v[i][2], v[i][3])));
    }
    most = ac_reduce_block(most, shared[0], ac_most_of());
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            v[i][e] = exp2f(v[i][e] - most);
            sum += v[i][e];
        }
    }
    sum = ac_reduce_block(sum, shared[1], ac_sum_of());
    float share = s.gain / sum;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        int64_t at = ((int64_t)i * AC_THREADS + threadIdx.x) * 4;
        if (at < s.pitch) {
            using vector = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
            alignas(16) T four[4] = {(T)(v[i][0] * share), (T)(v[i][1] * share),
                                     (T)(v[i][2] * share), (T)(v[i][3] * share)};
            *(vector *)(out + at) = *(const vector *)four;
        }
    }
}

template <typename T>
static ac_status
launch(ac_lane *lane, const ac_softmax *s)
{
    dim3 grid((unsigned)s->rows);
    return s->pitch <= 1024
               ? ac_cuda_launch(lane, "softmax", softmax_rows_kernel<T, 1>, grid, AC_THREADS, 0, *s)
           : s->pitch <= 4096
               ? ac_cuda_launch(lane, "softmax", softmax_rows_kernel<T, 4>, grid, AC_THREADS, 0, *s)
               : ac_cuda_launch(lane, "softmax", softmax_rows_kernel<T, 16>, grid, AC_THREADS, 0,
                                *s);
}

ac_status
ac_cuda_softmax(ac_lane *lane, const ac_softmax *s)
{
    ac_softmax scaled = *s;
    scaled.factor *= 1.4426950408889634f; /* powers of two */
    return s->dtype == AC_F32   ? launch<float>(lane, &scaled)
           : s->dtype == AC_F16 ? launch<__half>(lane, &scaled)
                                : launch<__nv_bfloat16>(lane, &scaled);
}
