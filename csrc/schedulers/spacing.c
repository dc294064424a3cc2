/* schedulers/spacing: which timesteps, which sigmas.  See common.h.
 *
 * Timesteps are what the UNet is told, so they must be diffusers' own: NumPy's linspace, arange,
 * round and interp are followed operation by operation, in the types diffusers uses.
 */
#include "common.h"

#include <math.h>

/* ---- timesteps ------------------------------------------------------------------------------- */

double
ac_sched_linspace(double start, double stop, int32_t count, int32_t index)
{
    if (index == count - 1 && count > 1) {
        return stop;
    }
    double step = count > 1 ? (stop - start) / (count - 1) : 0.0;
    return index * step + start;
}

/* len(np.arange(last, 0, -step)) and its elements. */
static double
arange_length(double last, double step)
{
    return ceil((0.0 - last) / -step);
}

static double
arange_at(double last, double step, int32_t index)
{
    double delta = (last - step) - last; /* as NumPy: the difference of the first two elements */
    return last + index * delta;
}

static ac_status
count_timesteps(const ac_sched_build *build, ac_sched_grid grid, double step, int32_t *count)
{
    *count = build->options.num_inference_steps;
    if (build->spacing != AC_SPACING_TRAILING) {
        return AC_OK;
    }
    double length = arange_length(grid.last, step);
    if (!(length >= 1.0 && length <= AC_SCHED_MAX_ROWS)) {
        return ac_sched_error(build, "timestep_spacing: found %g timesteps, expected 1 to %d",
                              length, AC_SCHED_MAX_ROWS);
    }
    *count = (int32_t)length;
    return AC_OK;
}

ac_status
ac_sched_timesteps(const ac_sched_build *build, ac_sched_grid grid, double **out, int32_t *count)
{
    int32_t points = build->options.num_inference_steps + grid.extra;
    double step = (double)build->n_train / build->options.num_inference_steps;
    AC_TRY(count_timesteps(build, grid, step, count));
    AC_TRY(ac_sched_doubles(build, *count, out));
    for (int32_t i = 0; i < *count; i++) {
        int32_t rising = points - 1 - i; /* from the noisy end */
        double t = 0.0;
        switch (build->spacing) {
        case AC_SPACING_LINSPACE:
            t = ac_sched_linspace(0.0, grid.last - 1.0, points, rising);
            t = grid.fractional ? t : rint(t);
            break;
        case AC_SPACING_LEADING:
            t = (double)rising * (grid.last / points) + build->steps_offset;
            break;
        case AC_SPACING_TRAILING:
            t = rint(arange_at(grid.last, step, i)) - 1.0;
            break;
        }
        (*out)[i] = t;
    }
    return AC_OK;
}

ac_status
ac_sched_rows(ac_sched_build *build, int32_t n_timesteps)
{
    int32_t begin = build->options.begin;
    if (begin >= n_timesteps) {
        return ac_error(AC_E_INVALID, "%s: found begin %d, expected below the %d timesteps",
                        build->cls->name, begin, n_timesteps);
    }
    build->n_timesteps = n_timesteps;
    build->out->n_rows = n_timesteps - begin;
    size_t bytes = (size_t)build->out->n_rows * sizeof *build->out->rows;
    build->out->rows = ac_arena_alloc(&build->out->arena, bytes);
    return build->out->rows ? AC_OK : ac_no_memory(bytes);
}

/* ---- sigmas ---------------------------------------------------------------------------------- */

ac_status
ac_sched_sigma_kind(const ac_sched_build *build, ac_sigma_kind *out)
{
    static const char *const field[] = {NULL, "use_karras_sigmas", "use_exponential_sigmas",
                                        "use_beta_sigmas"};
    *out = AC_SIGMA_PLAIN;
    for (int32_t kind = AC_SIGMA_KARRAS; kind <= AC_SIGMA_BETA; kind++) {
        bool on;
        AC_TRY(ac_sched_get_bool(build, field[kind], false, &on));
        if (on && *out != AC_SIGMA_PLAIN) {
            return ac_sched_error(build, "%s: found true beside %s, expected one of them at most",
                                  field[kind], field[*out]);
        }
        if (on) {
            *out = (ac_sigma_kind)kind;
        }
    }
    return AC_OK;
}

void
ac_sched_sigmas(ac_sigma_kind kind, double high, double low, double *out, int32_t count)
{
    const double rho = 7.0; /* Karras et al. 2022 */
    double low_root = pow(low, 1.0 / rho), high_root = pow(high, 1.0 / rho);
    for (int32_t i = 0; i < count; i++) {
        double ramp = ac_sched_linspace(0.0, 1.0, count, i);
        switch (kind) {
        case AC_SIGMA_KARRAS:
            out[i] = pow(high_root + ramp * (low_root - high_root), rho);
            break;
        case AC_SIGMA_EXPONENTIAL:
            out[i] = exp(ac_sched_linspace(log(high), log(low), count, i));
            break;
        case AC_SIGMA_LU:
            out[i] = exp(ac_sched_linspace((float)log(high), (float)log(low), count, i));
            break;
        case AC_SIGMA_BETA: /* Lee et al. 2024 */
            out[i] = low + ac_beta_ppf(1.0 - ramp, 0.6, 0.6) * (high - low);
            break;
        case AC_SIGMA_PLAIN:
            break;
        }
    }
}

ac_status
ac_sched_final_sigma(const ac_sched_build *build, double *out, bool *is_zero)
{
    static const char *const name[] = {"zero", "sigma_min", NULL};
    int32_t index;
    AC_TRY(ac_sched_get_choice(build, "final_sigmas_type", name, 0, &index));
    *is_zero = index == 0;
    *out = *is_zero ? 0.0 : build->sigmas[0];
    return AC_OK;
}

double
ac_sched_sigma_at(const ac_sched_build *build, double t)
{
    int32_t last = build->n_alphas - 1;
    if (t <= 0.0) {
        return build->sigmas[0];
    }
    if (t >= last) {
        return build->sigmas[last];
    }
    int32_t low = (int32_t)t;
    return (build->sigmas[low + 1] - build->sigmas[low]) * (t - low) + build->sigmas[low];
}

float
ac_sched_sigma_f32(const ac_sched_build *build, int32_t index)
{
    float a = (float)build->alphas[index];
    return sqrtf((1.0f - a) / a);
}

double
ac_sched_time_of(const ac_sched_build *build, double sigma)
{
    const double *logs = build->log_sigmas;
    double wanted = log(fmax(sigma, 1e-10));
    int32_t last = build->n_alphas - 1, low = 0, above = last;
    while (above - low > 1) { /* the last one that is not above `wanted`, all but the last rise */
        int32_t middle = low + (above - low) / 2;
        *(logs[middle] <= wanted ? &low : &above) = middle;
    }
    low = logs[last] <= wanted ? AC_MAX(last - 1, 0) : low;
    int32_t high = AC_MIN(low + 1, build->n_alphas - 1);
    double w = (logs[low] - wanted) / (float)(logs[low] - logs[high]);
    w = fmin(fmax(w, 0.0), 1.0);
    return (1.0 - w) * low + w * high;
}

/* ---- the beta distribution ------------------------------------------------------------------- */

/* The continued fraction of I_x(a, b) by Lentz' method; converges fast for x < (a+1)/(a+b+2). */
static double
beta_fraction(double x, double a, double b)
{
    const double tiny = 1e-300;
    double c = 1.0, d = 1.0 - (a + b) * x / (a + 1.0);
    d = 1.0 / (fabs(d) < tiny ? tiny : d);
    double result = d;
    for (int m = 1; m < 300; m++) {
        double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
        double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
        double change = 1.0;
        for (int half = 0; half < 2; half++) {
            double term = half ? odd : even;
            d = 1.0 + term * d;
            c = 1.0 + term / c;
            d = 1.0 / (fabs(d) < tiny ? tiny : d);
            c = fabs(c) < tiny ? tiny : c;
            change = c * d;
            result *= change;
        }
        if (fabs(change - 1.0) < 1e-16) {
            break;
        }
    }
    return result;
}

/* x with I_x(a, b) = p for p in the lower half of the range: Newton on the logarithm, kept inside
 * a bracket.  log I is nearly linear in log x there, so it takes a handful of steps. */
static double
beta_ppf_lower(double p, double a, double b, double high)
{
    double log_beta = lgamma(a) + lgamma(b) - lgamma(a + b);
    double low = 0.0, x = fmin(exp((log(p) + log(a) + log_beta) / a), 0.5 * high);
    for (int i = 0; i < 100; i++) {
        double density = exp((a - 1.0) * log(x) + (b - 1.0) * log1p(-x) - log_beta);
        double value = density * x * (1.0 - x) / a * beta_fraction(x, a, b);
        *(value > p ? &high : &low) = x;
        double next = x * exp(-value * log(value / p) / (density * x));
        if (!(next > low && next < high)) {
            next = 0.5 * (low + high);
        }
        double step = fabs(next - x);
        x = next;
        if (step <= 1e-16 * x) {
            break;
        }
    }
    return x;
}

double
ac_beta_ppf(double p, double a, double b)
{
    if (p <= 0.0) {
        return 0.0;
    }
    if (p >= 1.0) {
        return 1.0;
    }
    /* Where the fraction converges; the other side by symmetry. */
    double split = (a + 1.0) / (a + b + 2.0);
    double log_beta = lgamma(a) + lgamma(b) - lgamma(a + b);
    double at_split = exp(a * log(split) + b * log1p(-split) - log_beta) / a *
                      beta_fraction(split, a, b);
    if (p <= at_split) {
        return beta_ppf_lower(p, a, b, split);
    }
    return 1.0 - beta_ppf_lower(1.0 - p, b, a, 1.0 - split);
}
