/* phase_weight: w [o, i, 3, 3] to [4, o, i, 2, 2], the four filters of up_conv2d.
 *
 * After nearest-2x, two of three taps fall on the same source pixel: at even positions the last
 * two, at odd ones the first two.  Rows and columns alike; the sums are rounded once.  Runs once,
 * when weights are derived. */
#include "element.cuh"
#include "list.h"

struct filters {
    ac_cells y, w;
    int64_t y_stride[5], w_stride[4];
    int64_t count, outputs, inputs;
};

/* Which of the two taps of a phase takes the 3-tap filter's element `k`. */
__device__ static inline int64_t
tap(int64_t odd, int64_t k)
{
    return odd ? k == 2 : k > 0;
}

__global__ static void
phase_weight_kernel(filters f)
{
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= f.count) {
        return;
    }
    int64_t u = at % 2, t = at / 2 % 2, i = at / 4 % f.inputs;
    int64_t o = at / 4 / f.inputs % f.outputs, phase = at / 4 / f.inputs / f.outputs;
    float sum = 0.0f;
    for (int64_t ky = 0; ky < 3; ky++) {
        for (int64_t kx = 0; kx < 3; kx++) {
            if (tap(phase / 2, ky) == t && tap(phase % 2, kx) == u) {
                sum += ac_load(f.w, o * f.w_stride[0] + i * f.w_stride[1] + ky * f.w_stride[2] +
                                        kx * f.w_stride[3]);
            }
        }
    }
    ac_store(f.y, phase * f.y_stride[0] + o * f.y_stride[1] + i * f.y_stride[2] +
                      t * f.y_stride[3] + u * f.y_stride[4], sum);
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    return ac_cuda_float(p->output.dtype) && ac_cuda_float(p->input[0].dtype);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    const ac_tensor *w = &p->input[0], *y = &p->output;
    filters f = {.y = ac_cells_of(y),
                 .w = ac_cells_of(w),
                 .count = ac_tensor_count(y),
                 .outputs = w->shape.dim[0],
                 .inputs = w->shape.dim[1]};
    for (int i = 0; i < 5; i++) {
        f.y_stride[i] = y->stride[i];
        f.w_stride[i % 4] = w->stride[i % 4];
    }
    dim3 grid((unsigned)ac_ceil_div(f.count, AC_THREADS));
    return ac_cuda_launch(lane, "phase_weight", phase_weight_kernel, grid, AC_THREADS, 0, f);
}

extern "C" const ac_kernel ac_cuda_phase_weight = {
    .name = "cuda.phase_weight",
    .op = AC_OP_PHASE_WEIGHT,
    .supports = supports,
    .launch = launch,
};
