/* scale: y = x * scale + offset, contiguous, x and y of one float dtype; arithmetic in f32. */
#include "elementwise.cuh"
#include "list.h"

template <typename T>
__global__ static void
scale_kernel(T *y, const T *x, int64_t count, float scale, float offset)
{
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        y[i] = (T)((float)x[i] * scale + offset);
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
        scale_kernel<T><<<ac_cuda_blocks(count), AC_THREADS, 0, lane->stream>>>(
            (T *)p->output.data, (const T *)p->input[0].data, count, p->attr.scale.scale,
            p->attr.scale.offset);
        return AC_CUDA_LAUNCHED("scale_kernel");
    });
}

extern "C" const ac_kernel ac_cuda_scale = {
    .name = "cuda.scale",
    .op = AC_OP_SCALE,
    .supports = supports,
    .launch = launch,
};
