/* gemm: problems as ac_gemm, and the plain kernel, which takes all of them.
 *
 * Plain: a block makes 64 rows by 64 columns, a thread 4 by 4, over slices of 16 k that lie in
 * shared memory as f32.  Bound: f32 multiply-adds; index arithmetic of the loads costs a third. */
#include "element.cuh"
#include "gemm.h"

/* ---- the description ------------------------------------------------------------------------- */

/* At plan time there is none yet, but the operand is. */
static const void *
address(const ac_tensor *t)
{
    return t->data ? t->data : "";
}

static ac_gemm_image
image_of(const ac_tensor *t)
{
    ac_gemm_image i = {};
    if (t) {
        i.data = address(t);
        i.dtype = t->dtype;
        i.n = t->stride[0];
        i.h = t->stride[1];
        i.w = t->stride[2];
        i.c = t->stride[3];
    }
    return i;
}

static void
set_bias(ac_gemm *g, const ac_tensor *b)
{
    g->bias = b ? address(b) : NULL;
    g->bias_dtype = b ? b->dtype : AC_F32;
    g->bias_stride = b ? b->stride[0] : 0;
}

static bool
linear_of(const ac_problem *p, ac_gemm *g)
{
    const ac_tensor *x = &p->input[AC_LINEAR_X], *x2 = ac_operand(p, AC_LINEAR_X2);
    const ac_tensor *residual = ac_operand(p, AC_LINEAR_RESIDUAL), *out = &p->output;
    const ac_tensor *w = &p->input[AC_LINEAR_W];
    int32_t last = out->shape.rank - 1;
    const ac_tensor *operand[4] = {out, x, x2 ? x2 : x, residual ? residual : out};
    const int64_t *strides[4];
    for (int i = 0; i < 4; i++) {
        strides[i] = operand[i]->stride;
    }
    ac_shape lines = out->shape; /* all dimensions but the last */
    lines.rank = last;
    ac_walk walk = ac_walk_of(&lines, 4, strides);
    if (walk.rank > 3) {
        return false;
    }
    ac_gemm_image *image[4] = {&g->out, &g->x[0], x2 ? &g->x[1] : NULL,
                               residual ? &g->residual : NULL};
    int64_t size[3] = {1, 1, 1};
    for (int i = 0; i < 4; i++) {
        int64_t s[3] = {0, 0, 0};
        for (int d = 0; d < walk.rank; d++) { /* the innermost is w */
            s[3 - walk.rank + d] = walk.stride[i][d];
            size[3 - walk.rank + d] = walk.dim[d];
        }
        if (image[i]) {
            *image[i] = (ac_gemm_image){address(operand[i]), operand[i]->dtype, s[0], s[1], s[2],
                                        operand[i]->stride[last], {0, 0}};
        }
    }
    if (size[1] > INT32_MAX || size[2] > INT32_MAX) {
        return false;
    }
    g->height = g->out_height = (int32_t)size[1];
    g->width = g->out_width = (int32_t)size[2];
    g->rows = size[0] * size[1] * size[2];
    g->kernel_h = g->kernel_w = 1;
    g->stride = 1;
    g->channels[0] = x->shape.dim[last];
    g->channels[1] = x2 ? x2->shape.dim[last] : 0;
    g->w_row = w->stride[0];
    g->w_c = w->stride[1];
    g->act = p->attr.linear.act;
    g->gated = p->attr.linear.gated;
    set_bias(g, ac_operand(p, AC_LINEAR_B));
    return true;
}

static bool
conv_of(const ac_problem *p, ac_gemm *g)
{
    bool up = p->op == AC_OP_UP_CONV2D;
    const ac_tensor *x = &p->input[AC_CONV_X], *w = &p->input[AC_CONV_W], *out = &p->output;
    const ac_tensor *x2 = up ? NULL : ac_operand(p, AC_CONV_X2);
    const ac_conv2d_attr *attr = &p->attr.conv2d;
    int32_t scale = up ? 2 : 1;
    g->x[0] = image_of(x);
    g->x[1] = image_of(x2);
    g->out = image_of(out);
    g->residual = image_of(ac_operand(p, AC_CONV_RESIDUAL));
    g->channels[0] = x->shape.dim[3];
    g->channels[1] = x2 ? x2->shape.dim[3] : 0;
    if (x->shape.dim[1] > INT32_MAX / 2 || x->shape.dim[2] > INT32_MAX / 2) {
        return false;
    }
    g->height = (int32_t)x->shape.dim[1];
    g->width = (int32_t)x->shape.dim[2];
    g->out_height = (int32_t)out->shape.dim[1] / scale;
    g->out_width = (int32_t)out->shape.dim[2] / scale;
    g->rows = out->shape.dim[0] * g->out_height * g->out_width;
    g->stride = up ? 1 : attr->stride;
    g->pad_top = up ? 1 : attr->pad_top;
    g->pad_left = up ? 1 : attr->pad_left;
    g->act = up ? p->attr.up_conv2d.act : attr->act;
    g->phases = up;
    const int64_t *s = w->stride + up, *dim = w->shape.dim + up; /* a phase's [o, i, kh, kw] */
    g->kernel_h = (int32_t)dim[2];
    g->kernel_w = (int32_t)dim[3];
    g->w_row = s[0];
    g->w_c = s[1];
    g->w_y = s[2];
    g->w_x = s[3];
    if (up) { /* output pixel (2i + a, 2j + b) is pixel (i, j) of product 2a + b */
        g->batch = 4;
        g->inner = 2;
        g->w_batch[0] = 2 * w->stride[0];
        g->w_batch[1] = w->stride[0];
        ac_gemm_image *both[2] = {&g->out, &g->residual};
        for (int i = 0; i < 2; i++) {
            both[i]->batch[0] = both[i]->h;
            both[i]->batch[1] = both[i]->w;
            both[i]->h *= 2;
            both[i]->w *= 2;
        }
    }
    set_bias(g, ac_operand(p, AC_CONV_B));
    return true;
}

bool
ac_gemm_of(const ac_problem *p, ac_gemm *g)
{
    const ac_tensor *w = &p->input[1];
    *g = (ac_gemm){};
    g->batch = g->inner = 1;
    g->weight = w->data;
    g->weight_dtype = w->dtype;
    if (!(p->op == AC_OP_LINEAR ? linear_of(p, g) : conv_of(p, g))) {
        return false;
    }
    g->columns = p->output.shape.dim[p->output.shape.rank - 1];
    return ac_cuda_float(w->dtype) && ac_cuda_float(g->x[0].dtype) &&
           ac_cuda_float(g->x[1].dtype) && ac_cuda_float(g->out.dtype) &&
           ac_cuda_float(g->residual.dtype) && ac_cuda_float(g->bias_dtype);
}

/* ---- the plain kernel ------------------------------------------------------------------------ */

static constexpr int TILE = 64, DEPTH = 16, PITCH = TILE + 4;

/* One output row: its image and the input pixel under the first tap. */
struct pixel {
    int64_t n;
    int32_t y, x;
    bool valid;
};

__device__ static inline pixel
pixel_of(const ac_gemm &g, int64_t row, int32_t pad_top, int32_t pad_left)
{
    int64_t line = row / g.out_width;
    return {line / g.out_height, (int32_t)(line % g.out_height) * g.stride - pad_top,
            (int32_t)(row % g.out_width) * g.stride - pad_left, row < g.rows};
}

__device__ static inline float
load_x(const ac_gemm &g, const ac_gemm_image &x, const pixel &p, int32_t ky, int32_t kx, int64_t c,
       int64_t base)
{
    int32_t y = p.y + ky, column = p.x + kx;
    if (!p.valid || y < 0 || y >= g.height || column < 0 || column >= g.width) {
        return 0.0f;
    }
    return ac_load(x.data, x.dtype, base + p.n * x.n + y * x.h + column * x.w + c * x.c);
}

__device__ static inline void
store_out(const ac_gemm &g, int64_t row, int64_t column, float value, float gate)
{
    if (row >= g.rows || column >= g.columns) {
        return;
    }
    if (g.bias) {
        value += ac_load(g.bias, g.bias_dtype, column * g.bias_stride);
    }
    if (g.gated) {
        gate += g.bias ? ac_load(g.bias, g.bias_dtype, (g.columns + column) * g.bias_stride) : 0.0f;
        value *= ac_act_apply(g.act, gate);
    } else {
        value = ac_act_apply(g.act, value);
    }
    if (g.row_scale) {
        value *= g.row_scale[blockIdx.z * g.rows + row];
    }
    int64_t outer = blockIdx.z / g.inner, inner = blockIdx.z % g.inner;
    int64_t x = row % g.out_width, y = row / g.out_width % g.out_height;
    int64_t n = row / g.out_width / g.out_height;
    const ac_gemm_image &r = g.residual, &o = g.out;
    if (r.data) {
        value += ac_load(r.data, r.dtype, outer * r.batch[0] + inner * r.batch[1] + n * r.n +
                                              y * r.h + x * r.w + column * r.c);
    }
    ac_store(ac_cells{(void *)o.data, o.dtype}, outer * o.batch[0] + inner * o.batch[1] +
                                                    n * o.n + y * o.h + x * o.w + column * o.c,
             value);
}

/* Two weights a column with GATED: value and gate. */
template <bool GATED>
__global__ static void __launch_bounds__(AC_THREADS)
gemm_plain_kernel(const __grid_constant__ ac_gemm g)
{
    constexpr int SIDES = GATED ? 2 : 1;
    __shared__ __align__(16) float xs[DEPTH][PITCH], ws[SIDES][DEPTH][PITCH];
    int64_t outer = blockIdx.z / g.inner, inner = blockIdx.z % g.inner;
    int64_t row0 = (int64_t)blockIdx.x * TILE, column0 = (int64_t)blockIdx.y * TILE;
    int32_t lane = threadIdx.x % DEPTH, group = threadIdx.x / DEPTH;
    int64_t c_all = g.channels[0] + g.channels[1], depth = c_all * g.kernel_h * g.kernel_w;
    int64_t w_base = outer * g.w_batch[0] + inner * g.w_batch[1], x_base[2];
    pixel pixels[4];
    float sum[SIDES][4][4] = {};
    for (int i = 0; i < 2; i++) {
        x_base[i] = outer * g.x[i].batch[0] + inner * g.x[i].batch[1];
    }
    for (int i = 0; i < 4; i++) {
        pixels[i] = pixel_of(g, row0 + group + 16 * i, g.pad_top - (g.phases ? (int)outer : 0),
                             g.pad_left - (g.phases ? (int)inner : 0));
    }
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
        int64_t k = k0 + lane, tap = k / c_all, c = k % c_all;
        int32_t ky = (int32_t)(tap / g.kernel_w), kx = (int32_t)(tap % g.kernel_w);
        bool second = c >= g.channels[0], valid = k < depth;
        const ac_gemm_image &x = g.x[second];
        for (int i = 0; i < 4; i++) {
            xs[lane][group + 16 * i] =
                valid ? load_x(g, x, pixels[i], ky, kx, second ? c - g.channels[0] : c,
                               x_base[second])
                      : 0.0f;
            int64_t column = column0 + group + 16 * i;
            for (int side = 0; side < SIDES; side++) {
                int64_t at = w_base + (column + side * g.columns) * g.w_row + ky * g.w_y +
                             kx * g.w_x + c * g.w_c;
                ws[side][lane][group + 16 * i] =
                    valid && column < g.columns ? ac_load(g.weight, g.weight_dtype, at) : 0.0f;
            }
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float4 a = *(const float4 *)&xs[d][threadIdx.x / 16 * 4];
            const float av[4] = {a.x, a.y, a.z, a.w};
            for (int side = 0; side < SIDES; side++) {
                float4 b = *(const float4 *)&ws[side][d][threadIdx.x % 16 * 4];
                const float bv[4] = {b.x, b.y, b.z, b.w};
                for (int i = 0; i < 4; i++) {
                    for (int j = 0; j < 4; j++) {
                        sum[side][i][j] += av[i] * bv[j];
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            store_out(g, row0 + threadIdx.x / 16 * 4 + i, column0 + threadIdx.x % 16 * 4 + j,
                      sum[0][i][j], sum[SIDES - 1][i][j]);
        }
    }
}

ac_status
ac_cuda_gemm_plain(ac_lane *lane, const ac_gemm *g)
{
    dim3 grid((unsigned)ac_ceil_div(g->rows, TILE), (unsigned)ac_ceil_div(g->columns, TILE),
              (unsigned)g->batch);
    return g->gated ? ac_cuda_launch(lane, "gemm_plain", gemm_plain_kernel<true>, grid, AC_THREADS,
                                     0, *g)
                    : ac_cuda_launch(lane, "gemm_plain", gemm_plain_kernel<false>, grid,
                                     AC_THREADS, 0, *g);
}
