/* conv2d, 3x3, to eight channels at most: the last convolution of a UNet, of a VAE's halves.  See
 * conv2d_narrow.cuh. */
#include "conv2d_narrow.cuh"
#include "list.h"

__device__ static inline void
write(const ac_gemm &g, int64_t y, int64_t x, int o, float v)
{
    int64_t n = blockIdx.z;
    const ac_gemm_image &r = g.residual, &to = g.out;
    if (r.data) {
        v += ac_load(r.data, r.dtype, n * r.n + y * r.h + x * r.w + o * r.c);
    }
    ac_store(ac_cells{(void *)to.data, to.dtype}, n * to.n + y * to.h + x * to.w + o * to.c, v);
}

template <typename T, int LINES>
__global__ static void __launch_bounds__(THREADS)
narrow_kernel(const __grid_constant__ ac_gemm g)
{
    extern __shared__ uint4 shared[];
    float sum[LINES][4];
    ac_narrow_sums<T, LINES>(g, shared, sum);
#pragma unroll
    for (int i = 0; i < LINES * 4; i++) {
        ac_narrow_place<LINES> at(i);
        if (at.inside(g)) {
            write(g, at.y, at.x, at.o, sum[i / 4][i % 4]);
        }
    }
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    return ac_conv_gemm(p, NULL, &g) && ac_narrow_fits(g, caps->isa);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *prepared)
{
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(p, prepared, &g) || !ac_narrow_aligned(g)) {
        return ac_cuda_gemm_plain(lane, &g);
    }
    return ac_narrow_choose(g, [&]<typename T, int LINES>() {
        return ac_cuda_launch(lane, "conv2d narrow", narrow_kernel<T, LINES>,
                              ac_narrow_grid<LINES>(g), THREADS, ac_narrow_tile<LINES>::BYTES, g);
    });
}

extern "C" const ac_kernel ac_cuda_conv2d_narrow = {
    .name = "cuda.conv2d.narrow",
    .op = AC_OP_CONV2D,
    .supports = supports,
    .prepared_bytes = ac_conv_prepared_bytes,
    .prepare = ac_conv_prepare,
    .form = AC_FORM_OHWI,
    .launch = launch,
};
