/* group_norm by 16-byte vectors: what the kernel of one launch (group_norm_cluster.cu) and that of
 * two (group_norm_wide.cu) share; see group_norm.cu for the formula.
 *
 * A block takes some pixels of a tile of channels, whole groups and whole vectors; a thread keeps
 * one vector's channels.  Sums run around a value of the tensor, which loses no digits to a large
 * mean, and are merged in an order that depends on the sizes alone. */
#ifndef AC_CUDA_GROUP_NORM_CUH
#define AC_CUDA_GROUP_NORM_CUH

#include "list.h"
#include "reduce.cuh"
#include "vector.cuh"

struct ac_gn_image {
    const void *data;
    int64_t n, pixel; /* strides */
};

/* gamma, beta, shift: contiguous, of the tensor's dtype */
struct ac_gn {
    ac_gn_image x, x2, y;
    const void *gamma, *beta, *shift; /* shift: NULL or [images][channels], `shift_n` apart */
    int64_t shift_n, images;
    int32_t pixels, c1, channels, groups, group_channels;
    int32_t tile;  /* channels of a block */
    int32_t piece; /* pixels of a block */
    uint32_t inverse; /* 2^32 / group_channels, rounded up; 0 for 1 */
    float eps, scale;
    ac_act act; /* none or SiLU */
};

/* Loads in flight of one thread: vectors at pixels y, y + height ... of a block's piece. */
template <int V> struct ac_gn_run {
    uint4 raw[V];

    /* Keeps the compiler from keeping what it has unpacked, which is twice as many registers. */
    __device__ void
    keep_packed()
    {
#pragma unroll
        for (int i = 0; i < V; i++) {
            asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
        }
    }
};

/* What a thread works on.  Threads are (vectors of a tile, rows of pixels). */
template <typename T> struct ac_gn_place {
    int32_t rows, y, c;   /* own row; own first channel in the tile */
    int32_t c0, channels; /* of the tile: first, how many */
    int32_t group, split; /* that of channel c in the tile; how many of the vector it has */
    int64_t n, step;      /* image; elements from pixel to pixel of `from` */
    const T *from;        /* own vector at pixel 0 */
    bool active;

    /* block: piece, tile, image */
    __device__ ac_gn_place(const ac_gn &g, uint3 block)
    {
        rows = (int32_t)blockDim.y;
        y = (int32_t)threadIdx.y;
        c = (int32_t)threadIdx.x * ac_wide<T>;
        c0 = (int32_t)block.y * g.tile;
        channels = min(g.tile, g.channels - c0);
        group = group_of(g, c);
        split = min((group + 1) * g.group_channels - c, ac_wide<T>);
        n = block.z;
        active = c < channels;
        bool second = c0 + c >= g.c1;
        const ac_gn_image &i = second ? g.x2 : g.x;
        step = i.pixel;
        from = (const T *)i.data + n * i.n + (c0 + c - (second ? g.c1 : 0));
    }

    __device__ static int32_t
    group_of(const ac_gn &g, int32_t c)
    {
        return g.inverse ? (int32_t)__umulhi((uint32_t)c, g.inverse) : c;
    }

    __device__ int32_t
    groups(const ac_gn &g) const
    {
        return group_of(g, channels);
    }

    /* Whole warps alone merge: none is the last of a block that has no multiple of 32. */
    __device__ static int32_t
    warps()
    {
        return (int32_t)(blockDim.x * blockDim.y) / 32;
    }

    __device__ static int32_t
    warp()
    {
        int32_t w = (int32_t)(threadIdx.y * blockDim.x + threadIdx.x) / 32;
        return w < warps() ? w : 1 << 30;
    }

    __device__ static int32_t
    lane()
    {
        return (int32_t)(threadIdx.y * blockDim.x + threadIdx.x) % 32;
    }

    /* A pixel beyond the piece is the thread's first again: code without branches. */
    template <int V>
    __device__ void
    load(ac_gn_run<V> &run, int32_t pixel, int32_t first, int32_t to) const
    {
#pragma unroll
        for (int i = 0; i < V; i++) {
            int32_t p = pixel + i * rows;
            run.raw[i] = *(const uint4 *)(from + (p < to ? p : first) * step);
        }
    }
};

template <typename T>
__device__ static inline uint4
ac_gn_shift(const ac_gn &g, const ac_gn_place<T> &at)
{
    return g.shift ? *(const uint4 *)((const T *)g.shift + at.n * g.shift_n + at.c0 + at.c)
                   : make_uint4(0, 0, 0, 0);
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* Of a thread's channels. */
template <typename T> struct ac_gn_sums {
    using S = ac_moments_type<T>;
    float pivot[ac_wide<T>];
    S sum[ac_wide<T>], squares[ac_wide<T>];

    __device__ explicit ac_gn_sums(uint4 near)
    {
        ac_unpack_wide<T>(pivot, near);
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++) {
            sum[e] = squares[e] = 0;
        }
    }

    __device__ void
    add(uint4 raw)
    {
        float v[ac_wide<T>];
        ac_unpack_wide<T>(v, raw);
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++) {
            S d = v[e] - pivot[e];
            sum[e] += d;
            squares[e] += d * d;
        }
    }
};

/* ---- application ----------------------------------------------------------------------------- */

/* SiLU of halves.  Its exponential and division would take longer than the memory: the fast ones
 * are good to more digits than a half has, two neighbours share a reciprocal (of at most 2^114),
 * and what comes is z times -log2(e) already, of which `scale` takes the factor away again. */
template <int N>
__device__ static inline void
ac_gn_silu_fast(float (&z)[N], float scale)
{
#pragma unroll
    for (int e = 0; e < N; e += 2) {
        float each;
        float a = ac_exp2_fast(fminf(z[e], 57.0f)) + 1.0f;
        float b = ac_exp2_fast(fminf(z[e + 1], 57.0f)) + 1.0f;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(each) : "f"(a * b));
        each *= scale;
        z[e] *= each * b;
        z[e + 1] *= each * a;
    }
}

/* A thread's channels: y = act((v - mean) by + add) scale. */
template <typename T, bool SILU> struct ac_gn_affine {
    static constexpr bool FAST = SILU && sizeof(T) == 2;
    static constexpr float LOG2E = 1.44269504f;
    uint4 gamma, beta, shift;
    float mean[ac_wide<T>], by[ac_wide<T>], add[ac_wide<T>];

    __device__ void
    load(const ac_gn &g, const ac_gn_place<T> &at)
    {
        gamma = *(const uint4 *)((const T *)g.gamma + at.c0 + at.c);
        beta = *(const uint4 *)((const T *)g.beta + at.c0 + at.c);
        shift = ac_gn_shift(g, at);
    }

    /* moments of the tile's groups: mean, 1 / sqrt(variance + eps) */
    __device__ void
    set(const ac_gn &g, const ac_gn_place<T> &at, const float2 *moments)
    {
        ac_unpack_wide<T>(by, gamma);
        ac_unpack_wide<T>(add, beta);
        ac_unpack_wide<T>(mean, shift);
        int32_t group = at.group, left = at.split; /* channels of the group that are left */
#pragma unroll
        for (int e = 0; e < ac_wide<T>; e++, left--) {
            if (left == 0) {
                group++;
                left = g.group_channels;
            }
            float2 m = moments[group];
            mean[e] = m.x - mean[e];
            by[e] *= FAST ? m.y * -LOG2E : m.y;
            add[e] *= FAST ? -LOG2E : 1.0f;
        }
    }

    template <int V>
    __device__ void
    store(const ac_gn &g, const ac_gn_place<T> &at, const ac_gn_run<V> &run, int32_t pixel,
          int32_t to) const
    {
        T *y = (T *)g.y.data + at.n * g.y.n + at.c0 + at.c;
        float scale = FAST ? g.scale * (-1.0f / LOG2E) : g.scale;
#pragma unroll
        for (int i = 0; i < V; i++) {
            float v[ac_wide<T>];
            ac_unpack_wide<T>(v, run.raw[i]);
#pragma unroll
            for (int e = 0; e < ac_wide<T>; e++) {
                v[e] = (v[e] - mean[e]) * by[e] + add[e];
            }
            if constexpr (FAST) {
                ac_gn_silu_fast(v, scale);
            } else {
#pragma unroll
                for (int e = 0; e < ac_wide<T>; e++) {
                    v[e] = (SILU ? v[e] / (1.0f + expf(-v[e])) : v[e]) * scale;
                }
            }
            if (pixel + i * at.rows < to) {
                ac_store_wide<T>(y + (pixel + i * at.rows) * g.y.pixel, v);
            }
        }
    }
};

__device__ static inline float2
ac_gn_moments(const ac_gn &g, float3 all)
{
    return make_float2(all.y, rsqrtf(__fdividef(all.z, all.x) + g.eps));
}

/* ---- in group_norm_wide.cu ------------------------------------------------------------------- */

/* False: pixels are not all at one distance. */
bool ac_gn_image_of(const ac_tensor *t, ac_gn_image *out);
/* All but tile and piece; false: not in vectors. */
bool ac_gn_of(const ac_problem *p, ac_gn *g);
/* At launch: addresses are known. */
bool ac_gn_aligned(const ac_gn *g);
/* Whole groups and whole vectors, about `wanted` channels, at most `most` vectors and `most_groups`
 * groups; 0: there is no such tile. */
int32_t ac_gn_tile(const ac_gn *g, int32_t wide, int32_t wanted, int32_t most, int32_t most_groups);

#endif
