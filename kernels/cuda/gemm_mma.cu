/* gemm_mma: ac_gemm on tensor cores (mma.sync, f16 and bf16, f32 sums), sm_75 and later.
 *
 *     global --cp.async, 3 stages of 32 k--> shared --ldmatrix--> mma.sync --> shared --> global
 *
 * A block of 4 warps makes BM rows by BN columns; a warp WM by WN.  A stage holds BM and BN rows of
 * 64 bytes; the 16-byte chunk c of row r lies at c ^ (r / 2 % 4), so the 8 rows that ldmatrix reads
 * at once fall into different banks.  A slice of k never crosses a tap or the end of x or x2, so a
 * row's address is made once a tap.  Gated: of 16 consecutive rows of the weight tile 8 are values
 * and 8 their gates, so both halves of a result meet in one thread.
 *
 * Bound: mma.sync, about 0.6 of what Hopper's wgmma does. */
#include "element.cuh"
#include "gemm.h"
#include "mma.cuh"

static constexpr int DEPTH = 32, STAGES = 3, THREADS = 128, LINES = THREADS / 4;

__device__ static inline int
chunk_at(int row, int chunk)
{
    return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}

__device__ static inline int64_t
slices_of(int64_t channels)
{
    return (channels + DEPTH - 1) / DEPTH;
}

/* What a thread copies: rows threadIdx.x / 4 + LINES i of a tile, always the same 16 bytes of each
 * row's slice. */
template <typename T, int BM, int BN> struct loader {
    const ac_gemm &g;
    uint32_t x_tile, w_tile; /* shared addresses of stage 0; BM and BN rows of 64 bytes */
    /* The input pixel under tap 0; y far below 0: no row. */
    int32_t n[BM / LINES], y[BM / LINES], x[BM / LINES];
    const T *x_row[BM / LINES], *w_row[BN / LINES]; /* NULL: zeros */
    const T *x1, *x2; /* not an array: an index at run time would mean local memory */
    int32_t ky, kx, source; /* where the next slice is */
    int64_t c;
    int64_t w_offset; /* of the tap's and source's first channel in a row of w */

    __device__
    loader(const ac_gemm &gemm, uint32_t shared)
        : g(gemm), x_tile(shared), w_tile(shared + BM * 64), ky(0), kx(0), source(0), c(0),
          w_offset(0)
    {
        int64_t outer = blockIdx.z / g.inner, inner = blockIdx.z % g.inner;
        int32_t top = g.pad_top - (g.phases ? (int32_t)outer : 0);
        int32_t left = g.pad_left - (g.phases ? (int32_t)inner : 0);
        x1 = (const T *)g.x[0].data + outer * g.x[0].batch[0] + inner * g.x[0].batch[1];
        x2 = (const T *)g.x[1].data + outer * g.x[1].batch[0] + inner * g.x[1].batch[1];
#pragma unroll
        for (int i = 0; i < BM / LINES; i++) {
            uint32_t row = blockIdx.x * BM + threadIdx.x / 4 + LINES * i;
            uint32_t line = row / (uint32_t)g.out_width;
            n[i] = (int32_t)(line / (uint32_t)g.out_height);
            y[i] = row < g.rows ? (int32_t)(line % (uint32_t)g.out_height) * g.stride - top
                                : INT32_MIN / 2;
            x[i] = (int32_t)(row % (uint32_t)g.out_width) * g.stride - left;
        }
#pragma unroll
        for (int i = 0; i < BN / LINES; i++) {
            int64_t r = threadIdx.x / 4 + LINES * i, column = (int64_t)blockIdx.y * BN + r;
            bool valid = column < g.columns;
            if (g.gated) {
                column = (int64_t)blockIdx.y * (BN / 2) + r / 16 * 8 + r % 8;
                valid = column < g.columns;
                column += r / 8 % 2 * g.columns;
            }
            w_row[i] = valid ? (const T *)g.weight + outer * g.w_batch[0] + inner * g.w_batch[1] +
                                   column * g.w_row + threadIdx.x % 4 * 8
                             : nullptr;
        }
        enter_tap();
    }

    __device__ void
    enter_tap()
    {
#pragma unroll
        for (int i = 0; i < BM / LINES; i++) {
            int32_t row = y[i] + ky, column = x[i] + kx;
            bool valid = row >= 0 && row < g.height && column >= 0 && column < g.width;
            const ac_gemm_image &image = g.x[source];
            x_row[i] = valid ? (source ? x2 : x1) + n[i] * image.n + row * image.h +
                                   column * image.w + threadIdx.x % 4 * 8
                             : nullptr;
        }
    }

    /* Starts the copies of the next slice into `stage`. */
    __device__ void
    load(int stage)
    {
        bool inside = c + threadIdx.x % 4 * 8 < g.channels[source];
        uint32_t x_to = x_tile + stage * (BM + BN) * 64, w_to = w_tile + stage * (BM + BN) * 64;
        int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < BM / LINES; i++) {
            bool valid = inside && x_row[i];
            ac_copy_async(x_to + chunk_at(row + LINES * i, chunk),
                          valid ? x_row[i] + c : (const T *)g.weight, valid);
        }
#pragma unroll
        for (int i = 0; i < BN / LINES; i++) {
            bool valid = inside && w_row[i];
            ac_copy_async(w_to + chunk_at(row + LINES * i, chunk),
                          valid ? w_row[i] + w_offset + c : (const T *)g.weight, valid);
        }
        c += DEPTH;
        if (c >= g.channels[source]) {
            w_offset += g.channels[source];
            c = 0;
            source = source == 0 && g.channels[1] > 0;
            if (source == 0) {
                kx = kx + 1 < g.kernel_w ? kx + 1 : 0;
                ky += kx == 0;
            }
            enter_tap();
        }
    }
};

/* Where row m of the output begins in an image, columns aside. */
__device__ static inline int64_t
row_at(const ac_gemm &g, const ac_gemm_image &image, uint32_t row)
{
    int64_t outer = blockIdx.z / g.inner, inner = blockIdx.z % g.inner;
    uint32_t line = row / (uint32_t)g.out_width;
    return outer * image.batch[0] + inner * image.batch[1] +
           line / (uint32_t)g.out_height * image.n + line % (uint32_t)g.out_height * image.h +
           row % (uint32_t)g.out_width * image.w;
}

/* Eight neighbours of a row: bias, activation, gate, scale, residual, and out.  `wide` says that
 * 16-byte accesses are right for the tensors. */
template <typename T>
__device__ static inline void
finish_eight(const ac_gemm &g, uint32_t row, int64_t column, const float *value, const float *gate,
             bool wide)
{
    float v[8];
    int64_t out = row_at(g, g.out, row) + column;
    int count = (int)(g.columns - column < 8 ? g.columns - column : 8);
    float scale = g.row_scale ? g.row_scale[blockIdx.z * g.rows + row] : 1.0f;
    alignas(16) T extra[8];
    if (g.residual.data) {
        const T *from = (const T *)g.residual.data + row_at(g, g.residual, row) + column;
        if (wide && count == 8) {
            *(uint4 *)extra = *(const uint4 *)from;
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++) {
                extra[e] = e < count ? from[e] : (T)0.0f;
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
        bool in = e < count;
        float b = g.bias && in ? ac_load(g.bias, g.bias_dtype, (column + e) * g.bias_stride) : 0.0f;
        v[e] = value[e] + b;
        if (g.gated) {
            b = g.bias && in ? ac_load(g.bias, g.bias_dtype,
                                       (g.columns + column + e) * g.bias_stride)
                             : 0.0f;
            v[e] *= ac_act_apply(g.act, gate[e] + b);
        } else {
            v[e] = ac_act_apply(g.act, v[e]);
        }
        v[e] = v[e] * scale + (g.residual.data && in ? (float)extra[e] : 0.0f);
    }
    if (g.out.dtype == AC_F32 && wide && count == 8) {
        float4 *to = (float4 *)((float *)g.out.data + out);
        to[0] = make_float4(v[0], v[1], v[2], v[3]);
        to[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else if (wide && count == 8) {
        *(uint4 *)((T *)g.out.data + out) =
            make_uint4(ac_pack<T>(v[0], v[1]), ac_pack<T>(v[2], v[3]), ac_pack<T>(v[4], v[5]),
                       ac_pack<T>(v[6], v[7]));
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (e < count) {
                ac_store(ac_cells{(void *)g.out.data, g.out.dtype}, out + e, v[e]);
            }
        }
    }
}

/* 16 rows by WN columns of sums, in shared memory, to the output; one warp. */
template <typename T, int BN, int WN>
__device__ static __noinline__ void
finish_rows(const ac_gemm &g, const float *slab, uint32_t row0, int warp_column, bool wide)
{
    int chunks = g.gated ? WN / 16 : WN / 8;
    int64_t column0 = g.gated ? (int64_t)blockIdx.y * (BN / 2) + warp_column / 2
                              : (int64_t)blockIdx.y * BN + warp_column;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < 16 * chunks; i += 32) {
        uint32_t row = row0 + i / chunks;
        int64_t column = column0 + i % chunks * 8;
        const float *value = slab + i / chunks * (WN + 4) + i % chunks * (g.gated ? 16 : 8);
        if (row < g.rows && column < g.columns) {
            finish_eight<T>(g, row, column, value, value + 8, wide);
        }
    }
}

template <typename T, int BM, int BN, int WM, int WN>
__global__ static void __launch_bounds__(THREADS)
gemm_mma_kernel(const __grid_constant__ ac_gemm g, bool wide)
{
    static_assert(BM / WM * (BN / WN) == 4 && (BM + BN) * 64 * STAGES <= 48 * 1024);
    static_assert(4 * 16 * (WN + 4) * 4 <= (BM + BN) * 64 * STAGES);
    __shared__ __align__(128) char shared[(BM + BN) * 64 * STAGES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp / (BN / WN) * WM, warp_column = warp % (BN / WN) * WN;
    int64_t slices = (slices_of(g.channels[0]) + slices_of(g.channels[1])) * g.kernel_h *
                     g.kernel_w;
    loader<T, BM, BN> from(g, ac_shared_address(shared));
    float sum[WM / 16][WN / 8][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < slices) {
            from.load(s);
        }
        ac_copy_commit();
    }
    int stage = 0;
    for (int64_t slice = 0; slice < slices; slice++) {
        ac_copy_wait<STAGES - 2>();
        __syncthreads();
        if (slice + STAGES - 1 < slices) {
            from.load(stage == 0 ? STAGES - 1 : stage - 1);
        }
        ac_copy_commit();
        uint32_t x_tile = from.x_tile + stage * (BM + BN) * 64;
        uint32_t w_tile = from.w_tile + stage * (BM + BN) * 64;
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
            uint32_t a[WM / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; i++) {
                ac_load_matrices(a[i], x_tile + chunk_at(warp_row + 16 * i + lane % 16,
                                                         2 * k + lane / 16));
            }
#pragma unroll
            for (int j = 0; j < WN / 16; j++) {
                uint32_t b[4];
                ac_load_matrices(b, w_tile + chunk_at(warp_column + 16 * j + lane / 16 * 8 +
                                                          lane % 8,
                                                      2 * k + lane / 8 % 2));
#pragma unroll
                for (int i = 0; i < WM / 16; i++) {
                    ac_mma<T>(sum[i][2 * j], a[i], b[0], b[1]);
                    ac_mma<T>(sum[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    ac_copy_wait<0>();
    __syncthreads(); /* the tiles become the warps' slabs */
    float *slab = (float *)shared + warp * 16 * (WN + 4);
#pragma unroll
    for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int j = 0; j < WN / 8; j++) {
            float *to = slab + lane / 4 * (WN + 4) + 8 * j + lane % 4 * 2;
            *(float2 *)to = make_float2(sum[i][j][0], sum[i][j][1]);
            *(float2 *)(to + 8 * (WN + 4)) = make_float2(sum[i][j][2], sum[i][j][3]);
        }
        __syncwarp();
        finish_rows<T, BN, WN>(g, slab, blockIdx.x * BM + warp_row + 16 * i, warp_column, wide);
        __syncwarp();
    }
}

/* ---- when, and how --------------------------------------------------------------------------- */

static bool
by_eights(const ac_gemm_image *i)
{
    return i->n % 8 == 0 && i->h % 8 == 0 && i->w % 8 == 0 && i->batch[0] % 8 == 0 &&
           i->batch[1] % 8 == 0;
}

bool
ac_gemm_mma_fits(const ac_gemm *g, int32_t arch)
{
    ac_dtype dtype = g->x[0].dtype;
    bool residual = g->residual.data, second = g->channels[1] > 0;
    int64_t channels = g->channels[0] + g->channels[1];
    if (!(dtype == AC_F16 && arch >= 75) && !(dtype == AC_BF16 && arch >= 80)) {
        return false;
    }
    return g->weight_dtype == dtype && (!second || g->x[1].dtype == dtype) &&
           (g->out.dtype == dtype || (g->out.dtype == AC_F32 && !residual)) &&
           (!residual || (g->residual.dtype == dtype && g->residual.c == 1)) &&
           g->x[0].c == 1 && (!second || g->x[1].c == 1) && g->out.c == 1 && g->w_c == 1 &&
           by_eights(&g->x[0]) && (!second || by_eights(&g->x[1])) && g->channels[0] % 8 == 0 &&
           g->channels[1] % 8 == 0 && g->w_row % 8 == 0 && g->w_batch[0] % 8 == 0 &&
           g->w_batch[1] % 8 == 0 && (g->kernel_w == 1 || g->w_x == channels) &&
           (g->kernel_h == 1 || g->w_y == g->kernel_w * channels) && g->rows < INT32_MAX / 2 &&
           g->columns < INT32_MAX / 2;
}

static bool
aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

bool
ac_gemm_mma_aligned(const ac_gemm *g)
{
    return aligned(g->x[0].data) && (g->channels[1] == 0 || aligned(g->x[1].data)) &&
           aligned(g->weight);
}

template <typename T, int BM, int BN, int WM, int WN>
static ac_status
launch_tile(ac_lane *lane, const ac_gemm *g)
{
    bool wide = aligned(g->out.data) && by_eights(&g->out) &&
                (!g->residual.data || (aligned(g->residual.data) && by_eights(&g->residual)));
    dim3 grid((unsigned)ac_ceil_div(g->rows, BM),
              (unsigned)ac_ceil_div(g->columns * (g->gated ? 2 : 1), BN), (unsigned)g->batch);
    return ac_cuda_launch(lane, "gemm_mma", gemm_mma_kernel<T, BM, BN, WM, WN>, grid, THREADS, 0,
                          *g, wide);
}

/* Small tiles where large ones would leave most of the chip idle. */
template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const ac_gemm *g)
{
    int64_t blocks = ac_ceil_div(g->rows, 128) *
                     ac_ceil_div(g->columns * (g->gated ? 2 : 1), 128) * g->batch;
    if (blocks < 100 || g->columns <= 64) {
        return launch_tile<T, 64, 64, 32, 32>(lane, g);
    }
    return launch_tile<T, 128, 128, 64, 64>(lane, g);
}

ac_status
ac_cuda_gemm_mma(ac_lane *lane, const ac_gemm *g)
{
    return g->x[0].dtype == AC_F16 ? launch_dtype<__half>(lane, g)
                                   : launch_dtype<__nv_bfloat16>(lane, g);
}

bool
ac_gemm_is_fast(const ac_gemm *g)
{
    return ac_gemm_mma_fits(g, g->x[0].dtype == AC_BF16 ? 80 : 75) && ac_gemm_mma_aligned(g);
}

ac_status
ac_cuda_gemm_own(ac_lane *lane, const ac_gemm *g)
{
    return ac_gemm_is_fast(g) ? ac_cuda_gemm_mma(lane, g) : ac_cuda_gemm_plain(lane, g);
}
