/* attention_flash: softmax(q k^T scale + mask) v in one pass over the keys, on tensor cores.
 *
 * A block takes 64 queries of one head, a warp 16 of them; keys come 64 at a time.  Scores never
 * leave registers: the result of q k^T is, element for element, the left operand of p v.  Each row
 * keeps its running maximum and sum (Milakov and Gimelshein 2018); the sums of p v are scaled when
 * the maximum moves.  v is copied while q k^T runs, the next k while p v runs.
 *
 * D is the head size rounded up, zeros in between; rows in shared memory are 16 bytes longer than
 * that, an odd number of 16-byte chunks, so that ldmatrix meets no bank twice.
 *
 * Bound: mma.sync, and for small heads the exponentials. */
#include "attention.h"
#include "element.cuh"
#include "mma.cuh"

static constexpr int QUERIES = 64, KEYS = 64, THREADS = 128;
static constexpr float LOG2E = 1.4426950408889634f;

/* KEYS (or QUERIES: as many) rows of a head, from token `first`, into shared memory. */
template <typename T, int D>
__device__ static inline void
copy_tile(uint32_t to, const T *from, int64_t first, int64_t tokens, int64_t stride, int d)
{
#pragma unroll 2
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        int row = i / (D / 8), chunk = i % (D / 8);
        bool valid = first + row < tokens && chunk * 8 < d;
        ac_copy_async(to + row * (D + 8) * 2 + chunk * 16,
                      valid ? from + (first + row) * stride + chunk * 8 : from, valid);
    }
}

/* What a warp knows of its 16 queries: rows lane / 4 and lane / 4 + 8. */
template <int D> struct state {
    float out[D / 8][4];
    float most[2], sum[2]; /* of this thread's columns only, until the end */
};

/* Scores of one tile, from q k^T to base-2 exponents, -inf where no key is. */
template <int D>
__device__ static inline void
mask_scores(const ac_attention_job &j, float (&s)[KEYS / 8][4], int64_t query, int64_t key0,
            bool edge)
{
    float scale = j.scale * LOG2E;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int64_t key = key0 + 8 * i + lane % 4 * 2 + e % 2;
            s[i][e] *= scale;
            if (edge && (key >= j.tk || (j.causal && key > query + e / 2 * 8))) {
                s[i][e] = -INFINITY;
            } else if (j.mask) {
                s[i][e] += LOG2E * ac_load(j.mask, j.mask_dtype,
                                           blockIdx.z * j.mask_n + key * j.mask_t);
            }
        }
    }
}

/* s becomes exp2(s - row maximum); what was summed so far is scaled to the new maximum. */
template <int D>
__device__ static inline void
softmax_step(state<D> &w, float (&s)[KEYS / 8][4])
{
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float most = w.most[row];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
            most = fmaxf(most, fmaxf(s[i][2 * row], s[i][2 * row + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        float base = most == -INFINITY ? 0.0f : most; /* no key yet: exp2(-inf - 0) is 0 */
        float share = ac_exp2_fast(w.most[row] - base), sum = 0.0f;
        w.most[row] = most;
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
#pragma unroll
            for (int e = 2 * row; e < 2 * row + 2; e++) {
                s[i][e] = ac_exp2_fast(s[i][e] - base);
                sum += s[i][e];
            }
        }
        w.sum[row] = w.sum[row] * share + sum;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            w.out[i][2 * row] *= share;
            w.out[i][2 * row + 1] *= share;
        }
    }
}

template <typename T, int D>
__device__ static inline void
store_rows(const ac_attention_job &j, state<D> &w, int64_t query)
{
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float sum = w.sum[row];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        float scale = 1.0f / sum;
        int64_t t = query + 8 * row;
        T *to = (T *)j.out.data + blockIdx.z * j.out.n + t * j.out.t + (int64_t)blockIdx.y * j.d;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            int c = 8 * i + lane % 4 * 2;
            if (t < j.tq && c < j.d) {
                *(uint32_t *)(to + c) =
                    ac_pack<T>(w.out[i][2 * row] * scale, w.out[i][2 * row + 1] * scale);
            }
        }
    }
}

/* s = q k^T */
template <typename T, int D>
__device__ static inline void
score_keys(const uint32_t (&q)[D / 16][4], uint32_t k_tile, float (&s)[KEYS / 8][4])
{
    constexpr int PITCH = (D + 8) * 2;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            ac_load_matrices(b, k_tile + (16 * n + lane / 16 * 8 + lane % 8) * PITCH +
                                    (2 * i + lane / 8 % 2) * 16);
            ac_mma<T>(s[2 * n], q[i], b[0], b[1]);
            ac_mma<T>(s[2 * n + 1], q[i], b[2], b[3]);
        }
    }
}

/* out += s v */
template <typename T, int D>
__device__ static inline void
add_values(const float (&s)[KEYS / 8][4], uint32_t v_tile, float (&out)[D / 8][4])
{
    constexpr int PITCH = (D + 8) * 2;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
        uint32_t p[4] = {ac_pack<T>(s[2 * n][0], s[2 * n][1]),
                         ac_pack<T>(s[2 * n][2], s[2 * n][3]),
                         ac_pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]),
                         ac_pack<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t b[4];
            ac_load_matrices_transposed(b, v_tile + (16 * n + lane % 16) * PITCH +
                                               (2 * i + lane / 16) * 16);
            ac_mma<T>(out[2 * i], p, b[0], b[1]);
            ac_mma<T>(out[2 * i + 1], p, b[2], b[3]);
        }
    }
}

template <typename T, int D>
__global__ static void __launch_bounds__(THREADS)
flash_kernel(const __grid_constant__ ac_attention_job j)
{
    constexpr int PITCH = (D + 8) * 2;
    __shared__ __align__(128) char shared[2 * KEYS * PITCH];
    uint32_t k_tile = ac_shared_address(shared), v_tile = k_tile + KEYS * PITCH;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t first = (int64_t)blockIdx.x * QUERIES, head = (int64_t)blockIdx.y * j.d;
    const T *k = (const T *)j.k.data + blockIdx.z * j.k.n + head;
    const T *v = (const T *)j.v.data + blockIdx.z * j.v.n + head;
    int64_t query = first + warp * 16 + lane / 4;
    int64_t keys = j.causal ? min(j.tk, first + QUERIES) : j.tk;

    copy_tile<T, D>(v_tile, (const T *)j.q.data + blockIdx.z * j.q.n + head, first, j.tq, j.q.t,
                    j.d);
    ac_copy_commit();
    copy_tile<T, D>(k_tile, k, 0, j.tk, j.k.t, j.d);
    ac_copy_commit();
    ac_copy_wait<1>();
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        ac_load_matrices(q[i], v_tile + (warp * 16 + lane % 16) * PITCH + (2 * i + lane / 16) * 16);
    }
    __syncthreads(); /* v takes the place of q */

    state<D> w = {};
    w.most[0] = w.most[1] = -INFINITY;
    for (int64_t key0 = 0; key0 < keys; key0 += KEYS) {
        copy_tile<T, D>(v_tile, v, key0, j.tk, j.v.t, j.d);
        ac_copy_commit();
        ac_copy_wait<1>();
        __syncthreads(); /* k is here */
        float s[KEYS / 8][4] = {};
        score_keys<T, D>(q, k_tile, s);
        __syncthreads(); /* all have read k */
        if (key0 + KEYS < keys) {
            copy_tile<T, D>(k_tile, k, key0 + KEYS, j.tk, j.k.t, j.d);
        }
        ac_copy_commit();
        mask_scores<D>(j, s, query, key0,
                       key0 + KEYS > j.tk || (j.causal && key0 + KEYS > first));
        softmax_step<D>(w, s);
        ac_copy_wait<1>();
        __syncthreads(); /* v is here */
        add_values<T, D>(s, v_tile, w.out);
        __syncthreads(); /* all have read v */
    }
    store_rows<T, D>(j, w, query);
}

/* ---- when, and how --------------------------------------------------------------------------- */

bool
ac_attention_flash_fits(const ac_attention_job *j, int32_t arch)
{
    ac_dtype dtype = j->q.dtype;
    return ((dtype == AC_F16 && arch >= 75) || (dtype == AC_BF16 && arch >= 80)) &&
           ac_attention_in_vectors(j) && j->d <= 160 && j->images <= 65535 && j->heads <= 65535;
}

bool
ac_attention_flash_aligned(const ac_attention_job *j)
{
    return (uintptr_t)j->q.data % 16 == 0 && (uintptr_t)j->k.data % 16 == 0 &&
           (uintptr_t)j->v.data % 16 == 0 && (uintptr_t)j->out.data % 16 == 0;
}

template <typename T, int D>
static ac_status
launch_size(ac_lane *lane, const ac_attention_job *j)
{
    dim3 grid((unsigned)ac_ceil_div(j->tq, QUERIES), (unsigned)j->heads, (unsigned)j->images);
    return ac_cuda_launch(lane, "attention", flash_kernel<T, D>, grid, THREADS, 0, *j);
}

template <typename T>
static ac_status
launch_dtype(ac_lane *lane, const ac_attention_job *j)
{
    if (j->d <= 48) {
        return launch_size<T, 48>(lane, j);
    }
    if (j->d <= 64) {
        return launch_size<T, 64>(lane, j);
    }
    return j->d <= 80 ? launch_size<T, 80>(lane, j) : launch_size<T, 160>(lane, j);
}

ac_status
ac_cuda_flash(ac_lane *lane, const ac_attention_job *j)
{
    return j->q.dtype == AC_F16 ? launch_dtype<__half>(lane, j)
                                : launch_dtype<__nv_bfloat16>(lane, j);
}
