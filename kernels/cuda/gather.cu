/* gather: the pixels under a convolution's taps as rows; see blas_conv.h.  A block makes a row, 16
 * bytes a thread and turn.  Bound: memory. */
#include "blas_conv.h"
#include "launch.cuh"

/* Everything in units of 16 bytes. */
struct rows {
    const uint4 *__restrict__ x;
    uint4 *__restrict__ to;
    int64_t first;
    uint32_t groups, row; /* of a pixel, of a row */
    uint32_t height, width, out_height, out_width;
    int32_t kernel_w, stride, pad_top, pad_left;
};

__global__ static void __launch_bounds__(AC_THREADS)
gather_kernel(rows r)
{
    int64_t pixel = r.first + blockIdx.x;
    uint32_t line = (uint32_t)(pixel / r.out_width), n = line / r.out_height;
    int32_t x = (int32_t)(pixel - (int64_t)line * r.out_width) * r.stride - r.pad_left;
    int32_t y = (int32_t)(line - n * r.out_height) * r.stride - r.pad_top;
    const uint4 *image = r.x + (int64_t)n * r.height * r.width * r.groups;
    uint4 *to = r.to + (int64_t)blockIdx.x * r.row;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < r.row; i += blockDim.x) {
        uint32_t tap = i / r.groups, group = i - tap * r.groups;
        int32_t at_y = y + (int32_t)(tap / (uint32_t)r.kernel_w);
        int32_t at_x = x + (int32_t)(tap % (uint32_t)r.kernel_w);
        bool inside = (uint32_t)at_y < r.height && (uint32_t)at_x < r.width;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (inside) {
            value = __ldg(image + ((int64_t)at_y * r.width + at_x) * r.groups + group);
        }
        to[i] = value;
    }
}

ac_status
ac_cuda_gather(ac_lane *lane, const ac_blas_conv *c, int64_t first, int64_t count, void *to)
{
    uint32_t groups = (uint32_t)(c->c_in * (int64_t)ac_dtype_size(c->dtype) / 16);
    rows r = {(const uint4 *)c->x, (uint4 *)to, first, groups,
              groups * (uint32_t)(c->kernel_h * c->kernel_w), (uint32_t)c->height,
              (uint32_t)c->width, (uint32_t)c->out_height, (uint32_t)c->out_width, c->kernel_w,
              c->stride, c->pad_top, c->pad_left};
    unsigned threads = AC_MIN(AC_THREADS, (r.row + 31) / 32 * 32);
    return ac_cuda_launch(lane, "gather", gather_kernel, dim3((unsigned)count), threads, 0, r);
}
