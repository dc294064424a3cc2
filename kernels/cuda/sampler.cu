/* sampler: guidance and rows of a schedule.  Which row: the state's step, read here, so that one
 * recording serves all of them.
 *
 *     scale     sample = scale_in latents, twice with guidance
 *     guide     e = u + s (c - u) in place of u; with rescale e *= r sigma(c) / sigma(e) + 1 - r
 *     quantile  one block an image: the threshold of |m|, exact, by four rounds of 256 bins over
 *               the bits of non-negative floats, which are in the order of their values
 *     apply     one thread an element: m, x', registers
 *
 * Arithmetic and roundings are those of csrc/sampler.c, without fused multiply-adds: the same bits,
 * but for the sums of rescale.  Latents are small (a megabyte at most an image); all of it is a few
 * microseconds, most of it launches. */
#include "reduce.cuh"
#include "sampler.cuh"

__device__ static inline const ac_sched_row &
current(const ac_sampler_job &job)
{
    return job.rows[job.state->step];
}

/* ---- before the UNet ------------------------------------------------------------------------- */

/* Behind the last row there is none. */
__global__ static void
scale_kernel(ac_sampler_job job)
{
    const int64_t all = job.images * job.per_image;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (int64_t i = first; job.tickets && i < (int64_t)AC_SAMPLER_TICKETS(&job); i += stride) {
        job.tickets[i] = 0;
    }
    if (job.state->step >= job.n_rows) {
        return;
    }
    const float factor = (float)current(job).scale_in;
    for (int64_t i = first; i < all; i += stride) {
        ac_sampler_scale(job, i, job.latents[i], factor);
    }
}

/* ---- guidance -------------------------------------------------------------------------------- */

__global__ static void
guide_kernel(ac_sampler_job job)
{
    const int64_t all = job.images * job.per_image;
    const float factor = (float)job.state->guidance_scale;
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += stride) {
        job.output[i] = ac_sampler_guided(job.output[i], job.output[all + i], factor);
    }
}

/* Sum over the block, for all its threads; 1024 of them. */
__device__ static double
block_sum(double value, double *shared)
{
    value = ac_reduce_warp(value, ac_sum_of());
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = value;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        value = ac_reduce_warp(shared[threadIdx.x], ac_sum_of());
        if (threadIdx.x == 0) {
            shared[0] = value;
        }
    }
    __syncthreads();
    return shared[0];
}

__device__ static double
deviation(const float *x, int64_t count, double *shared)
{
    double sum = 0.0, squares = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        sum += (double)x[i];
    }
    const double mean = block_sum(sum, shared) / (double)count;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        squares += ((double)x[i] - mean) * ((double)x[i] - mean);
    }
    return sqrt(block_sum(squares, shared) / (double)(count - 1));
}

/* One block an image, after guide. */
__global__ static void
rescale_kernel(ac_sampler_job job)
{
    __shared__ double shared[32];
    const int64_t count = job.per_image, all = job.images * count;
    float *e = job.output + blockIdx.x * count;
    const double of_c = deviation(e + all, count, shared);
    const double ratio = of_c / deviation(e, count, shared);
    const double rescale = job.state->guidance_rescale;
    const float factor = (float)(rescale * ratio + 1.0 - rescale);
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        e[i] = __fmul_rn(e[i], factor);
    }
}

/* ---- dynamic thresholding -------------------------------------------------------------------- */

/* |m| of one image into work; true where it has a NaN. */
__device__ static bool
fill_work(const ac_sampler_job &job, const ac_sched_row &row, float *work)
{
    const int64_t at = blockIdx.x * job.per_image;
    bool nan = false;
    for (int64_t i = threadIdx.x; i < job.per_image; i += blockDim.x) {
        work[i] = (float)fabs(ac_sampler_converted(row, job.latents[at + i], job.output[at + i]));
        nan = nan || isnan(work[i]);
    }
    return __syncthreads_or(nan) != 0;
}

/* Bits of the element of rank `rank`; *below: how many are smaller, *equal: how many are it. */
__device__ static uint32_t
select_rank(const float *work, int64_t count, int64_t rank, int64_t *below, int64_t *equal)
{
    __shared__ unsigned long long bins[256];
    __shared__ uint32_t chosen;
    __shared__ unsigned long long before;
    uint32_t prefix = 0;
    int64_t smaller = 0, same = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            bins[i] = 0;
        }
        __syncthreads();
        for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
            const uint32_t bits = __float_as_uint(work[i]);
            if (shift == 24 || bits >> (shift + 8) == prefix) {
                atomicAdd(&bins[bits >> shift & 255], 1ull);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned long long sum = 0;
            uint32_t bin = 0;
            const unsigned long long wanted = (unsigned long long)(rank - smaller);
            while (bin < 255 && sum + bins[bin] <= wanted) {
                sum += bins[bin++];
            }
            chosen = bin;
            before = sum;
        }
        __syncthreads();
        prefix = prefix << 8 | chosen;
        smaller += (int64_t)before;
        same = (int64_t)bins[chosen];
        __syncthreads();
    }
    *below = smaller;
    *equal = same;
    return prefix;
}

/* The smallest element above `bits`. */
__device__ static uint32_t
next_above(const float *work, int64_t count, uint32_t bits)
{
    __shared__ uint32_t least;
    if (threadIdx.x == 0) {
        least = 0xffffffffu;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        const uint32_t other = __float_as_uint(work[i]);
        if (other > bits) {
            atomicMin(&least, other);
        }
    }
    __syncthreads();
    return least;
}

__device__ static double
quantile(const float *work, int64_t count, double threshold)
{
    const double rank = __dmul_rn(threshold, (double)(count - 1));
    const int64_t below = (int64_t)rank;
    int64_t smaller, equal;
    const uint32_t bits = select_rank(work, count, below, &smaller, &equal);
    const double low = (double)__uint_as_float(bits);
    if (below + 1 >= count) {
        return low;
    }
    const bool again = below + 1 < smaller + equal;
    const uint32_t above = again ? bits : next_above(work, count, bits);
    const double high = (double)__uint_as_float(above);
    return ac_multiply_add(__dadd_rn(rank, -(double)below), __dadd_rn(high, -low), low);
}

/* One block an image. */
__global__ static void
quantile_kernel(ac_sampler_job job)
{
    const ac_sched_row &row = current(job);
    float *work = job.work + blockIdx.x * job.per_image;
    if (row.threshold <= 0.0) {
        return;
    }
    double s = NAN;
    if (!fill_work(job, row, work)) {
        s = quantile(work, job.per_image, row.threshold);
    }
    if (threadIdx.x == 0) {
        s = s < 1.0 ? 1.0 : s; /* NaN stays */
        job.limits[blockIdx.x] = s > row.threshold_max ? row.threshold_max : s;
    }
}

/* ---- the row --------------------------------------------------------------------------------- */

__global__ static void
apply_kernel(ac_sampler_job job)
{
    __shared__ ac_sched_row row;
    ac_sampler_row(job, &row);
    __syncthreads();
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < job.images * job.per_image) {
        ac_sampler_apply(job, row, at, job.output[at]);
    }
}

/* After all blocks of the row. */
__global__ static void
advance_kernel(ac_sampler_job job)
{
    job.state->step++;
}

/* ---- launches -------------------------------------------------------------------------------- */

static ac_status
apply(ac_lane *lane, const ac_sampler_job *job, dim3 blocks)
{
    const dim3 images((unsigned)job->images);
    if (job->guided) {
        AC_TRY(ac_cuda_launch(lane, "sampler guide", guide_kernel, blocks, AC_THREADS, 0, *job));
    }
    if (job->rescales) {
        AC_TRY(ac_cuda_launch(lane, "sampler rescale", rescale_kernel, images, 1024, 0, *job));
    }
    if (job->thresholds) {
        AC_TRY(ac_cuda_launch(lane, "sampler quantile", quantile_kernel, images, 1024, 0, *job));
    }
    AC_TRY(ac_cuda_launch(lane, "sampler apply", apply_kernel, blocks, AC_THREADS, 0, *job));
    return ac_cuda_launch(lane, "sampler advance", advance_kernel, dim3(1), 1, 0, *job);
}

extern "C" ac_status
ac_cuda_sampler(void *, ac_lane *lane, const ac_sampler_job *job, ac_sampler_phase phase)
{
    const int64_t all = job->images * job->per_image, count = ac_ceil_div(all, AC_THREADS);
    if (count > 0x7fffffff) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "latents: found %lld elements, expected fewer",
                            (long long)all);
    }
    const dim3 blocks((unsigned)count);
    if (phase == AC_SAMPLER_SCALE) {
        return ac_cuda_launch(lane, "sampler scale", scale_kernel, blocks, AC_THREADS, 0, *job);
    }
    return apply(lane, job, blocks);
}
