/* add: c = a + b, contiguous, one float dtype; b of a's shape or [n, c] broadcast between. */
#include "elementwise.cuh"
#include "list.h"

/* Element i of a pairs with b[i / image * image_step + i % channels]. */
template <typename T>
__global__ static void
add_kernel(T *y, const T *a, const T *b, int64_t count, int64_t image, int64_t channels,
           int64_t image_step)
{
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        int64_t k = channels ? i / image * image_step + i % channels : i;
        y[i] = (T)((float)a[i] + (float)b[k]);
    }
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    const ac_tensor *a = &p->input[0], *b = &p->input[1];
    return ac_cuda_float(p->output.dtype) && a->dtype == p->output.dtype &&
           b->dtype == a->dtype && ac_tensor_is_contiguous(a) && ac_tensor_is_contiguous(b) &&
           ac_tensor_is_contiguous(&p->output);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_shape *a = &p->input[0].shape, *b = &p->input[1].shape;
    int64_t count = ac_tensor_count(&p->output), images = a->dim[0];
    int64_t channels = ac_shape_equal(a, b) ? 0 : b->dim[b->rank - 1];
    int64_t step = b->dim[0] == 1 ? 0 : channels;
    return ac_cuda_by_dtype(p->output.dtype, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        add_kernel<T><<<ac_cuda_blocks(count), AC_THREADS, 0, lane->stream>>>(
            (T *)p->output.data, (const T *)p->input[0].data, (const T *)p->input[1].data, count,
            count / images, channels, step);
        return AC_CUDA_LAUNCHED("add_kernel");
    });
}

extern "C" const ac_kernel ac_cuda_add = {
    .name = "cuda.add",
    .op = AC_OP_ADD,
    .supports = supports,
    .launch = launch,
};
