/* conv2d, 3x3, to eight channels at most: the last convolution of a UNet, of a VAE's halves.
 *
 *     y[n, h, w, o] = act(sum over taps and c of x[n, h + ky - top, w + kx - left, c]
 *                         W[o, ky, kx, c] + b[o]) + residual
 *
 * A library's tile has 32 columns at least.  Here the eight columns of one mma.m16n8k16 are the
 * output channels, and its rows 16 pixels of a line.  A block takes 16 pixels of several lines; 32
 * channels of them and their surroundings, and of the filters, pass through shared memory at a
 * time, some rounds ahead.  In what order k is summed is ours to choose: a lane reads 16 bytes of a
 * pixel and 16 of a filter, its k of two products, and a warp's are one row of all banks.
 * Bound: memory, one read of x. */
#include "element.cuh"
#include "gemm.h"
#include "list.h"
#include "mma.cuh"

static constexpr int WARPS = 4, THREADS = WARPS * 32, CHANNELS = 32, COLUMNS = 8, TAPS = 3;
static constexpr int PIXELS = 16, PITCH = PIXELS + TAPS - 1;
static constexpr int VECTORS = CHANNELS / 8;         /* of 16 bytes, in a pixel's channels */
static constexpr int FILTERS = TAPS * TAPS * COLUMNS; /* pixels' worth of them in a round */
static constexpr int64_t FEW = 1 << 16;              /* pixels: so few make more blocks */

/* LINES: of output, for each warp. */
template <int LINES> struct tile {
    static constexpr int HEIGHT = WARPS * LINES, AROUND = (HEIGHT + TAPS - 1) * PITCH;
    static constexpr int SIZE = (FILTERS + AROUND) * VECTORS; /* vectors of a round */
    static constexpr int ROUNDS = LINES == 1 ? 4 : 2;         /* in shared memory: below 64 KB */
    static constexpr size_t BYTES = (size_t)SIZE * ROUNDS * 16;
    static constexpr int CHAINS = LINES == 1 ? TAPS : 1; /* of products that wait for each other */
    static constexpr int FILTER_COPIES = (FILTERS * VECTORS + THREADS - 1) / THREADS;
    static constexpr int PIXEL_COPIES = (AROUND * VECTORS + THREADS - 1) / THREADS;
};

/* What a thread copies in each round, as it is at channel 0; found once, as a warp that is alone on
 * its scheduler waits out every instruction of an address.  Filters lie as [tap][column], then
 * pixels as [line][pixel]. */
template <typename T, int LINES> struct copies {
    static constexpr int W = tile<LINES>::FILTER_COPIES, X = tile<LINES>::PIXEL_COPIES;
    const T *w, *x; /* of the first filter, and of the block's first pixel */
    int32_t filter[W], pixel[X]; /* elements from there; NONE: past an edge, zeros */
    static constexpr int32_t NONE = INT32_MIN;

    __device__ copies(const ac_gemm &g)
    {
        int64_t y0 = (int64_t)blockIdx.y * tile<LINES>::HEIGHT - g.pad_top;
        int64_t x0 = (int64_t)blockIdx.x * PIXELS - g.pad_left;
        x = (const T *)g.x[0].data + blockIdx.z * g.x[0].n + y0 * g.x[0].h + x0 * g.x[0].w;
        w = (const T *)g.weight;
#pragma unroll
        for (int k = 0; k < W; k++) {
            int i = (int)threadIdx.x + k * THREADS, one = i / VECTORS, tap = one / COLUMNS;
            int64_t at = one % COLUMNS * g.w_row + tap / TAPS * g.w_y + tap % TAPS * g.w_x;
            filter[k] = one % COLUMNS < g.columns ? (int32_t)at + i % VECTORS * 8 : NONE;
        }
#pragma unroll
        for (int k = 0; k < X; k++) {
            int i = (int)threadIdx.x + k * THREADS, one = i / VECTORS;
            int line = one / PITCH, column = one % PITCH;
            bool inside = y0 + line >= 0 && y0 + line < g.height && x0 + column >= 0 &&
                          x0 + column < g.width;
            int64_t at = line * g.x[0].h + column * g.x[0].w;
            pixel[k] = inside ? (int32_t)at + i % VECTORS * 8 : NONE;
        }
    }

    __device__ void
    start(uint4 *round, int32_t c) const
    {
#pragma unroll
        for (int k = 0; k < W; k++) {
            int i = (int)threadIdx.x + k * THREADS;
            if (i < FILTERS * VECTORS) {
                copy(round + i, w, filter[k], c);
            }
        }
#pragma unroll
        for (int k = 0; k < X; k++) {
            int i = (int)threadIdx.x + k * THREADS;
            if (i < tile<LINES>::AROUND * VECTORS) {
                copy(round + FILTERS * VECTORS + i, x, pixel[k], c);
            }
        }
    }

    __device__ static void
    copy(uint4 *to, const T *from, int32_t at, int32_t c)
    {
        bool valid = at != NONE;
        ac_copy_async(ac_shared_address(to), valid ? from + at + c : from, valid);
    }
};

/* A line that was read serves the outputs of three. */
template <typename T, int LINES>
__device__ static inline void
multiply_round(float (&sum)[tile<LINES>::CHAINS][LINES][4], const uint4 *round)
{
    int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x / 32 * LINES;
    const uint4 *x = round + (FILTERS + first * PITCH) * VECTORS + lane;
    uint4 filter[TAPS * TAPS];
#pragma unroll
    for (int tap = 0; tap < TAPS * TAPS; tap++) {
        filter[tap] = round[tap * COLUMNS * VECTORS + lane];
    }
#pragma unroll
    for (int line = 0; line < LINES + TAPS - 1; line++) {
#pragma unroll
        for (int kx = 0; kx < TAPS; kx++) {
            uint4 low = x[(line * PITCH + kx) * VECTORS];
            uint4 high = x[(line * PITCH + kx + 8) * VECTORS];
#pragma unroll
            for (int ky = 0; ky < TAPS; ky++) {
                if (line >= ky && line - ky < LINES) {
                    const uint4 &w = filter[ky * TAPS + kx];
                    float(&to)[4] = sum[kx % tile<LINES>::CHAINS][line - ky];
                    ac_mma<T>(to, {low.x, high.x, low.y, high.y}, w.x, w.y);
                    ac_mma<T>(to, {low.z, high.z, low.w, high.w}, w.z, w.w);
                }
            }
        }
    }
}

__device__ static inline void
write(const ac_gemm &g, int64_t y, int64_t x, int o, float sum)
{
    if (y >= g.out_height || x >= g.out_width || o >= g.columns) {
        return;
    }
    int64_t n = blockIdx.z;
    float v = g.bias ? sum + ac_load(g.bias, g.bias_dtype, o * g.bias_stride) : sum;
    v = ac_act_apply(g.act, v);
    const ac_gemm_image &r = g.residual, &to = g.out;
    if (r.data) {
        v += ac_load(r.data, r.dtype, n * r.n + y * r.h + x * r.w + o * r.c);
    }
    ac_store(ac_cells{(void *)to.data, to.dtype}, n * to.n + y * to.h + x * to.w + o * to.c, v);
}

/* grid: pieces of a line, lines by tiles, images */
template <typename T, int LINES>
__global__ static void __launch_bounds__(THREADS)
narrow_kernel(const __grid_constant__ ac_gemm g)
{
    constexpr int SIZE = tile<LINES>::SIZE, ROUNDS = tile<LINES>::ROUNDS;
    extern __shared__ uint4 shared[];
    float sum[tile<LINES>::CHAINS][LINES][4] = {};
    copies<T, LINES> all(g);
    int rounds = (int)(g.channels[0] / CHANNELS), lane = (int)threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < ROUNDS - 1; i++) {
        if (i < rounds) {
            all.start(shared + i * SIZE, i * CHANNELS);
        }
        ac_copy_commit();
    }
    for (int i = 0; i < rounds; i++) {
        int next = i + ROUNDS - 1;
        ac_copy_wait<ROUNDS - 2>();
        __syncthreads(); /* this round is here, and the slot of the last one is free */
        if (next < rounds) {
            all.start(shared + next % ROUNDS * SIZE, next * CHANNELS);
        }
        ac_copy_commit();
        multiply_round<T, LINES>(sum, shared + i % ROUNDS * SIZE);
    }
    int64_t y = (int64_t)blockIdx.y * tile<LINES>::HEIGHT + threadIdx.x / 32 * LINES;
    int64_t x = (int64_t)blockIdx.x * PIXELS + lane / 4;
#pragma unroll
    for (int i = 0; i < LINES * 4; i++) {
        int k = i % 4;
        float total = sum[0][i / 4][k];
#pragma unroll
        for (int chain = 1; chain < tile<LINES>::CHAINS; chain++) {
            total += sum[chain][i / 4][k];
        }
        write(g, y + i / 4, x + k / 2 * 8, lane % 4 * 2 + k % 2, total);
    }
}

template <typename T, int LINES>
static ac_status
launch_tiles(ac_lane *lane, const ac_gemm &g)
{
    int64_t images = g.rows / ((int64_t)g.out_height * g.out_width);
    dim3 grid((unsigned)ac_ceil_div(g.out_width, PIXELS),
              (unsigned)ac_ceil_div(g.out_height, tile<LINES>::HEIGHT), (unsigned)images);
    return ac_cuda_launch(lane, "conv2d narrow", narrow_kernel<T, LINES>, grid, THREADS,
                          tile<LINES>::BYTES, g);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const ac_gemm &g)
{
    return g.rows < FEW ? launch_tiles<T, 1>(lane, g) : launch_tiles<T, 4>(lane, g);
}

/* Whole 16-byte vectors and rounds, in tensors of one half precision. */
static bool
fits(const ac_gemm &g, int32_t arch)
{
    ac_dtype dtype = g.out.dtype;
    int64_t steps = g.x[0].n | g.x[0].h | g.x[0].w;
    return (dtype == AC_F16 || dtype == AC_BF16) && arch >= (dtype == AC_BF16 ? 80 : 75) &&
           g.x[0].dtype == dtype && g.weight_dtype == dtype && g.channels[1] == 0 &&
           g.channels[0] % CHANNELS == 0 && g.columns <= COLUMNS && g.kernel_h == TAPS &&
           g.kernel_w == TAPS && g.stride == 1 && g.x[0].c == 1 && steps % 8 == 0 && g.rows > 0 &&
           PITCH * 2 * (llabs(g.x[0].h) + llabs(g.x[0].w)) < INT32_MAX && /* a block's pixels */
           ac_ceil_div(g.out_height, tile<1>::HEIGHT) <= 65535 &&
           g.rows / ((int64_t)g.out_height * g.out_width) <= 65535;
}

static bool
supports(const ac_problem *p, const ac_caps *caps)
{
    ac_gemm g;
    return ac_conv_gemm(p, NULL, &g) && fits(g, caps->isa);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *, const void *prepared)
{
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(p, prepared, &g) ||
        ((uintptr_t)g.x[0].data | (uintptr_t)g.weight) % 16 != 0) {
        return ac_cuda_gemm_plain(lane, &g);
    }
    return g.out.dtype == AC_F16 ? launch_dtype<__half>(lane, g)
                                 : launch_dtype<__nv_bfloat16>(lane, g);
}

extern "C" const ac_kernel ac_cuda_conv2d_narrow = {
    .name = "cuda.conv2d.narrow",
    .op = AC_OP_CONV2D,
    .supports = supports,
    .prepared_bytes = ac_conv_prepared_bytes,
    .prepare = ac_conv_prepare,
    .form = AC_FORM_OHWI,
    .launch = launch,
};
