/* schedulers/dpm_multistep: DPM-Solver and DPM-Solver++, multistep (Lu et al. 2022a, 2022b),
 * diffusers' DPMSolverMultistepScheduler.
 *
 * With x = alpha x0 + sigma noise and lambda = log(alpha / sigma), a step h = lambda' - lambda is
 *
 *     x' = on_x x + k0 D0 + k1 D1 + k2 D2 + on_noise noise
 *
 * D0 is the converted model output m0 (x0 for the ++ forms, else the noise), D1 and D2 its
 * first and second divided differences over the last two and three rows:
 *
 *     r0 = (lambda0 - lambda1) / h          D10 = (m0 - m1) / r0
 *     r1 = (lambda1 - lambda2) / h          D11 = (m1 - m2) / r1
 *     order 2: D1 = D10
 *     order 3: D1 = D10 + r0 / (r0 + r1) (D10 - D11)      D2 = (D10 - D11) / (r0 + r1)
 *
 * Registers: r0 and r1 hold m1 and m2.
 */
#include "common.h"

#include <math.h>
#include <string.h>

typedef enum dpm_algorithm { DPM, DPM_PP, SDE_DPM, SDE_DPM_PP } dpm_algorithm;

typedef struct dpm_config {
    dpm_algorithm algorithm;
    bool heun, lower_order_final, euler_at_final, flow, lu, final_zero, threshold;
    int32_t order;
    double ratio, max_value; /* of the threshold */
} dpm_config;

typedef struct dpm_plan {
    double *sigmas;    /* [count + 1] */
    double *timesteps; /* [count] */
    int32_t count;
    bool lu;           /* spaced by use_lu_lambdas */
} dpm_plan;

/* ---- config ---------------------------------------------------------------------------------- */

static ac_status
read_algorithm(const ac_sched_build *build, dpm_config *out)
{
    /* deis, and the solver types of other classes, are what from_config brings along */
    static const char *const algorithm[] = {"dpmsolver",       "dpmsolver++", "sde-dpmsolver",
                                            "sde-dpmsolver++", "deis",        NULL};
    static const char *const solver[] = {"midpoint", "heun", "logrho", "bh1", "bh2", NULL};
    enum { DEIS = 4, HEUN = 1 };
    double unused;
    int32_t index;
    AC_TRY(ac_sched_get_choice(build, "algorithm_type", algorithm, DPM_PP, &index));
    AC_TRY(ac_sched_final_sigma(build, &unused, &out->final_zero));
    if (out->final_zero && index != DPM_PP && index != SDE_DPM_PP) {
        return ac_sched_error(build,
                              "final_sigmas_type: found \"zero\" with algorithm_type \"%s\", "
                              "expected \"sigma_min\" (diffusers raises too)",
                              algorithm[index]);
    }
    out->algorithm = index == DEIS ? DPM_PP : (dpm_algorithm)index;
    AC_TRY(ac_sched_get_choice(build, "solver_type", solver, 0, &index));
    out->heun = index == HEUN;
    return AC_OK;
}

static bool
predicts_x0(const dpm_config *config)
{
    return config->algorithm == DPM_PP || config->algorithm == SDE_DPM_PP;
}

static bool
is_stochastic(const dpm_config *config)
{
    return config->algorithm == SDE_DPM || config->algorithm == SDE_DPM_PP;
}

static ac_status
read_config(const ac_sched_build *build, dpm_config *out)
{
    static const char *const variance[] = {"learned", "learned_range", NULL};
    int64_t order;
    int32_t learned;
    AC_TRY(read_algorithm(build, out));
    AC_TRY(ac_sched_get_int(build, "solver_order", 2, 1, 3, &order));
    AC_TRY(ac_sched_get_bool(build, "lower_order_final", true, &out->lower_order_final));
    AC_TRY(ac_sched_get_bool(build, "euler_at_final", false, &out->euler_at_final));
    AC_TRY(ac_sched_get_bool(build, "use_lu_lambdas", false, &out->lu));
    AC_TRY(ac_sched_get_bool(build, "use_flow_sigmas", false, &out->flow));
    AC_TRY(ac_sched_get_threshold(build, &out->threshold, &out->ratio, &out->max_value));
    AC_TRY(ac_sched_get_choice(build, "variance_type", variance, -1, &learned));
    if (learned >= 0 && build->prediction == AC_PREDICT_EPSILON) {
        return ac_sched_error(build,
                              "variance_type: found \"%s\", expected null; diffusers takes three "
                              "channels of the model's output then, which fits no latent",
                              variance[learned]);
    }
    if (build->prediction == AC_PREDICT_FLOW && !predicts_x0(out)) {
        return ac_sched_error(build, "prediction_type: found \"flow_prediction\", expected "
                                     "algorithm_type dpmsolver++ or sde-dpmsolver++ with it");
    }
    out->order = (int32_t)order;
    return AC_OK;
}

/* ---- timesteps and sigmas -------------------------------------------------------------------- */

/* Training steps whose lambda is at least lambda_min_clipped. */
static ac_status
count_usable(const ac_sched_build *build, int32_t *out)
{
    double least;
    int32_t clipped = 0;
    AC_TRY(ac_sched_get_limit(build, "lambda_min_clipped", -INFINITY, &least));
    for (int32_t i = build->n_alphas - 1; i >= 0; i--) {
        double a = build->alphas[i];
        if (0.5 * log(a) - 0.5 * log(1.0 - a) >= least) {
            break;
        }
        clipped++;
    }
    *out = build->n_train - clipped;
    if (*out < 1) {
        return ac_sched_error(build, "lambda_min_clipped: found %g, which leaves no timestep",
                              least);
    }
    return AC_OK;
}

/* Sigmas that do not come from timesteps; their timesteps are told to the UNet as integers. */
static void
convert_sigmas(const ac_sched_build *build, ac_sigma_kind kind, dpm_plan *plan)
{
    int32_t last = build->n_alphas - 1;
    float high = ac_sched_sigma_f32(build, last), low = ac_sched_sigma_f32(build, 0);
    ac_sched_sigmas(kind, high, low, plan->sigmas, plan->count);
    const ac_json *schedule = ac_json_get(build->config, "beta_schedule");
    bool cosine = schedule && schedule->kind == AC_JSON_STRING &&
                  strcmp(schedule->string, "squaredcos_cap_v2") == 0;
    bool rounds = (kind == AC_SIGMA_LU || kind == AC_SIGMA_KARRAS) && !cosine;
    for (int32_t i = 0; i < plan->count; i++) {
        double t = ac_sched_time_of(build, plan->sigmas[i]);
        plan->timesteps[i] = rounds ? rint(t) : trunc(t);
    }
    /* timesteps follow diffusers' f32 roundings, the arithmetic does not */
    kind = kind == AC_SIGMA_LU ? AC_SIGMA_EXPONENTIAL : kind;
    ac_sched_sigmas(kind, build->sigmas[last], build->sigmas[0], plan->sigmas, plan->count);
}

/* Straight lines from noise to image, sigma in [0, 1], shifted towards the noisy end. */
static ac_status
flow_sigmas(const ac_sched_build *build, dpm_plan *plan)
{
    double shift;
    AC_TRY(ac_sched_get_number(build, "flow_shift", 1.0, &shift));
    for (int32_t i = 0; i < plan->count; i++) {
        double s = 1.0 - ac_sched_linspace(1.0, 1.0 / build->n_train, plan->count + 1,
                                           plan->count - i);
        plan->sigmas[i] = shift * s / (1.0 + (shift - 1.0) * s);
        plan->timesteps[i] = trunc(plan->sigmas[i] * build->n_train);
    }
    return AC_OK;
}

static ac_status
make_plan(const ac_sched_build *build, const dpm_config *config, dpm_plan *plan)
{
    ac_sigma_kind kind;
    bool zero;
    ac_sched_grid grid = {.extra = 1};
    AC_TRY(count_usable(build, &grid.last));
    AC_TRY(ac_sched_sigma_kind(build, &kind));
    if (config->lu && kind != AC_SIGMA_KARRAS) {
        kind = AC_SIGMA_LU;
    }
    plan->lu = kind == AC_SIGMA_LU;
    bool converted = kind != AC_SIGMA_PLAIN;
    if (converted || config->flow) {
        plan->count = build->options.num_inference_steps;
        AC_TRY(ac_sched_doubles(build, plan->count, &plan->timesteps));
    } else {
        AC_TRY(ac_sched_timesteps(build, grid, &plan->timesteps, &plan->count));
    }
    AC_TRY(ac_sched_doubles(build, (int64_t)plan->count + 1, &plan->sigmas));
    if (converted) {
        convert_sigmas(build, kind, plan);
    } else if (config->flow) {
        AC_TRY(flow_sigmas(build, plan));
    } else {
        for (int32_t i = 0; i < plan->count; i++) {
            plan->sigmas[i] = ac_sched_sigma_at(build, plan->timesteps[i]);
        }
    }
    return ac_sched_final_sigma(build, &plan->sigmas[plan->count], &zero);
}

/* ---- rows ------------------------------------------------------------------------------------ */

typedef struct dpm_level {
    double sigma; /* as in the plan */
    double alpha, noise; /* x = alpha x0 + noise eps */
    double lambda;
} dpm_level;

static dpm_level
level_of(const dpm_config *config, double sigma)
{
    dpm_level out = {.sigma = sigma};
    out.alpha = config->flow ? 1.0 - sigma : 1.0 / sqrt(sigma * sigma + 1.0);
    out.noise = config->flow ? sigma : sigma * out.alpha;
    out.lambda = log(out.alpha) - log(out.noise);
    return out;
}

/* x0 = to_x0[0] x + to_x0[1] e */
static void
data_weights(ac_prediction prediction, dpm_level at, double to_x0[2])
{
    to_x0[0] = 0.0;
    to_x0[1] = 1.0;
    if (prediction == AC_PREDICT_EPSILON) {
        to_x0[0] = 1.0 / at.alpha;
        to_x0[1] = -at.noise / at.alpha;
    } else if (prediction == AC_PREDICT_V) {
        to_x0[0] = at.alpha;
        to_x0[1] = -at.noise;
    } else if (prediction == AC_PREDICT_FLOW) {
        to_x0[0] = 1.0;
        to_x0[1] = -at.sigma;
    }
}

/* noise = to_noise[0] x + to_noise[1] e */
static void
noise_weights(ac_prediction prediction, dpm_level at, double to_noise[2])
{
    to_noise[0] = 0.0;
    to_noise[1] = 1.0;
    if (prediction == AC_PREDICT_V) {
        to_noise[0] = at.noise;
        to_noise[1] = at.alpha;
    } else if (prediction == AC_PREDICT_SAMPLE) {
        to_noise[0] = 1.0 / at.noise;
        to_noise[1] = -at.alpha / at.noise;
    }
}

/* m of the row; the converted output as weights on the basis goes to `out`.  It is m itself, but
 * for a noise that is made again from a thresholded x0. */
static void
convert(const ac_sched_build *build, const dpm_config *config, dpm_level at, ac_sched_row *row,
        double out[AC_BASIS_COUNT])
{
    double m[2];
    out[AC_BASIS_M] = 1.0;
    if (predicts_x0(config)) {
        data_weights(build->prediction, at, m);
    } else {
        noise_weights(build->prediction, at, m);
    }
    if (!predicts_x0(config) && config->threshold) {
        /* x0 by way of the noise: with flow sigmas that is another one than data_weights has */
        m[0] = (1.0 - at.noise * m[0]) / at.alpha;
        m[1] = -at.noise * m[1] / at.alpha;
        out[AC_BASIS_X] = 1.0 / at.noise;
        out[AC_BASIS_M] = -at.alpha / at.noise;
    }
    row->m_x = m[0];
    row->m_e = m[1];
    row->threshold = config->threshold ? config->ratio : 0.0;
    row->threshold_max = config->max_value;
}

typedef struct dpm_step {
    double on_x, on_noise;
    double k[3]; /* of D0, D1, D2 */
} dpm_step;

static dpm_step
step_of(const dpm_config *config, int32_t order, dpm_level from, dpm_level to)
{
    double h = to.lambda - from.lambda;
    bool exact = order == 3 || config->heun; /* else the midpoint rule for D1 */
    dpm_step s = {0};
    if (config->algorithm == DPM_PP) {
        double g = expm1(-h);
        s.on_x = to.noise / from.noise;
        s.k[0] = -to.alpha * g;
        s.k[1] = exact ? to.alpha * (g / h + 1.0) : 0.5 * s.k[0];
        s.k[2] = -to.alpha * ((g + h) / (h * h) - 0.5);
    } else if (config->algorithm == SDE_DPM_PP) {
        double g = -expm1(-2.0 * h);
        s.on_x = to.noise / from.noise * exp(-h);
        s.on_noise = to.noise * sqrt(g);
        s.k[0] = to.alpha * g;
        s.k[1] = exact ? to.alpha * (g / (-2.0 * h) + 1.0) : 0.5 * s.k[0];
        s.k[2] = to.alpha * ((g - 2.0 * h) / (4.0 * h * h) - 0.5);
    } else { /* the sde form moves twice as far along the model's direction */
        double g = expm1(h), times = config->algorithm == SDE_DPM ? 2.0 : 1.0;
        s.on_x = to.alpha / from.alpha;
        s.on_noise = config->algorithm == SDE_DPM ? to.noise * sqrt(expm1(2.0 * h)) : 0.0;
        s.k[0] = -times * to.noise * g;
        s.k[1] = exact ? -times * to.noise * (g / h - 1.0) : 0.5 * s.k[0];
        s.k[2] = -to.noise * ((g - h) / (h * h) - 0.5);
    }
    return s;
}

/* Weights on m0, m1, m2 of k0 D0 + k1 D1 + k2 D2. */
static void
spread_differences(const dpm_step *s, int32_t order, double r0, double r1, double weight[3])
{
    weight[0] = s->k[0];
    if (order == 2) {
        weight[0] += s->k[1] / r0;
        weight[1] = -s->k[1] / r0;
    } else if (order == 3) {
        double both = (s->k[1] * r0 + s->k[2]) / (r0 + r1);
        double d10 = s->k[1] + both, d11 = -both;
        weight[0] += d10 / r0;
        weight[1] = -d10 / r0 + d11 / r1;
        weight[2] = -d11 / r1;
    }
}

/* Two equal sigmas in a row leave nothing to divide by.  diffusers holds sigmas in f32, so that is
 * where they are compared. */
static ac_status
check_distinct(const ac_sched_build *build, const dpm_config *config, int32_t order,
               const double *sigma, int32_t row)
{
    bool same_next = (float)sigma[0] == (float)sigma[1];
    for (int32_t i = 1; i < order; i++) {
        bool same = (float)sigma[-i] == (float)sigma[1 - i];
        if (same || (same_next && (order == 3 || config->heun))) {
            return ac_sched_error(build,
                                  "row %d: found the same sigma %g twice in a step of order %d, "
                                  "where diffusers gives NaN; see final_sigmas_type, "
                                  "lower_order_final, solver_type and num_inference_steps",
                                  row, sigma[0], order);
        }
    }
    return AC_OK;
}

static int32_t
order_of(const dpm_config *config, const dpm_plan *plan, int32_t index, int32_t history)
{
    bool few = config->lower_order_final && plan->count < 15;
    if (index == plan->count - 1 && (config->euler_at_final || few || config->final_zero)) {
        return 1;
    }
    /* lu sigmas end so near sigma_min that a step to it is empty, but not to the bit in diffusers,
     * where its higher orders therefore survive; what they add is nothing */
    if (plan->lu && (float)plan->sigmas[index] == (float)plan->sigmas[index + 1]) {
        return 1;
    }
    int32_t order = AC_MIN(config->order, history + 1);
    return index == plan->count - 2 && few ? AC_MIN(order, 2) : order;
}

static ac_status
fill_row(const ac_sched_build *build, const dpm_config *config, const dpm_plan *plan,
         int32_t index, ac_sched_row *row)
{
    const double *sigma = &plan->sigmas[index];
    int32_t order = order_of(config, plan, index, index - build->options.begin);
    if (order == 3 && config->algorithm == SDE_DPM) {
        return ac_sched_error(build, "solver_order: found 3 with algorithm_type "
                                     "\"sde-dpmsolver\", which diffusers has no formula for");
    }
    AC_TRY(check_distinct(build, config, order, sigma, index));
    bool stays = (float)sigma[0] == (float)sigma[1]; /* an empty step, h is 0 and not a rounding */
    dpm_level from = level_of(config, sigma[0]), to = level_of(config, sigma[stays ? 0 : 1]);
    double output[AC_BASIS_COUNT] = {0}, weight[3] = {0}, r0 = 1.0, r1 = 1.0;
    double h = to.lambda - from.lambda;
    convert(build, config, from, row, output);
    if (order > 1) {
        r0 = (from.lambda - level_of(config, sigma[-1]).lambda) / h;
    }
    if (order > 2) {
        r1 = (level_of(config, sigma[-1]).lambda - level_of(config, sigma[-2]).lambda) / h;
    }
    dpm_step step = step_of(config, order, from, to);
    spread_differences(&step, order, r0, r1, weight);
    for (int32_t i = 0; i < AC_BASIS_COUNT; i++) {
        row->x_next[i] = weight[0] * output[i];
        row->store[0].c[i] = output[i];
    }
    row->x_next[AC_BASIS_X] += step.on_x;
    row->x_next[AC_BASIS_NOISE] = step.on_noise;
    row->x_next[AC_BASIS_R0] = weight[1];
    row->x_next[AC_BASIS_R0 + 1] = weight[2];
    row->n_stores = config->order - 1;
    row->store[1].to = 1;
    row->store[1].c[AC_BASIS_R0] = 1.0;
    row->timestep = plan->timesteps[index];
    row->scale_in = 1.0;
    row->start_x = from.alpha;
    row->start_noise = from.noise;
    row->draws_noise = is_stochastic(config);
    return AC_OK;
}

static ac_status
fill(ac_sched_build *build)
{
    dpm_config config = {0};
    dpm_plan plan = {0};
    AC_TRY(read_config(build, &config));
    AC_TRY(make_plan(build, &config, &plan));
    AC_TRY(ac_sched_rows(build, plan.count));
    build->out->noise_f32 = true;
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        AC_TRY(fill_row(build, &config, &plan, build->options.begin + i, &build->out->rows[i]));
    }
    return AC_OK;
}

const ac_sched_class ac_sched_dpm_multistep = {
    .name = "DPMSolverMultistepScheduler",
    .spacing = AC_SPACING_LINSPACE,
    .has_zero_snr = true,
    .lifts_zero_snr = true,
    .predictions = AC_TAKES(EPSILON) | AC_TAKES(SAMPLE) | AC_TAKES(V) | AC_TAKES(FLOW),
    .fill = fill,
};
