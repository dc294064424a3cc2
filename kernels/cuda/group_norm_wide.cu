/* group_norm of whole 16-byte vectors: see group_norm.cu for the formula.
 *
 *     statistics of pieces --scratch--> the result; each block merges the pieces of its groups
 *
 * A block takes some pixels of a tile of channels: whole vectors, 64 channels at least, and a group
 * for each warp that merges; a thread keeps one vector's channels.  Sums run around a thread's own
 * first value, which loses no digits to a large mean, and are merged (Chan et al. 1979) in an order
 * that depends on the sizes alone.
 * Bound: memory, two reads and one write of the tensor. */
#include "list.h"
#include "reduce.cuh"
#include "vector.cuh"

static constexpr int MOST_GROUPS = 128; /* of a tile */
static constexpr int AHEAD = 4;         /* vectors that a thread loads before it writes one */

struct image {
    const void *data;
    int64_t n, pixel; /* strides */
};

/* One number a channel; `wide`: read by whole vectors. */
struct row {
    ac_cells cells;
    int64_t stride;
    bool wide;
};

struct job {
    image x, x2, y;
    int64_t pixels, piece, run; /* of a block: in the first kernel, in the second */
    int32_t c1, channels, groups, group_channels, tile, pieces;
    row gamma, beta, shift;
    int64_t shift_n;
    float eps, scale;
    ac_act act;
    float3 *parts; /* [image][group][piece]: count, mean, sum of squares around it */
};

/* What a thread works on: vector x of `width`, pixels y, y + height ... */
template <typename T> struct place {
    int32_t c0, width, height, x, y, c; /* c: first channel of the vector */
    int64_t n;
    bool active;

    __device__ place(const job &g)
    {
        c0 = (int32_t)blockIdx.y * g.tile;
        width = min(g.tile, g.channels - c0) / ac_wide<T>;
        height = (int32_t)AC_THREADS / width;
        x = (int32_t)threadIdx.x % width;
        y = (int32_t)threadIdx.x / width;
        c = c0 + x * ac_wide<T>;
        n = blockIdx.z;
        active = y < height;
    }

    /* The vector's place at pixel 0, and how far the next pixel is. */
    __device__ const T *
    source(const job &g, int64_t *step) const
    {
        bool second = c >= g.c1;
        const image &i = second ? g.x2 : g.x;
        *step = i.pixel;
        return (const T *)i.data + n * i.n + (second ? c - g.c1 : c);
    }
};

/* Single loads come one after the other: eight of them take longer than the rest of a block. */
template <typename T>
__device__ static inline void
load_row(float (&to)[ac_wide<T>], const row &r, int64_t base, int32_t c)
{
    if (r.wide) {
        ac_load_wide<T>(to, (const T *)r.cells.data + base + c);
        return;
    }
#pragma unroll
    for (int e = 0; e < ac_wide<T>; e++) {
        to[e] = r.cells.data ? ac_load(r.cells, base + (c + e) * r.stride) : 0.0f;
    }
}

/* grid: pieces, tiles of channels, images */
template <typename T>
__global__ static void __launch_bounds__(AC_THREADS)
parts_kernel(const __grid_constant__ job g)
{
    constexpr int N = ac_wide<T>;
    __shared__ float2 part[AC_THREADS * N]; /* [height][channels of the tile]: mean, squares */
    place<T> at(g);
    int64_t from = blockIdx.x * g.piece, to = min(from + g.piece, g.pixels), step;
    if (at.active) {
        float shift[N], pivot[N] = {}, sum[N] = {}, squares[N] = {}, count = 0.0f;
        const T *x = at.source(g, &step);
        load_row<T>(shift, g.shift, at.n * g.shift_n, at.c);
        if (from + at.y < to) {
            ac_load_wide<T>(pivot, x + (from + at.y) * step);
        }
#pragma unroll 4
        for (int64_t pixel = from + at.y; pixel < to; pixel += at.height) {
            float v[N];
            ac_load_wide<T>(v, x + pixel * step);
#pragma unroll
            for (int e = 0; e < N; e++) {
                float d = v[e] - pivot[e];
                sum[e] += d;
                squares[e] += d * d;
            }
            count += 1.0f;
        }
#pragma unroll
        for (int e = 0; e < N && count > 0.0f; e++) {
            float mean = sum[e] / count;
            part[(at.y * at.width + at.x) * N + e] =
                make_float2(pivot[e] + shift[e] + mean, fmaxf(squares[e] - sum[e] * mean, 0.0f));
        }
    }
    __syncthreads();
    int groups = at.width * N / g.group_channels, group0 = at.c0 / g.group_channels;
    int64_t pixels = to - from;
    for (int group = threadIdx.x / 32; group < groups; group += AC_THREADS / 32) {
        float3 all = make_float3(0.0f, 0.0f, 0.0f);
        for (int i = threadIdx.x % 32; i < g.group_channels * at.height; i += 32) {
            int y = i / g.group_channels, c = group * g.group_channels + i % g.group_channels;
            if (y < pixels) {
                float2 one = part[y * at.width * N + c];
                float count = (float)((pixels - y + at.height - 1) / at.height);
                all = ac_moments_merge(all, make_float3(count, one.x, one.y));
            }
        }
        all = ac_moments_warp(all);
        if (threadIdx.x % 32 == 0) {
            g.parts[(at.n * g.groups + group0 + group) * g.pieces + blockIdx.x] = all;
        }
    }
}

/* Exponential and division are as long as the memory takes; the fast ones are good to more digits
 * than a half has. */
template <typename T>
__device__ static inline float
finish(ac_act act, float v)
{
    bool fast = sizeof(T) == 2 && act == AC_ACT_SILU;
    return fast ? __fdividef(v, 1.0f + __expf(-v)) : ac_act_apply(act, v);
}

/* grid: runs of pixels, tiles of channels, images */
template <typename T>
__global__ static void __launch_bounds__(AC_THREADS)
apply_kernel(const __grid_constant__ job g)
{
    constexpr int N = ac_wide<T>;
    __shared__ float2 moments[MOST_GROUPS]; /* mean, 1 / sqrt(variance + eps) */
    place<T> at(g);
    float shift[N], mean[N], by[N], beta[N];
    if (at.active) { /* before the wait for the moments */
        load_row<T>(shift, g.shift, at.n * g.shift_n, at.c);
        load_row<T>(by, g.gamma, 0, at.c);
        load_row<T>(beta, g.beta, 0, at.c);
    }
    int groups = at.width * N / g.group_channels, group0 = at.c0 / g.group_channels;
    for (int group = threadIdx.x / 32; group < groups; group += AC_THREADS / 32) {
        const float3 *parts = g.parts + (at.n * g.groups + group0 + group) * g.pieces;
        float3 all = make_float3(0.0f, 0.0f, 0.0f);
        for (int i = threadIdx.x % 32; i < g.pieces; i += 32) {
            all = ac_moments_merge(all, parts[i]);
        }
        all = ac_moments_warp(all);
        if (threadIdx.x % 32 == 0) {
            moments[group] = make_float2(all.y, 1.0f / sqrtf(all.z / all.x + g.eps));
        }
    }
    __syncthreads();
    if (!at.active) {
        return;
    }
#pragma unroll
    for (int e = 0; e < N; e++) {
        float2 m = moments[(at.c - at.c0 + e) / g.group_channels];
        mean[e] = m.x;
        by[e] *= m.y;
    }
    int64_t from = blockIdx.x * g.run, to = min(from + g.run, g.pixels), step;
    const T *x = at.source(g, &step);
    T *y = (T *)g.y.data + at.n * g.y.n + at.c;
    for (int64_t pixel = from + at.y; pixel < to; pixel += (int64_t)AHEAD * at.height) {
        uint4 raw[AHEAD]; /* loads in flight: the compiler does not move one before a store */
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (pixel + i * at.height < to) {
                raw[i] = *(const uint4 *)(x + (pixel + i * at.height) * step);
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float v[N];
            ac_unpack_wide<T>(v, raw[i]);
#pragma unroll
            for (int e = 0; e < N; e++) {
                float z = (v[e] + shift[e] - mean[e]) * by[e] + beta[e];
                v[e] = finish<T>(g.act, z) * g.scale;
            }
            if (pixel + i * at.height < to) {
                ac_store_wide<T>(y + (pixel + i * at.height) * g.y.pixel, v);
            }
        }
    }
}

/* ---- when, and how --------------------------------------------------------------------------- */

/* Pixels at one distance, all in whole vectors. */
static bool
image_of(const ac_tensor *t, ac_dtype dtype, image *out)
{
    int32_t last = t->shape.rank - 1, wide = 16 / (int32_t)ac_dtype_size(dtype);
    ac_shape pixels = {last - 1, {}};
    for (int32_t d = 1; d < last; d++) {
        pixels.dim[d - 1] = t->shape.dim[d];
    }
    const int64_t *const strides[] = {t->stride + 1};
    ac_walk w = ac_walk_of(&pixels, 1, strides);
    *out = image{t->data, t->stride[0], w.rank ? w.stride[0][0] : 0};
    return w.rank <= 1 && t->dtype == dtype && t->stride[last] == 1 && out->n % wide == 0 &&
           out->pixel % wide == 0 && t->shape.dim[last] % wide == 0;
}

static row
row_of(const ac_tensor *t, int32_t axis, ac_dtype dtype)
{
    row r = {ac_cells_of(t), t ? t->stride[axis] : 0, false};
    r.wide = t && t->data && t->dtype == dtype && r.stride == 1 && ac_is_wide(t->data);
    return r;
}

/* Whole groups that are whole vectors; where there are as many, 64 channels and a group a warp.
 * 0: there is no such tile. */
static int32_t
tile_of(int32_t channels, int32_t group_channels, int32_t wide)
{
    int32_t most = AC_MIN((int32_t)AC_THREADS * wide, MOST_GROUPS * group_channels);
    int32_t wanted = AC_MAX(64, (int32_t)AC_THREADS / 32 * group_channels), tile = 0;
    for (int32_t c = group_channels; c <= AC_MIN(channels, most); c += group_channels) {
        if (c % wide == 0) {
            tile = c;
            if (c >= wanted) {
                break;
            }
        }
    }
    return tile;
}

static bool
job_of(const ac_problem *p, job *g)
{
    const ac_tensor *x = &p->input[AC_GN_X], *x2 = ac_operand(p, AC_GN_X2), *y = &p->output;
    const ac_tensor *gamma = &p->input[AC_GN_GAMMA], *beta = &p->input[AC_GN_BETA];
    const ac_tensor *shift = ac_operand(p, AC_GN_SHIFT);
    int32_t last = y->shape.rank - 1, wide = 16 / (int32_t)ac_dtype_size(y->dtype);
    *g = {};
    if (!ac_cuda_float(y->dtype) || y->shape.dim[last] > 1 << 20 ||
        !image_of(x, y->dtype, &g->x) || (x2 && !image_of(x2, y->dtype, &g->x2)) ||
        !image_of(y, y->dtype, &g->y) || !ac_cuda_float(gamma->dtype) ||
        !ac_cuda_float(beta->dtype) || (shift && !ac_cuda_float(shift->dtype)) ||
        y->shape.dim[0] > 65535) {
        return false;
    }
    g->c1 = (int32_t)x->shape.dim[last];
    g->channels = (int32_t)y->shape.dim[last];
    g->pixels = 1;
    for (int32_t d = 1; d < last; d++) {
        g->pixels *= y->shape.dim[d];
    }
    g->gamma = row_of(gamma, 0, y->dtype);
    g->beta = row_of(beta, 0, y->dtype);
    g->shift = row_of(shift, 1, y->dtype);
    if (shift && shift->shape.dim[0] > 1) {
        g->shift_n = shift->stride[0];
        g->shift.wide = g->shift.wide && g->shift_n % wide == 0;
    }
    g->groups = p->attr.group_norm.groups;
    g->group_channels = g->channels / g->groups;
    g->tile = tile_of(g->channels, g->group_channels, wide);
    g->eps = p->attr.group_norm.eps;
    g->scale = ldexpf(1.0f, p->attr.group_norm.exponent);
    g->act = p->attr.group_norm.act;
    if (g->tile == 0) {
        return false;
    }
    /* About 2000 blocks, none with less than four vectors a thread, few enough to merge. */
    int64_t others = ac_ceil_div(g->channels, g->tile) * AC_MAX(y->shape.dim[0], (int64_t)1);
    int64_t least = (int64_t)AC_THREADS * wide / g->tile * 4;
    g->run = AC_MAX(ac_ceil_div(g->pixels * others, 2048), AC_MAX(least, (int64_t)1));
    g->piece = AC_MAX(g->run, ac_ceil_div(g->pixels, 256));
    g->pieces = (int32_t)AC_MAX(ac_ceil_div(g->pixels, g->piece), (int64_t)1);
    return true;
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    job g;
    return job_of(p, &g);
}

static size_t
scratch(const ac_problem *p, const ac_caps *caps)
{
    job g;
    job_of(p, &g);
    size_t mine = (size_t)(p->output.shape.dim[0] * g.groups * g.pieces) * sizeof(float3);
    size_t plain = ac_cuda_group_norm.scratch(p, caps); /* where addresses are not whole vectors */
    return AC_MAX(mine, plain);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const job &g, int64_t images)
{
    unsigned tiles = (unsigned)ac_ceil_div(g.channels, g.tile);
    dim3 parts((unsigned)g.pieces, tiles, (unsigned)images);
    dim3 runs((unsigned)ac_ceil_div(g.pixels, g.run), tiles, (unsigned)images);
    AC_TRY(ac_cuda_launch(lane, "group_norm parts", parts_kernel<T>, parts, AC_THREADS, 0, g));
    return ac_cuda_launch(lane, "group_norm", apply_kernel<T>, runs, AC_THREADS, 0, g);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    job g;
    if (!job_of(p, &g) || !ac_is_wide(g.x.data) || !ac_is_wide(g.x2.data) ||
        !ac_is_wide(g.y.data)) {
        return ac_cuda_group_norm.launch(lane, p, scratch, prepared);
    }
    int64_t images = p->output.shape.dim[0];
    g.parts = (float3 *)scratch;
    if (g.pixels == 0 || images == 0) {
        return AC_OK;
    }
    return p->output.dtype == AC_F32   ? launch_dtype<float>(lane, g, images)
           : p->output.dtype == AC_F16 ? launch_dtype<__half>(lane, g, images)
                                       : launch_dtype<__nv_bfloat16>(lane, g, images);
}

extern "C" const ac_kernel ac_cuda_group_norm_wide = {
    .name = "cuda.group_norm.wide",
    .op = AC_OP_GROUP_NORM,
    .supports = supports,
    .scratch = scratch,
    .launch = launch,
};
