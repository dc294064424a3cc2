/* sampler: guidance and rows of a schedule on the host, in the calling thread: latents are small.
 *
 *     e = u + s (c - u), then e *= r sigma(c) / sigma(e) + 1 - r, image by image
 *
 * The second is guidance_rescale (Lin et al. 2023, section 3.4). */
#include "list.h"

#include <math.h>

/* Both halves of the batch see the same latents, scaled as the row says. */
static void
scale(const ac_sampler_job *job, const ac_sched_row *row)
{
    int64_t all = job->images * job->per_image;
    float factor = (float)row->scale_in;
    float *sample = job->sample;
    for (int32_t half = 0; half < 1 + job->guided; half++) {
        for (int64_t i = 0; i < all; i++) {
            if (job->io == AC_F32) {
                sample[half * all + i] = job->latents[i] * factor;
            } else {
                ac_element_set(sample, job->io, half * all + i, job->latents[i] * factor);
            }
        }
    }
}

static double
deviation(const float *x, int64_t count)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += x[i];
    }
    double mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++) {
        squares += (x[i] - mean) * (x[i] - mean);
    }
    return sqrt(squares / (double)(count - 1));
}

/* The result replaces the first half (u). */
static void
guide(const ac_sampler_job *job)
{
    int64_t all = job->images * job->per_image;
    float factor = (float)job->state->guidance_scale;
    double rescale = job->state->guidance_rescale;
    const float *c = job->output + all;
    float *u = job->output;
    for (int64_t i = 0; i < all; i++) {
        u[i] += factor * (c[i] - u[i]);
    }
    for (int64_t n = 0; n < job->images && job->rescales; n++) {
        float *e = u + n * job->per_image;
        double ratio = deviation(c + n * job->per_image, job->per_image) /
                       deviation(e, job->per_image);
        float by = (float)(rescale * ratio + 1.0 - rescale);
        for (int64_t i = 0; i < job->per_image; i++) {
            e[i] *= by;
        }
    }
}

static bool
are_finite(const float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

ac_status
ac_cpu_sampler(void *self, ac_lane *lane, const ac_sampler_job *job, ac_sampler_phase phase)
{
    (void)self;
    (void)lane;
    const ac_sched_row *row = &job->rows[job->state->step];
    if (phase == AC_SAMPLER_SCALE) {
        scale(job, row);
        return AC_OK;
    }
    if (job->guided) {
        guide(job);
    }
    const float *noise = NULL;
    if (row->draws_noise) {
        noise = job->noise + row->noise_at * job->images * job->per_image;
    }
    ac_sched_apply(row, job->images, job->per_image, job->latents, job->output, noise,
                   job->registers, job->work);
    job->state->step++;
    if (!job->state->broken && !are_finite(job->latents, job->images * job->per_image)) {
        job->state->broken = job->state->step;
    }
    return AC_OK;
}
