/* schedulers/euler_ancestral: Euler steps to a lower sigma and noise back up, diffusers'
 * EulerAncestralDiscreteScheduler.
 *
 *     up^2 = s'^2 (s^2 - s'^2) / s^2      down^2 = s'^2 - up^2
 *     x'   = x + (down - s) (x - m) / s + up noise
 *
 * Noise is drawn at every row, the last one too, where up is 0.
 */
#include "common.h"

#include <math.h>

static ac_status
fill(ac_sched_build *build)
{
    double *timesteps, *sigmas;
    int32_t count;
    ac_sched_grid grid = {.last = build->n_train, .fractional = true};
    AC_TRY(ac_sched_timesteps(build, grid, &timesteps, &count));
    AC_TRY(ac_sched_rows(build, count));
    AC_TRY(ac_sched_doubles(build, (int64_t)count + 1, &sigmas)); /* the last one stays 0 */
    for (int32_t i = 0; i < count; i++) {
        sigmas[i] = ac_sched_sigma_at(build, timesteps[i]);
    }
    build->out->init_noise_sigma = ac_sched_euler_noise(build, sigmas, count);
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        ac_sched_row *row = &build->out->rows[i];
        double from = sigmas[build->options.begin + i], to = sigmas[build->options.begin + i + 1];
        AC_TRY(ac_sched_euler_check(build, from, i));
        double up = sqrt(to * to * (from * from - to * to) / (from * from));
        double down = to * to / from; /* the same, without a difference of squares */
        row->timestep = (float)timesteps[build->options.begin + i];
        ac_sched_euler_convert(build->prediction, from, row);
        ac_sched_euler_step(build->prediction, from, down, row);
        row->x_next[AC_BASIS_NOISE] = up;
        row->draws_noise = true;
    }
    return AC_OK;
}

const ac_sched_class ac_sched_euler_ancestral = {
    .name = "EulerAncestralDiscreteScheduler",
    .spacing = AC_SPACING_LINSPACE,
    .has_zero_snr = true,
    .lifts_zero_snr = true,
    .predictions = AC_TAKES(EPSILON) | AC_TAKES(V),
    .fill = fill,
};
