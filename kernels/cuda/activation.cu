/* activation: y = act(x), contiguous, x and y of one float dtype; arithmetic in f32. */
#include "elementwise.cuh"
#include "list.h"

__device__ static float
apply(ac_act act, float x)
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
        return fmaxf(x, 0.0f);
    default:
        return x;
    }
}

template <typename T>
__global__ static void
activation_kernel(T *y, const T *x, int64_t count, ac_act act)
{
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        y[i] = (T)apply(act, (float)x[i]);
    }
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && p->input[0].dtype == p->output.dtype &&
           ac_tensor_is_contiguous(&p->input[0]) && ac_tensor_is_contiguous(&p->output);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    int64_t count = ac_tensor_count(&p->output);
    return ac_cuda_by_dtype(p->output.dtype, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        activation_kernel<T><<<ac_cuda_blocks(count), AC_THREADS, 0, lane->stream>>>(
            (T *)p->output.data, (const T *)p->input[0].data, count, p->attr.activation.act);
        return AC_CUDA_LAUNCHED("activation_kernel");
    });
}

extern "C" const ac_kernel ac_cuda_activation = {
    .name = "cuda.activation",
    .op = AC_OP_ACTIVATION,
    .supports = supports,
    .launch = launch,
};
