/* group_norm of whole 16-byte vectors in one launch, on GPUs with clusters (sm_90 and later): see
 * group_norm.cu for the formula, group_norm.cuh for what a thread does.
 *
 *     loads -> registers -> statistics -> the cluster's blocks tell each other -> result
 *
 * A cluster takes a tile of channels of one image, whole groups; each block keeps its pixels in
 * registers and writes what it found into the shared memory of all of them.  A vector lies in two
 * groups at most, and its statistics are two pairs of sums around pivots that a block's threads
 * have in common: adding is all the merging up to there.
 * Bound: memory, one read and one write of the tensor. */
#include "group_norm.cuh"

static constexpr unsigned THREADS = 512; /* of a block at most */
static constexpr int MOST_BLOCKS = 8;    /* of a cluster: more are not portable */
static constexpr int MOST_COLUMNS = 64;  /* vectors of a tile */
static constexpr int MOST_GROUPS = 32;   /* of a tile */
static constexpr int MOST_VECTORS = 16;  /* of a thread: registers */

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/* ---- blocks that write into each other's shared memory --------------------------------------- */

__device__ static inline uint32_t
shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* The same place in block `rank` of the cluster. */
__device__ static inline uint32_t
address_in(uint32_t address, uint32_t rank)
{
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* `bytes` will come from anywhere in the cluster; before the cluster's first barrier. */
__device__ static inline void
expect(uint64_t *arrived, uint32_t bytes)
{
    uint32_t at = shared_address(arrived);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}

/* 16 bytes, counted by the receiver's barrier: no fence, and nobody waits but who reads. */
__device__ static inline void
send(float4 *to, uint64_t *arrived, uint32_t rank, float4 v)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address_in(shared_address(to), rank)),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w),
                 "r"(address_in(shared_address(arrived), rank))
                 : "memory");
}

__device__ static inline void
wait_for(uint64_t *arrived)
{
    uint32_t done = 0;
    while (!done) {
        asm volatile("{ .reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(arrived))
                     : "memory");
    }
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* What the threads of a block share.  A pair of groups: sum and squares, or mean and squares, of
 * the first in x and y, of the second in z and w. */
struct memory {
    float4 thread[THREADS + MOST_COLUMNS];      /* [column][rows + 1] */
    float4 column[MOST_BLOCKS][MOST_COLUMNS];   /* of every block of the cluster */
    float2 pivot[MOST_COLUMNS], moments[MOST_GROUPS]; /* mean, 1 / sqrt(variance + eps) */
    uint64_t arrived;
};

/* A thread's channels around the pivots. */
template <typename T> struct pivot_sums {
    float move[ac_wide<T>], sum[ac_wide<T>], squares[ac_wide<T>];

    __device__ void
    start(uint4 shift, int32_t split, float2 pivot)
    {
        ac_unpack_wide<T>(move, shift);
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++) {
            move[e] -= e < split ? pivot.x : pivot.y;
            sum[e] = squares[e] = 0.0f;
        }
    }

    __device__ void
    add(uint4 raw)
    {
        float v[ac_wide<T>];
        ac_unpack_wide<T>(v, raw);
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++) {
            float d = v[e] + move[e];
            sum[e] += d;
            squares[e] += d * d;
        }
    }

    __device__ float4
    pair(int32_t split) const
    {
        float4 p = {};
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++) {
            if (e < split) {
                p.x += sum[e];
                p.y += squares[e];
            } else {
                p.z += sum[e];
                p.w += squares[e];
            }
        }
        return p;
    }
};

/* Of one column of vectors over `pixels` of a block, by a warp: from sums to means. */
template <typename T>
__device__ static inline float4
column_means(const memory &s, const ac_gn &g, const ac_gn_place<T> &at, int32_t x, int32_t pixels)
{
    float4 p = {};
    if (pixels == 0) {
        return p;
    }
#pragma unroll 4
    for (int32_t y = at.lane(); y < min(at.rows, pixels); y += 32) {
        float4 one = s.thread[x * (at.rows + 1) + y];
        p.x += one.x;
        p.y += one.y;
        p.z += one.z;
        p.w += one.w;
    }
    p.x = ac_reduce_warp(p.x, ac_sum_of());
    p.y = ac_reduce_warp(p.y, ac_sum_of());
    p.z = ac_reduce_warp(p.z, ac_sum_of());
    p.w = ac_reduce_warp(p.w, ac_sum_of());
    int32_t c = x * ac_wide<T>, end = (at.group_of(g, c) + 1) * g.group_channels;
    int32_t split = min(end - c, ac_wide<T>), rest = ac_wide<T> - split;
    float first = __fdividef(1.0f, (float)(pixels * split));
    float second = rest ? __fdividef(1.0f, (float)(pixels * rest)) : 0.0f;
    return make_float4(s.pivot[x].x + p.x * first, fmaxf(p.y - p.x * p.x * first, 0.0f),
                       s.pivot[x].y + p.z * second, fmaxf(p.w - p.z * p.z * second, 0.0f));
}

/* Of one group over the cluster's columns, by a warp. */
template <typename T>
__device__ static inline float3
group_moments(const memory &s, const ac_gn &g, const ac_gn_place<T> &at, int32_t group)
{
    int32_t from = group * g.group_channels, to = from + g.group_channels;
    int32_t x0 = from / ac_wide<T>, x1 = (to - 1) / ac_wide<T>, blocks = (int32_t)gridDim.x;
    int32_t rank = at.lane() & (blocks - 1); /* blocks: a power of two */
    int32_t pixels = max(min(g.piece, g.pixels - rank * g.piece), 0);
    float4 near = s.column[0][x0];
    ac_moments_sum all(x0 * ac_wide<T> < from ? near.z : near.x);
#pragma unroll 1
    for (int32_t i = at.lane(); i < (x1 - x0 + 1) * blocks; i += 32) {
        int32_t x = x0 + (i >> g.blocks_log2), c = x * ac_wide<T>;
        int32_t count = pixels * (min(c + ac_wide<T>, to) - max(c, from));
        float4 p = s.column[rank][x];
        bool second = c < from;
        all.add((float)count, second ? p.z : p.x, second ? p.w : p.y);
    }
    return all.warp();
}

/* Floats are counted twice, the second time around the mean: as many digits as they have are lost
 * where the first pixel is far from the others, which halves do not notice. */
template <typename T> static constexpr int PASSES = sizeof(T) == 4 ? 2 : 1;

/* The block's part, sent to all. */
template <typename T, int V>
__device__ static inline void
statistics(memory &s, const ac_gn &g, const ac_gn_place<T> &at, const ac_gn_run<V> &run,
           uint4 pivot, uint4 shift, int32_t first, int32_t to, int32_t pixels)
{
    float2 around;
    if (at.active && pixels) {
        float v[ac_wide<T>], move[ac_wide<T>];
        ac_unpack_wide<T>(v, pivot);
        ac_unpack_wide<T>(move, shift);
        around = make_float2(v[0] + move[0], v[ac_wide<T> - 1] + move[ac_wide<T> - 1]);
    }
    for (int pass = 0;; pass++) {
        if (at.active && first < to) {
            pivot_sums<T> sums;
            sums.start(shift, at.split, around);
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (i == 0 || first + i * at.rows < to) {
                    sums.add(run.raw[i]);
                }
            }
            s.thread[(int32_t)threadIdx.x * (at.rows + 1) + at.y] = sums.pair(at.split);
            if (at.y == 0 && pass == 0) {
                s.pivot[threadIdx.x] = around;
            }
        }
        __syncthreads();
        bool last = pass == PASSES<T> - 1;
#pragma unroll 1
        for (int32_t x = at.warp(); x < at.channels / ac_wide<T>; x += at.warps()) {
            float4 means = column_means(s, g, at, x, pixels);
            if (!last && at.lane() == 0) { /* the other lanes read the old one */
                s.pivot[x] = make_float2(means.x, means.z);
            } else if (last && at.lane() < (int32_t)gridDim.x) {
                send(&s.column[blockIdx.x][x], &s.arrived, (uint32_t)at.lane(), means);
            }
        }
        if (last) {
            return;
        }
        __syncthreads();
        around = s.pivot[threadIdx.x];
    }
}

/* grid: blocks of a cluster, tiles, images */
template <typename T, int V, bool SILU>
__global__ static void __launch_bounds__(THREADS)
cluster_kernel(const __grid_constant__ ac_gn g)
{
    __shared__ memory s;
    ac_gn_place<T> at(g, blockIdx);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        expect(&s.arrived, gridDim.x * (uint32_t)(at.channels / ac_wide<T>) * sizeof(float4));
    }
    __cluster_barrier_arrive_relaxed();
    int32_t from = min((int32_t)blockIdx.x * g.piece, g.pixels), to = min(from + g.piece, g.pixels);
    int32_t first = from + at.y;
    bool active = at.active && first < to;
    ac_gn_run<V> run;
    ac_gn_run<1> pivot;
    ac_gn_affine<T, SILU> affine;
    if (active) {
        at.load(pivot, from, from, to);
        at.load(run, first, first, to);
        affine.load(g, at);
    }
    __cluster_barrier_wait(); /* all blocks run: their memory may be written */
    statistics(s, g, at, run, pivot.raw[0], affine.shift, first, to, to - from);
    run.keep_packed();
    if (at.warp() < at.groups(g)) {
        wait_for(&s.arrived);
    }
#pragma unroll 1
    for (int32_t group = at.warp(); group < at.groups(g); group += at.warps()) {
        float3 all = group_moments(s, g, at, group);
        if (at.lane() == 0) {
            s.moments[group] = ac_gn_moments(g, all);
        }
    }
    __syncthreads();
    if (active) {
        affine.set(g, at, s.moments);
        affine.store(g, at, run, first, to);
    }
}

#else /* an architecture without clusters: supports() leaves it alone */

template <typename T, int V, bool SILU>
__global__ static void
cluster_kernel(const __grid_constant__ ac_gn)
{
}

#endif

/* ---- when, and how --------------------------------------------------------------------------- */

static constexpr int WORKERS = 128; /* multiprocessors, about: results depend on sizes alone */

/* How the tensor is cut. */
struct cut {
    int32_t blocks, vectors; /* of a cluster; of a thread */
    dim3 threads;
};

/* Few blocks leave multiprocessors idle, many take turns: a turn is what a launch and the exchange
 * take and what a vector does, in microseconds. */
static double
cost_of(const ac_gn *g, int32_t blocks, int32_t vectors)
{
    int64_t all = ac_ceil_div(g->channels, g->tile) * blocks * AC_MAX(g->images, (int64_t)1);
    return (double)ac_ceil_div(all, WORKERS) * (1.5 + 0.3 * vectors);
}

static bool
job_of(const ac_problem *p, ac_gn *g, cut *best)
{
    int32_t wide = 16 / (int32_t)ac_dtype_size(p->output.dtype), chosen = 0;
    double least = 1e30;
    if (!ac_gn_of(p, g) || (g->group_channels < wide && g->group_channels * 2 != wide)) {
        return false; /* a vector in three groups */
    }
    for (int32_t wanted = 1; wanted <= g->channels; wanted = g->tile + 1) {
        g->tile = ac_gn_tile(g, wide, wanted, MOST_COLUMNS, MOST_GROUPS);
        if (g->tile < wanted) {
            break;
        }
        int32_t width = g->tile / wide, rows = 1; /* as pixels: often a power of two */
        while (2 * rows * width <= (int32_t)THREADS) {
            rows *= 2;
        }
        for (int32_t log2 = 0; 1 << log2 <= MOST_BLOCKS; log2++) {
            int64_t piece = ac_ceil_div(g->pixels, 1 << log2);
            int32_t vectors = (int32_t)AC_MAX(ac_ceil_div(piece, rows), (int64_t)1);
            double cost = cost_of(g, 1 << log2, vectors);
            if (vectors <= MOST_VECTORS && cost < least) {
                least = cost;
                chosen = g->tile;
                g->piece = (int32_t)piece;
                g->blocks_log2 = log2;
                *best = cut{1 << log2, vectors, dim3((unsigned)width, (unsigned)rows)};
            }
        }
    }
    g->tile = chosen;
    return chosen > 0;
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gn g;
    cut c;
    return caps->isa >= 90 && job_of(p, &g, &c);
}

static size_t
scratch(const ac_problem *p, const ac_caps *caps)
{
    return ac_cuda_group_norm.scratch(p, caps); /* where addresses are not whole vectors */
}

static ac_status
launch_cluster(ac_lane *lane, void (*kernel)(ac_gn), const ac_gn &g, const cut &c)
{
    int previous;
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)c.blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3((unsigned)c.blocks, (unsigned)ac_ceil_div(g.channels, g.tile),
                          (unsigned)g.images);
    config.blockDim = c.threads;
    config.stream = lane->stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    AC_TRY(ac_cuda_enter(lane, &previous));
    cudaError_t status = cudaLaunchKernelEx(&config, kernel, g);
    return ac_cuda_leave(lane, previous, ac_cuda_launched(lane, status, "group_norm"));
}

/* Code for 1, 2, 4, 7, 11 and 16 vectors. */
template <typename T, int V>
static ac_status
launch_vectors(ac_lane *lane, const ac_gn &g, const cut &c)
{
    if constexpr (V < MOST_VECTORS) {
        if (c.vectors > V) {
            constexpr int NEXT = V + V / 2 + 1;
            return launch_vectors<T, NEXT < MOST_VECTORS ? NEXT : MOST_VECTORS>(lane, g, c);
        }
    }
    bool silu = g.act == AC_ACT_SILU;
    return launch_cluster(lane, silu ? cluster_kernel<T, V, true>
                                     : cluster_kernel<T, V, false>, g, c);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_gn g;
    cut c;
    if (!job_of(p, &g, &c) || !ac_gn_aligned(&g)) {
        return ac_cuda_group_norm.launch(lane, p, scratch, prepared);
    }
    if (g.pixels == 0 || g.images == 0) {
        return AC_OK;
    }
    return p->output.dtype == AC_F32   ? launch_vectors<float, 1>(lane, g, c)
           : p->output.dtype == AC_F16 ? launch_vectors<__half, 1>(lane, g, c)
                                       : launch_vectors<__nv_bfloat16, 1>(lane, g, c);
}

extern "C" const ac_kernel ac_cuda_group_norm_cluster = {
    .name = "cuda.group_norm.cluster",
    .op = AC_OP_GROUP_NORM,
    .supports = supports,
    .scratch = scratch,
    .launch = launch,
};
