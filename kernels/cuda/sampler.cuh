/* sampler: what is done to one element of the latents; sampler.h has the formulas.
 *
 * Arithmetic and roundings are those of csrc/sampler.c, without fused multiply-adds: the same bits.
 *
 *     sampler.cu   a row by itself            tail.cu   behind the UNet's last convolution */
#ifndef AC_CUDA_SAMPLER_CUH
#define AC_CUDA_SAMPLER_CUH

#include "element.cuh"

/* Not fused. */
__device__ static inline double
ac_multiply_add(double a, double b, double c)
{
    return __dadd_rn(c, __dmul_rn(a, b));
}

/* The row that comes next, to shared memory by all threads of the block; wait for them before it is
 * read. */
__device__ static inline void
ac_sampler_row(const ac_sampler_job &job, ac_sched_row *row)
{
    const double *from = (const double *)&job.rows[job.state->step];
    static_assert(sizeof(ac_sched_row) % sizeof(double) == 0, "copied in doubles");
    for (int i = threadIdx.x; i < (int)(sizeof *row / sizeof(double)); i += blockDim.x) {
        ((double *)row)[i] = from[i];
    }
}

__device__ static inline float
ac_sampler_guided(float u, float c, float factor)
{
    return __fadd_rn(u, __fmul_rn(factor, __fsub_rn(c, u)));
}

/* m before the clamp. */
__device__ static inline double
ac_sampler_converted(const ac_sched_row &row, float x, float e)
{
    return __dadd_rn(__dmul_rn(row.m_x, (double)x), __dmul_rn(row.m_e, (double)e));
}

__device__ static inline double
ac_sampler_clamped(const ac_sampler_job &job, const ac_sched_row &row, int64_t at, double m)
{
    double limit = row.clip > 0.0 ? row.clip : INFINITY, divisor = 1.0;
    if (row.threshold > 0.0) {
        limit = divisor = job.limits[at / job.per_image];
    }
    if (limit < INFINITY || divisor != 1.0) {
        m = (m < -limit ? -limit : m > limit ? limit : m) / divisor;
    }
    return m;
}

/* A basis tensor whose coefficients are all 0 may hold anything, so it is not multiplied. */
__device__ static inline double
ac_sampler_sum(const double *coefficient, const double *basis)
{
    double sum = 0.0;
    for (int k = 0; k < AC_BASIS_COUNT; k++) {
        if (coefficient[k] != 0.0) {
            sum = ac_multiply_add(coefficient[k], basis[k], sum);
        }
    }
    return sum;
}

/* Latents and registers at `at`, from the guided output e there.  Returns the new latent. */
__device__ static inline float
ac_sampler_apply(const ac_sampler_job &job, const ac_sched_row &row, int64_t at, float e)
{
    double basis[AC_BASIS_COUNT];
    const float x = job.latents[at];
    basis[AC_BASIS_X] = (double)x;
    basis[AC_BASIS_E] = (double)e;
    basis[AC_BASIS_M] = ac_sampler_clamped(job, row, at, ac_sampler_converted(row, x, e));
    basis[AC_BASIS_NOISE] = 0.0;
    if (row.draws_noise) {
        basis[AC_BASIS_NOISE] =
            (double)job.noise[row.noise_at * job.images * job.per_image + at];
    }
    for (int i = 0; i < AC_SCHED_REGISTERS; i++) {
        basis[AC_BASIS_R0 + i] = (double)job.registers[i][at];
    }
    const float next = (float)ac_sampler_sum(row.x_next, basis);
    for (int s = 0; s < row.n_stores; s++) {
        job.registers[row.store[s].to][at] = (float)ac_sampler_sum(row.store[s].c, basis);
    }
    job.latents[at] = next;
    if (!isfinite(next) && job.state->broken == 0) {
        atomicCAS(&job.state->broken, 0, job.state->step + 1);
    }
    return next;
}

/* What the UNet sees of a latent, in both halves of a guided batch. */
__device__ static inline void
ac_sampler_scale(const ac_sampler_job &job, int64_t at, float latent, float factor)
{
    const ac_cells sample = {job.sample, job.io};
    const float value = __fmul_rn(latent, factor);
    ac_store(sample, at, value);
    if (job.guided) {
        ac_store(sample, job.images * job.per_image + at, value);
    }
}

#endif
