/* linear: y = act([x|x2] w^T + b) + residual, or value * act(gate) + residual; see gemm.h. */
#include "gemm.h"
#include "list.h"

static bool
supports_plain(const ac_problem *p, const ac_caps *)
{
    ac_gemm g;
    return ac_gemm_of(p, &g);
}

static ac_status
launch_plain(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    ac_gemm g;
    ac_gemm_of(p, &g);
    return ac_cuda_gemm_plain(lane, &g);
}

static bool
supports_mma(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    return ac_gemm_of(p, &g) && ac_gemm_mma_fits(&g, caps->isa);
}

/* Addresses are not known at plan time: a slice may begin where 16-byte loads cannot. */
static ac_status
launch_mma(ac_lane *lane, const ac_problem *p, void *, const void *)
{
    ac_gemm g;
    ac_gemm_of(p, &g);
    return ac_gemm_mma_aligned(&g) ? ac_cuda_gemm_mma(lane, &g) : ac_cuda_gemm_plain(lane, &g);
}

extern "C" const ac_kernel ac_cuda_linear_mma = {
    .name = "cuda.linear.mma",
    .op = AC_OP_LINEAR,
    .supports = supports_mma,
    .launch = launch_mma,
};

extern "C" const ac_kernel ac_cuda_linear_plain = {
    .name = "cuda.linear.plain",
    .op = AC_OP_LINEAR,
    .supports = supports_plain,
    .launch = launch_plain,
};
