/* schedulers/euler: Euler steps in Karras et al.'s sigma (2022, algorithm 2 without churn),
 * diffusers' EulerDiscreteScheduler.
 *
 *     input = x / sqrt(s^2 + 1)     m = predicted x0     x' = x + (s' - s) (x - m) / s
 *
 * s_churn and its company are arguments of step() that no pipeline passes; they stay at 0 here.
 */
#include "common.h"

#include <math.h>

typedef struct euler_plan {
    double *sigmas;    /* [n_sigmas], the row i goes from i to i + 1 */
    double *timesteps; /* [count] */
    int32_t n_sigmas, count;
} euler_plan;

void
ac_sched_euler_convert(ac_prediction prediction, double sigma, ac_sched_row *row)
{
    double scale = sqrt(sigma * sigma + 1.0);
    row->scale_in = 1.0 / scale;
    row->start_x = 1.0;
    row->start_noise = sigma;
    if (prediction == AC_PREDICT_EPSILON) {
        row->m_x = 1.0;
        row->m_e = -sigma;
    } else if (prediction == AC_PREDICT_V) {
        row->m_x = 1.0 / (sigma * sigma + 1.0);
        row->m_e = -sigma / scale;
    } else {
        row->m_e = 1.0;
    }
}

/* x' = x + (target - sigma) (x - m) / sigma.  For epsilon the slope is e itself, and m is left
 * out: the difference would lose digits at a small sigma. */
void
ac_sched_euler_step(ac_prediction prediction, double sigma, double target, ac_sched_row *row)
{
    if (prediction == AC_PREDICT_EPSILON) {
        row->x_next[AC_BASIS_X] = 1.0;
        row->x_next[AC_BASIS_E] = target - sigma;
    } else {
        row->x_next[AC_BASIS_X] = target / sigma;
        row->x_next[AC_BASIS_M] = 1.0 - target / sigma;
    }
}

ac_status
ac_sched_euler_check(const ac_sched_build *build, double sigma, int32_t row)
{
    if (sigma > 0.0 && isfinite(sigma)) {
        return AC_OK;
    }
    return ac_sched_error(build, "row %d: found sigma %g, where diffusers gives NaN", row, sigma);
}

/* The standard deviation of the latents the run starts from. */
double
ac_sched_euler_noise(const ac_sched_build *build, const double *sigmas, int32_t count)
{
    double most = 0.0;
    for (int32_t i = 0; i < count; i++) {
        most = fmax(most, sigmas[i]);
    }
    return build->spacing == AC_SPACING_LEADING ? sqrt(most * most + 1.0) : most;
}

/* sigma_min, sigma_max: absent takes the value given. */
static ac_status
sigma_range(const ac_sched_build *build, double *high, double *low)
{
    AC_TRY(ac_sched_get_number(build, "sigma_max", *high, high));
    AC_TRY(ac_sched_get_number(build, "sigma_min", *low, low));
    if (!(*low > 0.0 && *high > 0.0)) {
        return ac_sched_error(build, "sigma_min, sigma_max: found %g and %g, expected above 0",
                              *low, *high);
    }
    return AC_OK;
}

/* Sigmas of the timesteps, or n + 1 evenly spaced in the logarithm: interpolation_type. */
static ac_status
interpolate(const ac_sched_build *build, euler_plan *plan)
{
    static const char *const type[] = {"linear", "log_linear", NULL};
    int32_t index, n = build->options.num_inference_steps;
    AC_TRY(ac_sched_get_choice(build, "interpolation_type", type, 0, &index));
    plan->n_sigmas = index == 0 ? plan->count : n + 1;
    AC_TRY(ac_sched_doubles(build, (int64_t)AC_MAX(plan->n_sigmas, n) + 1, &plan->sigmas));
    double high = log(build->sigmas[build->n_alphas - 1]), low = log(build->sigmas[0]);
    for (int32_t i = 0; i < plan->n_sigmas; i++) {
        plan->sigmas[i] = index == 0 ? ac_sched_sigma_at(build, plan->timesteps[i])
                                     : exp(ac_sched_linspace(high, low, n + 1, i));
    }
    return AC_OK;
}

static ac_status
make_plan(const ac_sched_build *build, euler_plan *plan)
{
    ac_sigma_kind kind;
    ac_sched_grid grid = {.last = build->n_train, .fractional = true};
    AC_TRY(ac_sched_sigma_kind(build, &kind));
    AC_TRY(ac_sched_timesteps(build, grid, &plan->timesteps, &plan->count));
    AC_TRY(interpolate(build, plan));
    if (kind != AC_SIGMA_PLAIN) {
        double high = plan->sigmas[0], low = plan->sigmas[plan->n_sigmas - 1];
        AC_TRY(sigma_range(build, &high, &low));
        plan->n_sigmas = plan->count = build->options.num_inference_steps;
        ac_sched_sigmas(kind, high, low, plan->sigmas, plan->n_sigmas);
        for (int32_t i = 0; i < plan->count; i++) {
            plan->timesteps[i] = ac_sched_time_of(build, plan->sigmas[i]);
        }
    }
    bool ends_at_zero;
    return ac_sched_final_sigma(build, &plan->sigmas[plan->n_sigmas++], &ends_at_zero);
}

/* timestep_type "continuous" tells a v-prediction UNet log(sigma) / 4, one for every sigma but the
 * last: with log_linear interpolation that is one row more. */
static ac_status
continuous_timesteps(const ac_sched_build *build, euler_plan *plan)
{
    static const char *const type[] = {"discrete", "continuous", NULL};
    int32_t index;
    AC_TRY(ac_sched_get_choice(build, "timestep_type", type, 0, &index));
    if (index == 0 || build->prediction != AC_PREDICT_V) {
        return AC_OK;
    }
    plan->count = plan->n_sigmas - 1;
    AC_TRY(ac_sched_doubles(build, plan->count, &plan->timesteps));
    for (int32_t i = 0; i < plan->count; i++) {
        plan->timesteps[i] = 0.25 * log(plan->sigmas[i]);
    }
    return AC_OK;
}

static ac_status
fill(ac_sched_build *build)
{
    euler_plan plan = {0};
    AC_TRY(make_plan(build, &plan));
    AC_TRY(continuous_timesteps(build, &plan));
    AC_TRY(ac_sched_rows(build, plan.count));
    build->out->init_noise_sigma = ac_sched_euler_noise(build, plan.sigmas, plan.n_sigmas);
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        ac_sched_row *row = &build->out->rows[i];
        const double *sigma = &plan.sigmas[build->options.begin + i];
        AC_TRY(ac_sched_euler_check(build, sigma[0], i));
        row->timestep = (float)plan.timesteps[build->options.begin + i];
        ac_sched_euler_convert(build->prediction, sigma[0], row);
        ac_sched_euler_step(build->prediction, sigma[0], sigma[1], row);
    }
    return AC_OK;
}

const ac_sched_class ac_sched_euler = {
    .name = "EulerDiscreteScheduler",
    .spacing = AC_SPACING_LINSPACE,
    .has_zero_snr = true,
    .lifts_zero_snr = true,
    .predictions = AC_TAKES(EPSILON) | AC_TAKES(SAMPLE) | AC_TAKES(V) | AC_TAKES(ORIGINAL),
    .fill = fill,
};
