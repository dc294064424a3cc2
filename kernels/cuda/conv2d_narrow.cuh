/* conv2d_narrow: a 3x3 convolution to eight channels at most.
 *
 *     y[n, h, w, o] = act(sum over taps and c of x[n, h + ky - top, w + kx - left, c]
 *                         W[o, ky, kx, c] + b[o])
 *
 * A library's tile has 32 columns at least.  Here the eight columns of one mma.m16n8k16 are the
 * output channels, and its rows 16 pixels of a line.  A block takes 16 pixels of several lines; 32
 * channels of them and their surroundings, and of the filters, pass through shared memory at a
 * time, some rounds ahead.  In what order k is summed is ours to choose: a lane reads 16 bytes of a
 * pixel and 16 of a filter, its k of two products, and a warp's are one row of all banks.
 * Bound: memory, one read of x.
 *
 *     conv2d_narrow.cu   the kernel            tail.cu   with a sampler's row behind it */
#ifndef AC_CUDA_CONV2D_NARROW_CUH
#define AC_CUDA_CONV2D_NARROW_CUH

#include "element.cuh"
#include "gemm.h"
#include "mma.cuh"

static constexpr int WARPS = 4, THREADS = WARPS * 32, CHANNELS = 32, COLUMNS = 8, TAPS = 3;
static constexpr int PIXELS = 16, PITCH = PIXELS + TAPS - 1;
static constexpr int VECTORS = CHANNELS / 8;         /* of 16 bytes, in a pixel's channels */
static constexpr int FILTERS = TAPS * TAPS * COLUMNS; /* pixels' worth of them in a round */
static constexpr int64_t FEW = 1 << 16;              /* pixels: so few make more blocks */

/* LINES: of output, for each warp. */
template <int LINES> struct ac_narrow_tile {
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
template <typename T, int LINES> struct ac_narrow_copies {
    static constexpr int W = ac_narrow_tile<LINES>::FILTER_COPIES;
    static constexpr int X = ac_narrow_tile<LINES>::PIXEL_COPIES;
    const T *w, *x; /* of the first filter, and of the block's first pixel */
    int32_t filter[W], pixel[X]; /* elements from there; NONE: past an edge, zeros */
    static constexpr int32_t NONE = INT32_MIN;

    __device__ ac_narrow_copies(const ac_gemm &g)
    {
        int64_t y0 = (int64_t)blockIdx.y * ac_narrow_tile<LINES>::HEIGHT - g.pad_top;
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
            if (i < ac_narrow_tile<LINES>::AROUND * VECTORS) {
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
ac_narrow_round(float (&sum)[ac_narrow_tile<LINES>::CHAINS][LINES][4], const uint4 *round)
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
                    float(&to)[4] = sum[kx % ac_narrow_tile<LINES>::CHAINS][line - ky];
                    ac_mma<T>(to, {low.x, high.x, low.y, high.y}, w.x, w.y);
                    ac_mma<T>(to, {low.z, high.z, low.w, high.w}, w.z, w.w);
                }
            }
        }
    }
}

/* Of a thread's four outputs in each of its lines, with bias and activation.  All threads of the
 * block; grid: pieces of a line, lines by tiles, images. */
template <typename T, int LINES>
__device__ static inline void
ac_narrow_sums(const ac_gemm &g, uint4 *shared, float (&total)[LINES][4])
{
    constexpr int SIZE = ac_narrow_tile<LINES>::SIZE, ROUNDS = ac_narrow_tile<LINES>::ROUNDS;
    constexpr int CHAINS = ac_narrow_tile<LINES>::CHAINS;
    float sum[CHAINS][LINES][4] = {};
    ac_narrow_copies<T, LINES> all(g);
    int rounds = (int)(g.channels[0] / CHANNELS);
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
        ac_narrow_round<T, LINES>(sum, shared + i % ROUNDS * SIZE);
    }
#pragma unroll
    for (int i = 0; i < LINES * 4; i++) {
        int o = (int)threadIdx.x % 4 * 2 + i % 2;
        float v = sum[0][i / 4][i % 4];
#pragma unroll
        for (int chain = 1; chain < CHAINS; chain++) {
            v += sum[chain][i / 4][i % 4];
        }
        if (g.bias && o < g.columns) {
            v += ac_load(g.bias, g.bias_dtype, o * g.bias_stride);
        }
        total[i / 4][i % 4] = ac_act_apply(g.act, v);
    }
}

/* Where a thread's output i is. */
template <int LINES> struct ac_narrow_place {
    int64_t y, x;
    int o;

    __device__ ac_narrow_place(int i)
    {
        int lane = (int)threadIdx.x % 32;
        y = (int64_t)blockIdx.y * ac_narrow_tile<LINES>::HEIGHT + threadIdx.x / 32 * LINES + i / 4;
        x = (int64_t)blockIdx.x * PIXELS + lane / 4 + i % 4 / 2 * 8;
        o = lane % 4 * 2 + i % 2;
    }

    __device__ bool
    inside(const ac_gemm &g) const
    {
        return y < g.out_height && x < g.out_width && o < g.columns;
    }
};

/* Whole 16-byte vectors and rounds, in tensors of one half precision. */
static inline bool
ac_narrow_fits(const ac_gemm &g, int32_t arch)
{
    ac_dtype dtype = g.out.dtype;
    int64_t steps = g.x[0].n | g.x[0].h | g.x[0].w;
    return (dtype == AC_F16 || dtype == AC_BF16) && arch >= (dtype == AC_BF16 ? 80 : 75) &&
           g.x[0].dtype == dtype && g.weight_dtype == dtype && g.channels[1] == 0 &&
           g.channels[0] % CHANNELS == 0 && g.columns <= COLUMNS && g.kernel_h == TAPS &&
           g.kernel_w == TAPS && g.stride == 1 && g.x[0].c == 1 && steps % 8 == 0 && g.rows > 0 &&
           PITCH * 2 * (llabs(g.x[0].h) + llabs(g.x[0].w)) < INT32_MAX && /* a block's pixels */
           ac_ceil_div(g.out_height, ac_narrow_tile<1>::HEIGHT) <= 65535 &&
           g.rows / ((int64_t)g.out_height * g.out_width) <= 65535;
}

/* Of a convolution that fits: what only its addresses tell. */
static inline bool
ac_narrow_aligned(const ac_gemm &g)
{
    return ((uintptr_t)g.x[0].data | (uintptr_t)g.weight) % 16 == 0;
}

template <int LINES>
static inline dim3
ac_narrow_grid(const ac_gemm &g)
{
    int64_t images = g.rows / ((int64_t)g.out_height * g.out_width);
    return dim3((unsigned)ac_ceil_div(g.out_width, PIXELS),
                (unsigned)ac_ceil_div(g.out_height, ac_narrow_tile<LINES>::HEIGHT),
                (unsigned)images);
}

template <typename T, typename F>
static inline ac_status
ac_narrow_lines(const ac_gemm &g, const F &launch)
{
    return g.rows < FEW ? launch.template operator()<T, 1>() : launch.template operator()<T, 4>();
}

/* launch<T, LINES>() for this convolution: whoever multiplies it sums in the same order. */
template <typename F>
static inline ac_status
ac_narrow_choose(const ac_gemm &g, const F &launch)
{
    return g.out.dtype == AC_F16 ? ac_narrow_lines<__half>(g, launch)
                                 : ac_narrow_lines<__nv_bfloat16>(g, launch);
}

#endif
