/* group_norm: y = act((v - mean) / sqrt(variance + eps) gamma + beta) 2^exponent,
 * v = [x|x2] + shift[n, c].
 *
 *     statistics of pieces --scratch--> mean and scale of each group --scratch--> the result
 *
 * A piece is some pixels of some groups of one image; a thread keeps one channel of it (more in
 * groups wider than a block) as sums around its own first value, which loses no digits to a large
 * mean; they are then merged pairwise (Chan et al. 1979) in an order that depends on the sizes
 * alone.  Neighbouring threads read neighbouring channels.
 * Bound: memory, two reads and one write of the tensor. */
#include "group_norm.cuh"

struct image {
    ac_cells cells;
    ac_gn_image at;
    int64_t c; /* stride */
};

struct job {
    image x, x2, y;
    int64_t c1, channels, pixels, images;
    ac_cells gamma, beta, shift;
    int64_t gamma_stride, beta_stride, shift_n, shift_c;
    int32_t groups, group_channels;
    int32_t tile_groups;   /* groups of one block of the first kernel */
    int32_t pieces;        /* of an image's pixels */
    int64_t piece_pixels;
    float eps;
    float scale;           /* of the result: 2^exponent */
    ac_act act;
    float3 *parts;         /* [image][group][piece]: count, mean, sum of squares around it */
    float2 *moments;       /* [image][group]: mean, 1 / sqrt(variance + eps) */
};

__device__ static inline float
load(const job &g, int64_t n, int64_t pixel, int64_t c)
{
    const image &i = c < g.c1 ? g.x : g.x2;
    return ac_load(i.cells, n * i.at.n + pixel * i.at.pixel + (c < g.c1 ? c : c - g.c1) * i.c);
}

__device__ static inline float
load_shift(const job &g, int64_t n, int64_t c)
{
    return g.shift.data ? ac_load(g.shift, n * g.shift_n + c * g.shift_c) : 0.0f;
}

/* One channel over some pixels: count, mean, squares. */
__device__ static inline float3
channel_moments(const job &g, int64_t n, int64_t c, int64_t from, int64_t to, int64_t step)
{
    float shift = load_shift(g, n, c), pivot = 0.0f, sum = 0.0f, squares = 0.0f, count = 0.0f;
    for (int64_t pixel = from; pixel < to; pixel += step) {
        float v = load(g, n, pixel, c) + shift;
        pivot = count == 0.0f ? v : pivot;
        sum += v - pivot;
        squares += (v - pivot) * (v - pivot);
        count += 1.0f;
    }
    if (count == 0.0f) {
        return make_float3(0.0f, 0.0f, 0.0f);
    }
    return make_float3(count, pivot + sum / count, fmaxf(squares - sum * sum / count, 0.0f));
}

/* grid: pieces, tiles of groups, images */
__global__ static void __launch_bounds__(AC_THREADS)
parts_kernel(job g)
{
    __shared__ float3 part[AC_THREADS];
    int64_t n = blockIdx.z, group0 = (int64_t)blockIdx.y * g.tile_groups;
    int groups = (int)(g.groups - group0 < g.tile_groups ? g.groups - group0 : g.tile_groups);
    int channels = groups * g.group_channels, width = min(channels, (int)AC_THREADS);
    int height = AC_THREADS / width, x = threadIdx.x % width, y = threadIdx.x / width;
    int64_t from = blockIdx.x * g.piece_pixels, to = min(from + g.piece_pixels, g.pixels);
    float3 mine = make_float3(0.0f, 0.0f, 0.0f);
    for (int c = x; y < height && c < channels; c += width) {
        float3 other = channel_moments(g, n, group0 * g.group_channels + c, from + y, to, height);
        mine = ac_moments_merge(mine, other);
    }
    part[threadIdx.x] = mine;
    __syncthreads();
    int wide = min(g.group_channels, width); /* threads of a group in one row of threads */
    for (int group = threadIdx.x / 32; group < groups; group += AC_THREADS / 32) {
        float3 sum = make_float3(0.0f, 0.0f, 0.0f);
        for (int i = threadIdx.x % 32; i < wide * height; i += 32) {
            float3 other = part[i / wide * width + group * wide + i % wide];
            sum = ac_moments_merge(sum, other);
        }
        sum = ac_moments_warp(sum);
        if (threadIdx.x % 32 == 0) {
            g.parts[(n * g.groups + group0 + group) * g.pieces + blockIdx.x] = sum;
        }
    }
}

/* A warp a group. */
__global__ static void __launch_bounds__(AC_THREADS)
moments_kernel(job g)
{
    int64_t group = (int64_t)blockIdx.x * (AC_THREADS / 32) + threadIdx.x / 32;
    if (group >= g.images * g.groups) {
        return;
    }
    float3 sum = make_float3(0.0f, 0.0f, 0.0f);
    for (int i = threadIdx.x % 32; i < g.pieces; i += 32) {
        float3 other = g.parts[group * g.pieces + i];
        sum = ac_moments_merge(sum, other);
    }
    sum = ac_moments_warp(sum);
    if (threadIdx.x % 32 == 0) {
        g.moments[group] = make_float2(sum.y, 1.0f / sqrtf(sum.z / sum.x + g.eps));
    }
}

/* grid: runs of pixels, tiles of channels, images; a thread keeps its channel. */
__global__ static void __launch_bounds__(AC_THREADS)
apply_kernel(job g, int32_t width, int64_t run)
{
    int height = AC_THREADS / width, y = threadIdx.x / width;
    int64_t n = blockIdx.z, c = (int64_t)blockIdx.y * width + threadIdx.x % width;
    int64_t from = blockIdx.x * run, to = min(from + run, g.pixels);
    if (c >= g.channels || y >= height) {
        return;
    }
    float2 moment = g.moments[n * g.groups + c / g.group_channels];
    float shift = load_shift(g, n, c), gamma = ac_load(g.gamma, c * g.gamma_stride);
    float beta = ac_load(g.beta, c * g.beta_stride);
    for (int64_t pixel = from + y; pixel < to; pixel += height) {
        float v = load(g, n, pixel, c) + shift;
        v = (v - moment.x) * moment.y * gamma + beta;
        ac_store(g.y.cells, n * g.y.at.n + pixel * g.y.at.pixel + c * g.y.c,
                 ac_act_apply(g.act, v) * g.scale);
    }
}

/* ---- when, and how --------------------------------------------------------------------------- */

static bool
image_of(const ac_tensor *t, image *out)
{
    *out = {ac_cells_of(t), {}, t->stride[t->shape.rank - 1]};
    return ac_gn_image_of(t, &out->at) && ac_cuda_float(t->dtype);
}

static bool
job_of(const ac_problem *p, job *g)
{
    const ac_tensor *x = &p->input[AC_GN_X], *x2 = ac_operand(p, AC_GN_X2), *y = &p->output;
    const ac_tensor *gamma = &p->input[AC_GN_GAMMA], *beta = &p->input[AC_GN_BETA];
    const ac_tensor *shift = ac_operand(p, AC_GN_SHIFT);
    *g = {};
    if (!image_of(x, &g->x) || (x2 && !image_of(x2, &g->x2)) || !image_of(y, &g->y)) {
        return false;
    }
    int32_t last = y->shape.rank - 1;
    g->c1 = x->shape.dim[last];
    g->channels = y->shape.dim[last];
    g->images = y->shape.dim[0];
    g->pixels = 1;
    for (int32_t d = 1; d < last; d++) {
        g->pixels *= y->shape.dim[d];
    }
    g->gamma = ac_cells_of(gamma);
    g->beta = ac_cells_of(beta);
    g->gamma_stride = gamma->stride[0];
    g->beta_stride = beta->stride[0];
    if (shift) {
        g->shift = ac_cells_of(shift);
        g->shift_n = shift->shape.dim[0] > 1 ? shift->stride[0] : 0;
        g->shift_c = shift->stride[1];
    }
    g->groups = p->attr.group_norm.groups;
    g->group_channels = (int32_t)(g->channels / g->groups);
    g->tile_groups = g->group_channels >= 64 ? 1 : AC_MIN(64 / g->group_channels, g->groups);
    g->piece_pixels = AC_MAX(ac_ceil_div(g->pixels, 256), 64);
    g->pieces = (int32_t)AC_MAX(ac_ceil_div(g->pixels, g->piece_pixels), 1);
    g->eps = p->attr.group_norm.eps;
    g->scale = ldexpf(1.0f, p->attr.group_norm.exponent);
    g->act = p->attr.group_norm.act;
    return ac_cuda_float(gamma->dtype) && ac_cuda_float(beta->dtype) &&
           (!shift || ac_cuda_float(shift->dtype)) && g->images <= 65535;
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    job g;
    return job_of(p, &g);
}

static size_t
moments_bytes(const job &g)
{
    return ac_align_up((size_t)(g.images * g.groups) * sizeof(float2), 256);
}

static size_t
scratch(const ac_problem *p, const ac_caps *)
{
    job g;
    job_of(p, &g);
    return moments_bytes(g) + (size_t)(g.images * g.groups * g.pieces) * sizeof(float3);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *)
{
    job g;
    job_of(p, &g);
    g.moments = (float2 *)scratch;
    g.parts = (float3 *)((char *)scratch + moments_bytes(g));
    if (g.pixels == 0) {
        return AC_OK;
    }
    dim3 parts((unsigned)g.pieces, (unsigned)ac_ceil_div(g.groups, g.tile_groups),
               (unsigned)g.images);
    AC_TRY(ac_cuda_launch(lane, "group_norm parts", parts_kernel, parts, AC_THREADS, 0, g));
    dim3 groups((unsigned)ac_ceil_div(g.images * g.groups, AC_THREADS / 32));
    AC_TRY(ac_cuda_launch(lane, "group_norm moments", moments_kernel, groups, AC_THREADS, 0, g));
    int32_t width = (int32_t)AC_MIN(g.channels, 64);
    int64_t run = AC_MAX((int64_t)64, ac_ceil_div(g.pixels, 1 << 20));
    dim3 grid((unsigned)ac_ceil_div(g.pixels, run), (unsigned)ac_ceil_div(g.channels, width),
              (unsigned)g.images);
    return ac_cuda_launch(lane, "group_norm", apply_kernel, grid, AC_THREADS, 0, g, width, run);
}

extern "C" const ac_kernel ac_cuda_group_norm = {
    .name = "cuda.group_norm",
    .op = AC_OP_GROUP_NORM,
    .supports = supports,
    .scratch = scratch,
    .launch = launch,
};
