/* group_norm of halves in one launch, on GPUs with clusters (sm_90 and later), where a cluster's
 * registers hold a tile of channels: see group_norm.cu for the formula, group_norm.cuh for what a
 * thread does.
 *
 *     loads -> registers -> statistics -> the cluster's blocks tell each other -> result
 *
 * A cluster takes a tile of channels of one image, whole groups; each block keeps its pixels and
 * writes what it found into its own place in the shared memory of all of them, where each merges
 * all in the same order.  A vector lies in two groups at most, and its statistics are two pairs of
 * sums around pivots that a block's threads have in common: adding is all the merging up to there.
 * Bound: memory, one read and one write of the tensor. */
#include "group_norm.cuh"
#include "mma.cuh"

static constexpr int THREADS = 320;     /* of a block at most */
static constexpr int WIDE = 8;          /* halves of a vector */
static constexpr int MOST_BLOCKS = 8;   /* of a cluster: more are not portable */
static constexpr int MOST_COLUMNS = 64; /* vectors of a tile */
static constexpr int MOST_GROUPS = 32;  /* of a tile */
static constexpr int MOST_VECTORS = 16; /* of a thread */

/* Threads of so many vectors that a multiprocessor holds at once, as the compiler is told: several
 * blocks, since clusters of blocks that each need a whole one leave many of them empty. */
static constexpr int
threads_at_once(int vectors)
{
    return vectors > 8 ? 512 : vectors > 4 ? 640 : vectors > 1 ? 768 : 1024;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/* ---- blocks that write into each other's shared memory --------------------------------------- */

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
    uint32_t at = ac_shared_address(arrived);
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
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address_in(ac_shared_address(to), rank)),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w),
                 "r"(address_in(ac_shared_address(arrived), rank))
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
                     : "r"(ac_shared_address(arrived))
                     : "memory");
    }
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* What the threads of a block share.  A pair of groups: sum and squares, or mean and squares, of
 * the first in x and y, of the second in z and w. */
struct memory {
    float4 thread[THREADS + MOST_COLUMNS];      /* [column][rows + 1] */
    float4 column[MOST_BLOCKS][MOST_COLUMNS];   /* of every block of the cluster, who writes it */
    float2 pivot[MOST_COLUMNS], moments[MOST_GROUPS]; /* mean, 1 / sqrt(variance + eps) */
    uint64_t arrived;
};

template <typename T>
__device__ static inline float4
pair_of(const ac_gn_sums<T> &sums, int32_t split)
{
    float4 p = {};
#pragma unroll
    for (int e = 0; e < ac_wide<T>; e++) {
        if (e < split) {
            p.x += sums.sum[e];
            p.y += sums.squares[e];
        } else {
            p.z += sums.sum[e];
            p.w += sums.squares[e];
        }
    }
    return p;
}

/* A thread's pixels, around the block's first one. */
template <typename T, int V>
__device__ static inline void
thread_pair(memory &s, const ac_gn_place<T> &at, const ac_gn_run<V> &run, uint4 near, uint4 shift,
            int32_t first, int32_t to)
{
    float v[ac_wide<T>], move[ac_wide<T>];
    ac_unpack_wide<T>(v, near);
    ac_unpack_wide<T>(move, shift);
    float2 pivot = make_float2(v[0] + move[0], v[ac_wide<T> - 1] + move[ac_wide<T> - 1]);
    ac_gn_sums<T> sums(shift);
#pragma unroll
    for (int e = 0; e < ac_wide<T>; e++) {
        sums.pivot[e] = (e < at.split ? pivot.x : pivot.y) - move[e];
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
        if (i == 0 || first + i * at.rows < to) {
            sums.add(run.raw[i]);
        }
    }
    s.thread[(int32_t)threadIdx.x * (at.rows + 1) + at.y] = pair_of(sums, at.split);
    if (at.y == 0) {
        s.pivot[threadIdx.x] = pivot;
    }
}

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
    float first = ac_quotient(1.0f, (float)(pixels * split));
    float second = rest ? ac_quotient(1.0f, (float)(pixels * rest)) : 0.0f;
    return make_float4(s.pivot[x].x + p.x * first, fmaxf(p.y - p.x * p.x * first, 0.0f),
                       s.pivot[x].y + p.z * second, fmaxf(p.w - p.z * p.z * second, 0.0f));
}

/* Of one group over the cluster's columns, by a warp. */
template <typename T>
__device__ static inline float3
group_moments(const memory &s, const ac_gn &g, const ac_gn_place<T> &at, int32_t group)
{
    int32_t from = group * g.group_channels, to = from + g.group_channels;
    int32_t x0 = from / ac_wide<T>, x1 = (to - 1) / ac_wide<T>;
    int32_t blocks = (int32_t)gridDim.x, log2 = __ffs(blocks) - 1; /* blocks: a power of two */
    int32_t rank = at.lane() & (blocks - 1);
    int32_t pixels = max(min(g.piece, g.pixels - rank * g.piece), 0);
    float4 near = s.column[0][x0];
    ac_moments_sum<float> all(x0 * ac_wide<T> < from ? near.z : near.x);
#pragma unroll 1
    for (int32_t i = at.lane(); i < (x1 - x0 + 1) * blocks; i += 32) {
        int32_t x = x0 + (i >> log2), c = x * ac_wide<T>;
        int32_t count = pixels * (min(c + ac_wide<T>, to) - max(c, from));
        float4 p = s.column[rank][x];
        bool second = c < from;
        all.add((float)count, second ? p.z : p.x, second ? p.w : p.y);
    }
    return all.warp();
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* grid: blocks of a cluster, tiles, images */
template <typename T, int V, bool SILU>
__global__ static void __launch_bounds__(threads_at_once(V))
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
    ac_gn_run<1> near;
    ac_gn_affine<T, SILU> affine;
    if (active) {
        at.load(near, from, from, to);
        at.load(run, first, first, to);
        affine.load(g, at);
    }
    __cluster_barrier_wait(); /* all blocks run: their memory may be written */
    if (active) {
        thread_pair(s, at, run, near.raw[0], affine.shift, first, to);
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t x = at.warp(); x < at.channels / ac_wide<T>; x += at.warps()) {
        float4 means = column_means(s, g, at, x, to - from);
        if (at.lane() < (int32_t)gridDim.x) {
            send(&s.column[blockIdx.x][x], &s.arrived, (uint32_t)at.lane(), means);
        }
    }
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
    __syncthreads(); /* nor does a block end before all that is sent to it has come */
    if (active) {
        affine.set(g, at, s.moments);
        affine.store(g, at, run, first, to);
    }
}

#else /* an architecture without clusters: launch() leaves it alone */

template <typename T, int V, bool SILU>
__global__ static void
cluster_kernel(const __grid_constant__ ac_gn)
{
}

#endif

/* ---- when, and how --------------------------------------------------------------------------- */

/* How the tensor is cut. */
struct cut {
    int32_t blocks, vectors; /* of a cluster, 2 at least; of a thread */
    int32_t tile, piece;     /* channels and pixels of a block */
    dim3 threads;
};

/* There is code for 1, 2, 4, 8, 12 and 16 vectors of a thread: the next. */
static constexpr int32_t
more_vectors(int32_t v)
{
    return v < 4 ? v * 2 : v + 4;
}

/* In nanoseconds, from some 200 cuts that were measured; -1: blocks would take turns, or a
 * multiprocessor hold so much that two launches are as fast.  Pairs fill the GPU, larger clusters
 * leave some of it empty and so share the rest.  Of 128 multiprocessors whatever is here: results
 * depend on the cut. */
static int64_t
cost_of(const ac_gn *g, const cut &c)
{
    int64_t threads = (int64_t)c.threads.x * c.threads.y;
    int64_t all = ac_ceil_div(g->channels, c.tile) * c.blocks * AC_MAX(g->images, (int64_t)1);
    int64_t each = ac_ceil_div(all, 128), held = each * threads * c.vectors;
    if (each * threads > threads_at_once(c.vectors) || held > (c.blocks == 2 ? 5120 : 4096)) {
        return -1;
    }
    int64_t merges = ac_ceil_div(c.threads.x, threads / 32);
    int64_t moves = held * (c.threads.x < 4 ? 9 : 7) / 4; /* less than 64 bytes of a pixel */
    return 1500 + moves + each * 300 + merges * 350 + c.blocks * 70;
}

/* The best cut in tiles of so many channels, where it is better than *best. */
static void
cut_tile(const ac_gn *g, int32_t tile, int64_t *least, cut *best)
{
    int32_t width = tile / WIDE;
    for (int32_t rows = 1; rows * width <= THREADS; rows *= 2) {
        for (int32_t blocks = 2; blocks <= MOST_BLOCKS; blocks *= 2) {
            int64_t piece = ac_ceil_div(g->pixels, blocks), needed = ac_ceil_div(piece, rows);
            if (rows * width * 4 <= THREADS || needed > MOST_VECTORS) {
                continue;
            }
            int32_t vectors = 1;
            while (vectors < needed) {
                vectors = more_vectors(vectors);
            }
            cut c = {blocks, vectors, tile, (int32_t)piece, dim3((unsigned)width, (unsigned)rows)};
            int64_t cost = cost_of(g, c);
            if (cost >= 0 && cost < *least) {
                *least = cost;
                *best = c;
            }
        }
    }
}

static bool
job_of(const ac_problem *p, ac_gn *g, cut *best)
{
    int64_t least = INT64_MAX;
    *best = {};
    if (p->output.dtype == AC_F32 || !ac_gn_of(p, g) ||
        (g->group_channels < WIDE && g->group_channels * 2 != WIDE)) {
        return false; /* a vector in three groups */
    }
    for (int32_t wanted = 1; wanted <= g->channels;) {
        int32_t tile = ac_gn_tile(g, WIDE, wanted, MOST_COLUMNS, MOST_GROUPS);
        if (tile < wanted) {
            break; /* the largest was had already */
        }
        cut_tile(g, tile, &least, best);
        wanted = tile + 1;
    }
    g->tile = best->tile;
    g->piece = best->piece;
    return least < INT64_MAX;
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gn g;
    cut c;
    return caps->isa >= 90 && caps->workers >= 2 * MOST_BLOCKS && job_of(p, &g, &c);
}

/* That of two launches, for addresses that are no whole vectors. */
static size_t
scratch(const ac_problem *p, const ac_caps *caps)
{
    return ac_cuda_group_norm_wide.scratch(p, caps);
}

using kernel_type = void (*)(ac_gn);

template <typename T, int V = 1>
static kernel_type
kernel_of(const ac_gn &g, const cut &c)
{
    if constexpr (V < MOST_VECTORS) {
        if (c.vectors > V) {
            return kernel_of<T, more_vectors(V)>(g, c);
        }
    }
    return g.act == AC_ACT_SILU ? cluster_kernel<T, V, true> : cluster_kernel<T, V, false>;
}

/* *ran: whether it did.  A library that was built for older GPUs alone has no code for clusters,
 * on whatever GPU it runs. */
static ac_status
launch_cluster(ac_lane *lane, kernel_type kernel, const ac_gn &g, const cut &c, bool *ran)
{
    int previous;
    cudaFuncAttributes code = {};
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
    cudaError_t status = cudaFuncGetAttributes(&code, (const void *)kernel);
    *ran = status != cudaSuccess || code.ptxVersion >= 90;
    if (status == cudaSuccess && *ran) {
        status = cudaLaunchKernelEx(&config, kernel, g);
    }
    return ac_cuda_leave(lane, previous, ac_cuda_launched(lane, status, "group_norm"));
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    ac_gn g;
    cut c;
    bool ran = false;
    if (job_of(p, &g, &c) && ac_gn_aligned(&g)) {
        if (g.pixels == 0 || g.images == 0) {
            return AC_OK;
        }
        kernel_type kernel = p->output.dtype == AC_F16 ? kernel_of<__half>(g, c)
                                                       : kernel_of<__nv_bfloat16>(g, c);
        AC_TRY(launch_cluster(lane, kernel, g, c, &ran));
    }
    return ran ? AC_OK : ac_cuda_group_norm_wide.launch(lane, p, scratch, prepared);
}

extern "C" const ac_kernel ac_cuda_group_norm_cluster = {
    .name = "cuda.group_norm.cluster",
    .op = AC_OP_GROUP_NORM,
    .supports = supports,
    .scratch = scratch,
    .launch = launch,
};
