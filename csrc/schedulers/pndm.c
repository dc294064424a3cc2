/* schedulers/pndm: pseudo numerical methods for diffusion models (Liu et al. 2022), diffusers'
 * PNDMScheduler.
 *
 * Both halves end in the same transfer from timestep t to t', formula (9), linear in the latent
 * and in a combination of model outputs:
 *
 *     x' = transfer(x, t -> t', e*)
 *
 *     Runge-Kutta (12 rows, unless skip_prk_steps): three groups of four rows, e* = e, e, e and
 *         (e1 + 2 e2 + 2 e3 + e4) / 6, always from the latent x of the group's first row
 *     multistep: e* is the Adams-Bashforth combination of the last four outputs
 *         without Runge-Kutta before it, row 0 is a plain step, and row 1 does it again from the
 *         same latent with the mean of both outputs (the repeated timestep, Heun's method)
 *
 * Registers: r0 r1 r2 the outputs of earlier rows, newest first; r3 the latent a group or the
 * repeated row starts from; r4 the running sum of a group.
 */
#include "common.h"

#include <math.h>

enum { KEPT_LATENT = 3, GROUP_SUM = 4, PRK_ROWS = 12 };

typedef struct pndm_walk {
    ac_sched_build *build;
    double final_alpha;
    int64_t stride; /* training steps between two timesteps */
} pndm_walk;

static void
store(ac_sched_row *row, int32_t to, int32_t basis, double coefficient)
{
    int32_t slot = 0;
    while (slot < row->n_stores && row->store[slot].to != to) {
        slot++;
    }
    if (slot == row->n_stores) {
        row->store[row->n_stores++].to = to;
    }
    row->store[slot].c[basis] = coefficient;
}

/* Adds transfer(from, t -> before, e*) to the row.  `outputs` are e*'s weights on [e, r0 .. r5],
 * `from` the basis index of the latent. */
static ac_status
transfer(const pndm_walk *walk, int64_t t, int64_t before, int32_t from,
         const double outputs[1 + AC_SCHED_REGISTERS], ac_sched_row *row)
{
    double a, a_next = walk->final_alpha;
    AC_TRY(ac_sched_alpha(walk->build, t, &a));
    if (before >= 0) {
        AC_TRY(ac_sched_alpha(walk->build, before, &a_next));
    }
    double denominator = a * sqrt(1.0 - a_next) + sqrt(a * (1.0 - a) * a_next);
    double weight = -(a_next - a) / denominator;
    double on_latent = sqrt(a_next / a);
    if (walk->build->prediction == AC_PREDICT_V) { /* the noise is sqrt(a) v + sqrt(1 - a) x */
        on_latent += weight * sqrt(1.0 - a);
        weight *= sqrt(a);
    }
    row->x_next[from] += on_latent;
    row->x_next[AC_BASIS_E] += weight * outputs[0];
    for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        row->x_next[AC_BASIS_R0 + i] += weight * outputs[1 + i];
    }
    return AC_OK;
}

/* Row `counter` of the Runge-Kutta part.  `group_t`: the timestep its group starts from. */
static ac_status
fill_prk(const pndm_walk *walk, int32_t counter, int64_t t, int64_t group_t, ac_sched_row *row)
{
    static const double share[4] = {1.0 / 6, 1.0 / 3, 1.0 / 3, 1.0 / 6};
    int32_t group = counter / 4, stage = counter % 4;
    int64_t before = t - (counter % 2 ? 0 : walk->stride / 2);
    double outputs[1 + AC_SCHED_REGISTERS] = {1.0};
    if (stage == 0) {
        store(row, 2 - group, AC_BASIS_E, 1.0); /* r2, r1, r0: the newest ends up in r0 */
        store(row, KEPT_LATENT, AC_BASIS_X, 1.0);
        store(row, GROUP_SUM, AC_BASIS_E, share[0]);
    } else if (stage < 3) {
        store(row, GROUP_SUM, AC_BASIS_R0 + GROUP_SUM, 1.0);
        store(row, GROUP_SUM, AC_BASIS_E, share[stage]);
    } else {
        outputs[0] = share[3];
        outputs[1 + GROUP_SUM] = 1.0;
    }
    int32_t from = stage == 0 ? AC_BASIS_X : AC_BASIS_R0 + KEPT_LATENT;
    return transfer(walk, group_t, before, from, outputs, row);
}

/* Row `counter` of the multistep part; `known` outputs of earlier rows are in r0, r1, r2. */
static ac_status
fill_plms(const pndm_walk *walk, int32_t counter, int32_t known, int64_t t, ac_sched_row *row)
{
    static const double adams[4][4] = {{1.0},
                                       {3.0 / 2, -1.0 / 2},
                                       {23.0 / 12, -16.0 / 12, 5.0 / 12},
                                       {55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24}};
    double outputs[1 + AC_SCHED_REGISTERS] = {0};
    if (counter == 1) { /* the repeated row */
        outputs[0] = outputs[1] = 0.5;
        return transfer(walk, t + walk->stride, t, AC_BASIS_R0 + KEPT_LATENT, outputs, row);
    }
    for (int32_t i = 0; i <= known; i++) {
        outputs[i] = adams[known][i];
    }
    store(row, 0, AC_BASIS_E, 1.0);
    for (int32_t i = 1; i < 3 && i <= known; i++) {
        store(row, i, AC_BASIS_R0 + i - 1, 1.0);
    }
    if (counter == 0) {
        store(row, KEPT_LATENT, AC_BASIS_X, 1.0);
    }
    return transfer(walk, t, t - walk->stride, AC_BASIS_X, outputs, row);
}

/* What scheduler.timesteps holds: [first, second, second, third ...] without Runge-Kutta, else
 * its 12 timesteps (each group: t, t - half, t - half, t - stride), then the rest. */
static ac_status
make_timesteps(const ac_sched_build *build, bool skip_prk, double **out, int32_t *count)
{
    double *grid;
    int32_t n;
    AC_TRY(ac_sched_timesteps(build, (ac_sched_grid){.last = build->n_train}, &grid, &n));
    AC_TRY(ac_sched_doubles(build, (int64_t)n + PRK_ROWS, out));
    if (skip_prk) {
        *count = 0;
        for (int32_t i = 0; i < n; i++) {
            (*out)[(*count)++] = grid[i];
            if (i == 1) {
                (*out)[(*count)++] = grid[i];
            }
        }
        return AC_OK;
    }
    if (n < 4) {
        return ac_error(AC_E_INVALID,
                        "PNDMScheduler: found %d timesteps, expected 4 or more without "
                        "skip_prk_steps (diffusers raises too)",
                        n);
    }
    int32_t half = build->n_train / build->options.num_inference_steps / 2;
    for (int32_t i = 0; i < PRK_ROWS; i++) {
        int32_t halves = (PRK_ROWS - i) / 2; /* half strides above the fourth timestep */
        (*out)[i] = grid[3 - halves / 2] + (halves % 2 ? half : 0);
    }
    for (int32_t i = 3; i < n; i++) {
        (*out)[PRK_ROWS + i - 3] = grid[i];
    }
    *count = PRK_ROWS + n - 3;
    return AC_OK;
}

static ac_status
fill(ac_sched_build *build)
{
    bool skip_prk, alpha_to_one;
    double *timesteps;
    int32_t count = 0;
    AC_TRY(ac_sched_get_bool(build, "skip_prk_steps", false, &skip_prk));
    AC_TRY(ac_sched_get_bool(build, "set_alpha_to_one", false, &alpha_to_one));
    AC_TRY(make_timesteps(build, skip_prk, &timesteps, &count));
    AC_TRY(ac_sched_rows(build, count));
    pndm_walk walk = {
        .build = build,
        .final_alpha = alpha_to_one ? 1.0 : build->alphas[0],
        .stride = build->n_train / build->options.num_inference_steps,
    };
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        ac_sched_row *row = &build->out->rows[i];
        int64_t t = (int64_t)timesteps[build->options.begin + i];
        double a;
        AC_TRY(ac_sched_alpha(build, t, &a));
        row->timestep = (double)t;
        row->scale_in = 1.0;
        row->m_e = 1.0;
        row->start_x = sqrt(a);
        row->start_noise = sqrt(1.0 - a);
        if (!skip_prk && i < PRK_ROWS) {
            AC_TRY(fill_prk(&walk, i, t, (int64_t)timesteps[i / 4 * 4], row));
        } else {
            int32_t known = skip_prk ? AC_MIN(AC_MAX(i - 1, 0), 3) : 3;
            AC_TRY(fill_plms(&walk, i, known, t, row));
        }
    }
    return AC_OK;
}

const ac_sched_class ac_sched_pndm = {
    .name = "PNDMScheduler",
    .spacing = AC_SPACING_LEADING,
    .predictions = AC_TAKES(EPSILON) | AC_TAKES(V),
    .fill = fill,
};
