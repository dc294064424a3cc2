/* group_norm of whole 16-byte vectors in two launches, on any architecture and at any size: see
 * group_norm.cu for the formula, group_norm.cuh for what a thread does.
 *
 *     statistics of pieces --scratch--> the result; each block merges the pieces of its groups
 *
 * Bound: memory, two reads and one write of the tensor. */
#include "group_norm.cuh"

static constexpr int MOST_GROUPS = 128; /* of a tile */
static constexpr int AHEAD = 4;         /* loads in flight of a thread */

/* ---- statistics ------------------------------------------------------------------------------ */

template <typename T, int V>
__device__ static inline void
add_run(ac_gn_sums<T> &sums, const ac_gn_run<V> &run)
{
#pragma unroll
    for (int i = 0; i < V; i++) {
        sums.add(run.raw[i]);
    }
}

/* What a block's threads found: mean and squares of each channel over each row of threads, in
 * pairs of channels so that neighbouring threads write neighbouring 16 bytes. */
template <typename T, int THREADS> struct channel_table {
    float4 pair[THREADS * ac_wide<T> / 2]; /* [height][pair of the vector][width] */

    __device__ void
    put(const ac_gn_place<T> &at, const ac_gn_sums<T> &s, uint4 raw_shift, int32_t count)
    {
        using S = ac_moments_type<T>;
        S each = ac_quotient((S)1, (S)count);
        float shift[ac_wide<T>];
        ac_unpack_wide<T>(shift, raw_shift);
#pragma unroll
        for (int k = 0; k < ac_wide<T> / 2; k++) {
            float mean[2], squares[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int e = 2 * k + i;
                mean[i] = (float)(s.sum[e] * each + s.pivot[e] + shift[e]);
                squares[i] = fmaxf((float)(s.squares[e] - s.sum[e] * s.sum[e] * each), 0.0f);
            }
            pair[(at.y * (ac_wide<T> / 2) + k) * (int32_t)blockDim.x + (int32_t)threadIdx.x] =
                make_float4(mean[0], squares[0], mean[1], squares[1]);
        }
    }

    __device__ float2
    get(const ac_gn_place<T> &at, int32_t y, int32_t c) const
    {
        int32_t x = c / ac_wide<T>, e = c % ac_wide<T>;
        int32_t i = (y * (ac_wide<T> / 2) + e / 2) * (int32_t)blockDim.x + x;
        return ((const float2 *)pair)[i * 2 + e % 2];
    }

    /* A group's moments over `pixels` of the block, by a warp. */
    __device__ float3
    group(const ac_gn &g, const ac_gn_place<T> &at, int32_t group, int32_t pixels) const
    {
        int32_t rows = min(at.rows, pixels), gc = g.group_channels, c0 = group * gc;
        int32_t step_y = at.group_of(g, 32), step_c = 32 - step_y * gc;
        int32_t y = at.group_of(g, at.lane()), c = at.lane() - y * gc;
        int32_t least = (int32_t)((uint32_t)pixels / (uint32_t)at.rows);
        int32_t more = pixels - least * at.rows;
        ac_moments_sum<ac_moments_type<T>> all(get(at, 0, c0).x);
        while (y < rows) {
            float2 one = get(at, y, c0 + c);
            all.add((float)(least + (y < more)), one.x, one.y);
            y += step_y;
            c += step_c;
            if (c >= gc) {
                c -= gc;
                y++;
            }
        }
        return all.warp();
    }
};

/* parts: [image][group][piece], mean and sum of squares around it.  grid: pieces, tiles, images */
template <typename T>
__global__ static void __launch_bounds__(AC_THREADS)
parts_kernel(const __grid_constant__ ac_gn g, float2 *parts)
{
    __shared__ channel_table<T, AC_THREADS> table;
    ac_gn_place<T> at(g, blockIdx);
    int32_t from = (int32_t)blockIdx.x * g.piece, to = min(from + g.piece, g.pixels);
    int32_t first = from + at.y;
    if (at.active && first < to) {
        ac_gn_run<AHEAD> run;
        at.load(run, first, first, to);
        uint4 shift = ac_gn_shift(g, at);
        ac_gn_sums<T> sums(run.raw[0]);
        add_run(sums, run);
        for (int32_t p = first + AHEAD * at.rows; p < to; p += AHEAD * at.rows) {
            at.load(run, p, first, to);
            add_run(sums, run);
        }
        table.put(at, sums, shift, (to - first + at.rows - 1) / at.rows);
    }
    __syncthreads();
    int32_t groups = at.groups(g), group0 = at.group_of(g, at.c0);
    for (int32_t group = at.warp(); group < groups; group += at.warps()) {
        float3 all = table.group(g, at, group, to - from);
        if (at.lane() == 0) {
            parts[(at.n * g.groups + group0 + group) * gridDim.x + blockIdx.x] =
                make_float2(all.y, all.z);
        }
    }
}

/* grid: runs of pixels, tiles of channels, images; pieces as the first kernel's */
template <typename T, bool SILU>
__global__ static void __launch_bounds__(AC_THREADS)
apply_kernel(const __grid_constant__ ac_gn g, const float2 *parts, int32_t piece, int32_t pieces)
{
    __shared__ float2 moments[MOST_GROUPS]; /* mean, 1 / sqrt(variance + eps) */
    ac_gn_place<T> at(g, blockIdx);
    int32_t from = (int32_t)blockIdx.x * g.piece, to = min(from + g.piece, g.pixels);
    int32_t first = from + at.y;
    ac_gn_run<AHEAD> run;
    ac_gn_affine<T, SILU> affine;
    if (at.active && first < to) { /* before the wait for the moments */
        at.load(run, first, first, to);
        affine.load(g, at);
    }
    int32_t groups = at.groups(g), group0 = at.group_of(g, at.c0);
    for (int32_t group = at.warp(); group < groups; group += at.warps()) {
        const float2 *mine = parts + (at.n * g.groups + group0 + group) * pieces;
        ac_moments_sum<ac_moments_type<T>> all(mine[0].x);
        for (int32_t i = at.lane(); i < pieces; i += 32) {
            float2 one = mine[i];
            int32_t count = min(piece, g.pixels - i * piece) * g.group_channels;
            all.add((float)count, one.x, one.y);
        }
        float3 whole = all.warp();
        if (at.lane() == 0) {
            moments[group] = ac_gn_moments(g, whole);
        }
    }
    __syncthreads();
    if (!at.active || first >= to) {
        return;
    }
    affine.set(g, at, moments);
    for (int32_t p = first;;) {
        affine.store(g, at, run, p, to);
        p += AHEAD * at.rows;
        if (p >= to) {
            return;
        }
        at.load(run, p, first, to);
    }
}

/* ---- when, and how --------------------------------------------------------------------------- */

bool
ac_gn_image_of(const ac_tensor *t, ac_gn_image *out)
{
    int32_t last = t->shape.rank - 1;
    ac_shape pixels = {last - 1, {}};
    for (int32_t d = 1; d < last; d++) {
        pixels.dim[d - 1] = t->shape.dim[d];
    }
    const int64_t *const strides[] = {t->stride + 1};
    ac_walk w = ac_walk_of(&pixels, 1, strides);
    *out = ac_gn_image{t->data, t->stride[0], w.rank ? w.stride[0][0] : 0};
    return w.rank <= 1;
}

/* All in whole vectors. */
static bool
image_fits(const ac_tensor *t, ac_dtype dtype, ac_gn_image *out)
{
    int32_t last = t->shape.rank - 1, wide = 16 / (int32_t)ac_dtype_size(dtype);
    return ac_gn_image_of(t, out) && t->dtype == dtype && t->stride[last] == 1 &&
           out->n % wide == 0 && out->pixel % wide == 0 && t->shape.dim[last] % wide == 0;
}

static bool
row_fits(const ac_tensor *t, int32_t axis, ac_dtype dtype)
{
    return t->dtype == dtype && (t->stride[axis] == 1 || t->shape.dim[axis] == 1);
}

bool
ac_gn_of(const ac_problem *p, ac_gn *g)
{
    const ac_tensor *x = &p->input[AC_GN_X], *x2 = ac_operand(p, AC_GN_X2), *y = &p->output;
    const ac_tensor *gamma = &p->input[AC_GN_GAMMA], *beta = &p->input[AC_GN_BETA];
    const ac_tensor *shift = ac_operand(p, AC_GN_SHIFT);
    int32_t last = y->shape.rank - 1, wide = 16 / (int32_t)ac_dtype_size(y->dtype);
    int64_t pixels = 1;
    *g = {};
    if (!ac_cuda_float(y->dtype) || !image_fits(x, y->dtype, &g->x) ||
        (x2 && !image_fits(x2, y->dtype, &g->x2)) || !image_fits(y, y->dtype, &g->y) ||
        !row_fits(gamma, 0, y->dtype) || !row_fits(beta, 0, y->dtype) ||
        (shift && !row_fits(shift, 1, y->dtype))) {
        return false;
    }
    for (int32_t d = 1; d < last; d++) {
        pixels *= y->shape.dim[d];
    }
    if (pixels > 1 << 30 || y->shape.dim[last] > 1 << 20 || y->shape.dim[0] > 65535) {
        return false;
    }
    g->pixels = (int32_t)pixels;
    g->images = y->shape.dim[0];
    g->c1 = (int32_t)x->shape.dim[last];
    g->channels = (int32_t)y->shape.dim[last];
    g->groups = p->attr.group_norm.groups;
    g->group_channels = g->channels / g->groups;
    g->inverse = (uint32_t)(((1ull << 32) + g->group_channels - 1) / g->group_channels);
    g->gamma = gamma->data;
    g->beta = beta->data;
    g->shift = shift ? shift->data : nullptr;
    g->shift_n = shift && shift->shape.dim[0] > 1 ? shift->stride[0] : 0;
    g->eps = p->attr.group_norm.eps;
    g->scale = ldexpf(1.0f, p->attr.group_norm.exponent);
    g->act = p->attr.group_norm.act;
    return g->shift_n % wide == 0 && (g->act == AC_ACT_NONE || g->act == AC_ACT_SILU);
}

bool
ac_gn_aligned(const ac_gn *g)
{
    return ac_is_wide(g->x.data) && ac_is_wide(g->x2.data) && ac_is_wide(g->y.data) &&
           ac_is_wide(g->gamma) && ac_is_wide(g->beta) && ac_is_wide(g->shift);
}

int32_t
ac_gn_tile(const ac_gn *g, int32_t wide, int32_t wanted, int32_t most, int32_t most_groups)
{
    int32_t gc = g->group_channels, tile = 0;
    int64_t limit = AC_MIN((int64_t)most * wide, (int64_t)most_groups * gc);
    for (int64_t c = gc; c <= AC_MIN((int64_t)g->channels, limit); c += gc) {
        if (c % wide == 0) {
            tile = (int32_t)c;
            if (c >= wanted) {
                break;
            }
        }
    }
    return tile;
}

/* What the two launches differ in. */
struct cut {
    int32_t run, piece, pieces; /* pixels of a block of the second; of the first; how many */
    dim3 threads;
};

static bool
job_of(const ac_problem *p, ac_gn *g, cut *c)
{
    int32_t wide = 16 / (int32_t)ac_dtype_size(p->output.dtype);
    if (!ac_gn_of(p, g)) {
        return false;
    }
    /* 64 channels where there are as many, and a group for each warp that merges. */
    int32_t wanted = AC_MAX(64, (int32_t)AC_THREADS / 32 * g->group_channels);
    g->tile = ac_gn_tile(g, wide, wanted, AC_THREADS, MOST_GROUPS);
    if (g->tile == 0) {
        return false;
    }
    c->threads = dim3((unsigned)(g->tile / wide), AC_THREADS / (unsigned)(g->tile / wide));
    /* About 512 blocks, none with less than eight vectors a thread, few enough to merge: what a
     * block does once is as much as what it does with some vectors. */
    int64_t others = ac_ceil_div(g->channels, g->tile) * AC_MAX(g->images, (int64_t)1);
    int64_t least = (int64_t)c->threads.y * 2 * AHEAD;
    c->run = (int32_t)AC_MAX(ac_ceil_div(g->pixels * others, 512), AC_MAX(least, (int64_t)1));
    c->piece = (int32_t)AC_MAX((int64_t)c->run, ac_ceil_div(g->pixels, 256));
    c->pieces = (int32_t)AC_MAX(ac_ceil_div(g->pixels, c->piece), (int64_t)1);
    return true;
}

static bool
supports(const ac_problem *p, const ac_caps *)
{
    ac_gn g;
    cut c;
    return job_of(p, &g, &c);
}

static size_t
scratch(const ac_problem *p, const ac_caps *caps)
{
    ac_gn g;
    cut c = {};
    job_of(p, &g, &c);
    size_t mine = (size_t)(g.images * g.groups * c.pieces) * sizeof(float2);
    size_t plain = ac_cuda_group_norm.scratch(p, caps); /* where addresses are not whole vectors */
    return AC_MAX(mine, plain);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, ac_gn *g, const cut &c, float2 *parts)
{
    unsigned tiles = (unsigned)ac_ceil_div(g->channels, g->tile);
    dim3 pieces((unsigned)c.pieces, tiles, (unsigned)g->images);
    dim3 runs((unsigned)ac_ceil_div(g->pixels, c.run), tiles, (unsigned)g->images);
    auto *apply = g->act == AC_ACT_SILU ? apply_kernel<T, true> : apply_kernel<T, false>;
    g->piece = c.piece;
    AC_TRY(ac_cuda_launch(lane, "group_norm parts", parts_kernel<T>, pieces, c.threads, 0, *g,
                          parts));
    g->piece = c.run;
    return ac_cuda_launch(lane, "group_norm", apply, runs, c.threads, 0, *g, parts, c.piece,
                          c.pieces);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_gn g;
    cut c;
    if (!job_of(p, &g, &c) || !ac_gn_aligned(&g)) {
        return ac_cuda_group_norm.launch(lane, p, scratch, prepared);
    }
    float2 *parts = (float2 *)scratch;
    if (g.pixels == 0) {
        return AC_OK;
    }
    return p->output.dtype == AC_F32   ? launch_dtype<float>(lane, &g, c, parts)
           : p->output.dtype == AC_F16 ? launch_dtype<__half>(lane, &g, c, parts)
                                       : launch_dtype<__nv_bfloat16>(lane, &g, c, parts);
}

extern "C" const ac_kernel ac_cuda_group_norm_wide = {
    .name = "cuda.group_norm.wide",
    .op = AC_OP_GROUP_NORM,
    .supports = supports,
    .scratch = scratch,
    .launch = launch,
};
