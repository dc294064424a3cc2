/* schedulers/ddim: denoising diffusion implicit models (Song et al. 2020), diffusers'
 * DDIMScheduler.
 *
 *     m  = clip(predicted x0)           e' = predicted noise
 *     x' = sqrt(a') m + sqrt(1 - a' - s^2) e' + s noise        formula (12)
 *     s  = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a')       formula (16)
 *
 * with a, a' = alphas_cumprod at this and at the next lower timestep.
 */
#include "common.h"

#include <math.h>

#define FAR 1e30 /* times any latent: beyond every clamp, finite in f32 */

typedef struct ddim_config {
    bool clip, threshold, alpha_to_one;
    double clip_range, ratio, max_value;
} ddim_config;

static ac_status
read_config(const ac_sched_build *build, ddim_config *out)
{
    AC_TRY(ac_sched_get_bool(build, "clip_sample", true, &out->clip));
    AC_TRY(ac_sched_get_number(build, "clip_sample_range", 1.0, &out->clip_range));
    AC_TRY(ac_sched_get_bool(build, "set_alpha_to_one", true, &out->alpha_to_one));
    AC_TRY(ac_sched_get_threshold(build, &out->threshold, &out->ratio, &out->max_value));
    if (out->clip && !out->threshold && !(out->clip_range > 0.0)) {
        return ac_sched_error(build, "clip_sample_range: found %g, expected above 0",
                              out->clip_range);
    }
    return AC_OK;
}

/* x0 into m_x and m_e; the predicted noise as (x, e) coefficients. */
static void
convert(ac_prediction prediction, double a, ac_sched_row *row, double noise[2])
{
    double signal = sqrt(a), sigma = sqrt(1.0 - a);
    switch (prediction) {
    case AC_PREDICT_SAMPLE:
        row->m_e = 1.0;
        noise[0] = 1.0 / sigma;
        noise[1] = -signal / sigma;
        break;
    case AC_PREDICT_V:
        row->m_x = signal;
        row->m_e = -sigma;
        noise[0] = sigma;
        noise[1] = signal;
        break;
    default:
        row->m_x = 1.0 / signal;
        row->m_e = -sigma / signal;
        noise[1] = 1.0;
        break;
    }
}

static ac_status
fill_row(const ac_sched_build *build, const ddim_config *config, int64_t t, ac_sched_row *row)
{
    double eta = build->options.eta;
    int64_t before = t - build->n_train / build->options.num_inference_steps;
    double a, a_next = config->alpha_to_one ? 1.0 : build->alphas[0];
    AC_TRY(ac_sched_alpha(build, t, &a));
    if (before >= 0) {
        AC_TRY(ac_sched_alpha(build, before, &a_next));
    }
    double noise[2] = {0.0, 0.0};
    convert(build->prediction, a, row, noise);
    if (a == 0.0 && build->prediction == AC_PREDICT_EPSILON && config->clip && !config->threshold) {
        row->m_x = FAR; /* (x - e) / 0, an infinity that the clamp makes finite again */
        row->m_e = -FAR;
    }
    double spread = eta * sqrt((1.0 - a_next) / (1.0 - a) * (1.0 - a / a_next));
    if (eta == 0.0) {
        spread = 0.0; /* also where there is no variance to take */
    }
    double left = 1.0 - a_next - spread * spread; /* 0 for eta 1 at a = 0, but for a rounding */
    double toward = sqrt(fabs(left) < 1e-12 ? 0.0 : left);
    row->timestep = (double)t;
    row->scale_in = 1.0;
    row->clip = config->clip && !config->threshold ? config->clip_range : 0.0;
    row->threshold = config->threshold ? config->ratio : 0.0;
    row->threshold_max = config->max_value;
    row->x_next[AC_BASIS_M] = sqrt(a_next);
    row->x_next[AC_BASIS_X] = toward * noise[0];
    row->x_next[AC_BASIS_E] = toward * noise[1];
    row->x_next[AC_BASIS_NOISE] = spread;
    row->draws_noise = eta > 0.0;
    row->start_x = sqrt(a);
    row->start_noise = sqrt(1.0 - a);
    return AC_OK;
}

static ac_status
fill(ac_sched_build *build)
{
    int32_t n = build->options.num_inference_steps, count;
    ddim_config config;
    double *timesteps;
    AC_TRY(read_config(build, &config));
    if (n > build->n_train) {
        return ac_error(AC_E_INVALID,
                        "DDIMScheduler: found num_inference_steps %d, expected at most the %d "
                        "training steps",
                        n, build->n_train);
    }
    AC_TRY(ac_sched_timesteps(build, (ac_sched_grid){.last = build->n_train}, &timesteps, &count));
    AC_TRY(ac_sched_rows(build, count));
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        AC_TRY(fill_row(build, &config, (int64_t)timesteps[build->options.begin + i],
                        &build->out->rows[i]));
    }
    return AC_OK;
}

const ac_sched_class ac_sched_ddim = {
    .name = "DDIMScheduler",
    .spacing = AC_SPACING_LEADING,
    .has_zero_snr = true,
    .predictions = AC_TAKES(EPSILON) | AC_TAKES(SAMPLE) | AC_TAKES(V),
    .fill = fill,
};
