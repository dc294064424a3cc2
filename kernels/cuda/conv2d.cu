/* conv2d, up_conv2d: implicit GEMMs over NHWC; see gemm.h.
 *
 * The tensor-core kernel reads weights as [c_out, kh, kw, c_in] (up_conv2d: four of them), so that
 * a slice of k is contiguous: a derived weight, made once from PyTorch's [c_out, c_in, kh, kw]. */
#include "element.cuh"
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

/* ---- with packed weights --------------------------------------------------------------------- */

/* [o, i, kh, kw] as [o, kh, kw, i], a leading phase dimension kept. */
static ac_tensor
packed_weight(const ac_tensor *w, void *data)
{
    int32_t up = w->shape.rank - 4;
    const int64_t *d = w->shape.dim + up;
    ac_shape shape = {w->shape.rank, {}};
    shape.dim[0] = w->shape.dim[0];
    const int64_t packed[4] = {d[0], d[2], d[3], d[1]};
    for (int i = 0; i < 4; i++) {
        shape.dim[up + i] = packed[i];
    }
    return ac_tensor_of(data, w->dtype, shape);
}

/* A 1x1 filter has its channels side by side as it is. */
static bool
is_packed(const ac_tensor *w)
{
    return w->shape.rank == 4 && w->shape.dim[2] == 1 && w->shape.dim[3] == 1;
}

bool
ac_conv_gemm(const ac_problem *p, const void *prepared, ac_gemm *g)
{
    if (!ac_gemm_of(p, g)) {
        return false;
    }
    const ac_tensor *w = &p->input[AC_CONV_W];
    ac_tensor packed = packed_weight(w, (void *)prepared);
    const int64_t *s = packed.stride + (w->shape.rank - 4);
    if (is_packed(w)) {
        return true;
    }
    g->weight = prepared;
    g->w_row = s[0];
    g->w_y = s[1];
    g->w_x = s[2];
    g->w_c = 1;
    if (w->shape.rank == 5) {
        g->w_batch[0] = 2 * packed.stride[0];
        g->w_batch[1] = packed.stride[0];
    }
    return true;
}

bool
ac_conv_gemm_at_launch(const ac_problem *p, const void *prepared, ac_gemm *g)
{
    if (!prepared && !is_packed(&p->input[AC_CONV_W])) {
        ac_gemm_of(p, g);
        return false;
    }
    return ac_conv_gemm(p, prepared, g);
}

static bool
supports_mma(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    return ac_conv_gemm(p, NULL, &g) && ac_gemm_mma_fits(&g, caps->isa);
}

size_t
ac_conv_prepared_bytes(const ac_problem *p, const ac_caps *)
{
    const ac_tensor *w = &p->input[AC_CONV_W];
    return is_packed(w) ? 0 : ac_tensor_bytes(w);
}

ac_status
ac_conv_prepare(ac_lane *lane, const ac_problem *p, void *prepared)
{
    const ac_tensor *w = &p->input[AC_CONV_W];
    int32_t up = w->shape.rank - 4;
    static const int order[4] = {0, 2, 3, 1}; /* of w's dimensions in the packed one */
    ac_tensor to = packed_weight(w, prepared), from = *w;
    from.shape = to.shape;
    for (int i = 0; i < 4; i++) {
        from.stride[up + i] = w->stride[up + order[i]];
    }
    return ac_cuda_copy(lane, &to, &from);
}

static ac_status
launch_mma(ac_lane *lane, const ac_problem *p, void *, const void *prepared)
{
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(p, prepared, &g)) {
        return ac_cuda_gemm_plain(lane, &g);
    }
    return ac_gemm_mma_aligned(&g) ? ac_cuda_gemm_mma(lane, &g) : ac_cuda_gemm_plain(lane, &g);
}

#define CONV(symbol, text, OP)                                                                     \
    extern "C" const ac_kernel symbol##_mma = {                                                    \
        .name = text ".mma",                                                                       \
        .op = OP,                                                                                  \
        .supports = supports_mma,                                                                  \
        .prepared_bytes = ac_conv_prepared_bytes,                                                  \
        .prepare = ac_conv_prepare,                                                                \
        .form = AC_FORM_OHWI,                                                                      \
        .launch = launch_mma,                                                                      \
    };                                                                                             \
    extern "C" const ac_kernel symbol##_plain = {                                                  \
        .name = text ".plain",                                                                     \
        .op = OP,                                                                                  \
        .supports = supports_plain,                                                                \
        .launch = launch_plain,                                                                    \
    }

CONV(ac_cuda_conv2d, "cuda.conv2d", AC_OP_CONV2D);
CONV(ac_cuda_up_conv2d, "cuda.up_conv2d", AC_OP_UP_CONV2D);
