/* interleave: see interleave.h.  A thread moves 16 bytes.  Bound: memory. */
#include "element.cuh"
#include "interleave.h"

__global__ static void __launch_bounds__(AC_THREADS)
interleave_kernel(ac_interleave i, uint32_t groups, int64_t count)
{
    int64_t at = (int64_t)blockIdx.x * AC_THREADS + threadIdx.x;
    if (at >= count) {
        return;
    }
    uint32_t group = (uint32_t)(at % groups);
    int64_t pixel = at / groups;
    uint32_t x = (uint32_t)(pixel % (2 * i.width));
    int64_t line = pixel / (2 * i.width);
    uint32_t y = (uint32_t)(line % (2 * i.height));
    int64_t n = line / (2 * i.height);
    uint32_t a = y % 2, b = x % 2;
    int64_t row = (n * (i.height + 1) + y / 2 + a) * (i.width + 1) + x / 2 + b;
    ((uint4 *)i.to)[at] = ((const uint4 *)i.from)[(row * 4 + 2 * a + b) * groups + group];
}

ac_status
ac_cuda_interleave(ac_lane *lane, const ac_interleave *i)
{
    int64_t groups = i->channels * (int64_t)ac_dtype_size(i->dtype) / 16; /* of 16 bytes, a pixel */
    int64_t count = i->images * 4 * i->height * i->width * groups;
    dim3 grid((unsigned)ac_ceil_div(count, AC_THREADS));
    return ac_cuda_launch(lane, "interleave", interleave_kernel, grid, AC_THREADS, 0, *i,
                          (uint32_t)groups, count);
}

__global__ static void __launch_bounds__(AC_THREADS)
repeat_kernel(ac_cells to, ac_cells from, int64_t count, int64_t all)
{
    int64_t at = (int64_t)blockIdx.x * AC_THREADS + threadIdx.x;
    if (at < all) {
        ac_store(to, at, ac_load(from, at % count));
    }
}

ac_status
ac_cuda_repeat(ac_lane *lane, void *to, const void *from, int64_t count, int32_t times,
               ac_dtype dtype)
{
    dim3 grid((unsigned)ac_ceil_div(count * times, AC_THREADS));
    return ac_cuda_launch(lane, "repeat", repeat_kernel, grid, AC_THREADS, 0, ac_cells{to, dtype},
                          ac_cells{(void *)from, dtype}, count, count * times);
}
