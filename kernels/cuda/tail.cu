/* tail: the end of a row in one launch: the UNet's last convolution (conv2d_narrow.cuh), guidance,
 * the sampler's row, and the next row's input.
 *
 *     a block     16 pixels of some lines of one image of the batch -> output, f32, rounded as the
 *                 convolution's own result would be
 *     the last    of the blocks of a place, one an image of a guided pair: u and c are both there,
 *                 so guidance, the row and the next input for these pixels
 *     the last    of those: counts the row up
 *
 * Blocks find out by counting themselves in job.tickets, so nobody waits for anybody, and whoever
 * is last does the same to the same numbers: the bits are those of the separate launches.  For jobs
 * without sums over an image (guidance_rescale, thresholds). */
#include "conv2d_narrow.cuh"
#include "sampler.cuh"

/* Whether this block is the last one of `count` to come here; then it sees what all of them wrote,
 * and the ticket is 0 again. */
__device__ static bool
is_last(uint32_t *ticket, uint32_t count)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1u) == count - 1;
        if (last) {
            *ticket = 0;
        }
    }
    __syncthreads();
    __threadfence();
    return last;
}

/* Of output [images of the batch, c, h, w]: element (o, y, x) of image n. */
__device__ static inline int64_t
element_at(const ac_gemm &g, int64_t n, int o, int64_t y, int64_t x)
{
    return ((n * g.columns + o) * g.out_height + y) * g.out_width + x;
}

/* Pixels of a line follow each other, as in memory. */
template <int LINES>
__device__ static inline void
apply_row(const ac_gemm &g, const ac_sampler_job &job, const ac_sched_row &row)
{
    constexpr int HEIGHT = ac_narrow_tile<LINES>::HEIGHT;
    const int64_t all = job.images * job.per_image, n = blockIdx.z % (uint32_t)job.images;
    const float factor = (float)job.state->guidance_scale;
    const int32_t next_row = job.state->step + 1;
    const bool more = next_row < job.n_rows;
    const float scale = more ? (float)job.rows[next_row].scale_in : 0.0f;
    for (int i = (int)threadIdx.x; i < PIXELS * HEIGHT * (int)g.columns; i += THREADS) {
        const int64_t x = (int64_t)blockIdx.x * PIXELS + i % PIXELS;
        const int64_t y = (int64_t)blockIdx.y * HEIGHT + i / PIXELS % HEIGHT;
        if (x >= g.out_width || y >= g.out_height) {
            continue;
        }
        const int64_t at = element_at(g, n, i / (PIXELS * HEIGHT), y, x);
        float e = __ldcg(job.output + at); /* the second level's: another block may have put it */
        if (job.guided) {
            e = ac_sampler_guided(e, __ldcg(job.output + all + at), factor);
        }
        const float latent = ac_sampler_apply(job, row, at, e);
        if (more) {
            ac_sampler_scale(job, at, latent, scale);
        }
    }
}

template <typename T, int LINES>
__global__ static void __launch_bounds__(THREADS)
tail_kernel(const __grid_constant__ ac_gemm g, const __grid_constant__ ac_sampler_job job)
{
    extern __shared__ uint4 shared[];
    __shared__ ac_sched_row row;
    float sum[LINES][4];
    ac_sampler_row(job, &row); /* long before it is read */
    ac_narrow_sums<T, LINES>(g, shared, sum);
#pragma unroll
    for (int i = 0; i < LINES * 4; i++) {
        ac_narrow_place<LINES> at(i);
        if (at.inside(g)) {
            job.output[element_at(g, blockIdx.z, at.o, at.y, at.x)] = (float)(T)sum[i / 4][i % 4];
        }
    }
    const uint32_t places = gridDim.x * gridDim.y, n = blockIdx.z % (uint32_t)job.images;
    const uint32_t place = 1 + (n * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (!is_last(&job.tickets[place], job.guided ? 2 : 1)) {
        return;
    }
    apply_row<LINES>(g, job, row);
    if (is_last(&job.tickets[0], (uint32_t)job.images * places) && threadIdx.x == 0) {
        job.state->step++;
    }
}

/* The whole output of the UNet, and no more. */
static bool
is_of_job(const ac_gemm &g, const ac_sampler_job &job)
{
    const int64_t pixels = (int64_t)g.out_height * g.out_width;
    return pixels * g.columns == job.per_image &&
           g.rows == pixels * job.images * (job.guided ? 2 : 1);
}

extern "C" bool
ac_cuda_tail_fits(const ac_caps *caps, const ac_problem *conv, const ac_sampler_job *job)
{
    ac_gemm g;
    return !job->rescales && !job->thresholds && !ac_operand(conv, AC_CONV_RESIDUAL) &&
           ac_conv_gemm(conv, NULL, &g) && ac_narrow_fits(g, caps->isa) && is_of_job(g, *job);
}

/* One launch after the other, for a weight that vectors cannot read; nothing is rounded to halves
 * in between. */
static ac_status
launch_apart(ac_lane *lane, ac_gemm *g, const ac_sampler_job *job)
{
    const int64_t w = g->out_width, h = g->out_height;
    g->out = ac_gemm_image{job->output, AC_F32, g->columns * h * w, w, 1, h * w, {0, 0}};
    AC_TRY(ac_cuda_gemm_plain(lane, g));
    AC_TRY(ac_cuda_sampler(NULL, lane, job, AC_SAMPLER_APPLY));
    return ac_cuda_sampler(NULL, lane, job, AC_SAMPLER_SCALE);
}

extern "C" ac_status
ac_cuda_tail(void *, ac_lane *lane, const ac_problem *conv, const void *prepared,
             const ac_sampler_job *job)
{
    ac_gemm g;
    if (!ac_conv_gemm_at_launch(conv, prepared, &g) || !ac_narrow_aligned(g)) {
        return launch_apart(lane, &g, job);
    }
    return ac_narrow_choose(g, [&]<typename T, int LINES>() {
        return ac_cuda_launch(lane, "tail", tail_kernel<T, LINES>, ac_narrow_grid<LINES>(g),
                              THREADS, ac_narrow_tile<LINES>::BYTES, g, *job);
    });
}
