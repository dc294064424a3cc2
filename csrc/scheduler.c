/* scheduler: config to schedule, and the one kernel that applies a row.  See scheduler.h.
 *
 * Where diffusers itself raises or computes NaN, so do we, naming the row or the field:
 *   DDIM       epsilon without clip_sample from a terminal alpha of 0 (rescale_betas_zero_snr with
 *              a spacing that reaches the last training step): epsilon divides by it
 *   DDIM       eta so large that 1 - a' - s^2 is negative
 *   PNDM       fewer than 4 timesteps without skip_prk_steps; prediction_type sample
 *   DDIM PNDM  timesteps beyond the training steps (steps_offset)
 *   Euler      a sigma of 0 (trained betas that begin with 0); two kinds of sigmas at once
 *   Euler a    prediction_type sample
 *   DPM        final_sigmas_type zero with dpmsolver, sde-dpmsolver or deis; solver_order 3 with
 *              sde-dpmsolver; flow_prediction with dpmsolver or sde-dpmsolver; learned variance;
 *              the same sigma twice in a row of order 2 or 3 (karras, exponential, beta or lu
 *              sigmas end at sigma_min: with final_sigmas_type sigma_min the last step is empty);
 *              a noise level that rises again in the sde forms
 * What is not foreseen is caught by check_finite.
 */
#include "scheduler.h"

#include <math.h>
#include <string.h>

#include "schedulers/common.h"

/* ---- config to schedule ---------------------------------------------------------------------- */

static const ac_sched_class *const classes[] = {
    &ac_sched_ddim,  &ac_sched_pndm,          &ac_sched_euler, &ac_sched_euler_ancestral,
    &ac_sched_dpm_multistep,
};

const char *const *
ac_scheduler_names(void)
{
    static const char *const names[] = {
        "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", NULL,
    };
    _Static_assert(AC_ARRAY_LEN(names) == AC_ARRAY_LEN(classes) + 1, "one name for each class");
    return names;
}

static ac_status
find_class(const ac_json *config, const ac_sched_class **out)
{
    const ac_json *name = ac_json_get(config, "_class_name");
    if (config->kind != AC_JSON_OBJECT || !name || name->kind != AC_JSON_STRING) {
        return ac_error(AC_E_UNSUPPORTED,
                        "scheduler config: found no \"_class_name\", expected a scheduler's name");
    }
    ac_text known = {0};
    for (size_t i = 0; i < AC_ARRAY_LEN(classes); i++) {
        if (strcmp(name->string, classes[i]->name) == 0) {
            ac_text_free(&known);
            *out = classes[i];
            return AC_OK;
        }
        ac_text_printf(&known, "%s%s", i ? ", " : "", classes[i]->name);
    }
    ac_status status = ac_error(AC_E_UNSUPPORTED, "scheduler: found \"%.64s\", expected one of %s",
                                name->string, known.data ? known.data : "");
    ac_text_free(&known);
    return status;
}

static ac_status
check_options(const ac_sched_options *options)
{
    if (options->num_inference_steps < 1 || options->num_inference_steps > AC_SCHED_MAX_ROWS) {
        return ac_error(AC_E_INVALID, "num_inference_steps: found %d, expected 1 to %d",
                        options->num_inference_steps, AC_SCHED_MAX_ROWS);
    }
    if (!(options->eta >= 0.0 && isfinite(options->eta))) {
        return ac_error(AC_E_INVALID, "eta: found %g, expected 0 or more", options->eta);
    }
    if (options->begin < 0) {
        return ac_error(AC_E_INVALID, "begin: found %d, expected 0 or more", options->begin);
    }
    return AC_OK;
}

/* NaN and infinity pass through sums, so a sum is finite only if everything is. */
static double
row_sum(const ac_sched_row *row)
{
    double sum = fabs(row->timestep) + fabs(row->scale_in) + fabs(row->m_x) + fabs(row->m_e) +
                 fabs(row->clip) + fabs(row->start_x) + fabs(row->start_noise);
    for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
        sum += fabs(row->x_next[k]);
        for (int32_t s = 0; s < row->n_stores; s++) {
            sum += fabs(row->store[s].c[k]);
        }
    }
    return sum;
}

static ac_status
check_finite(const ac_sched_build *build)
{
    if (!isfinite(build->out->init_noise_sigma)) { /* its square may overflow where it does not */
        return ac_sched_error(build, "the first sigma is too large: found %g for "
                                     "init_noise_sigma (see sigma_min, sigma_max)",
                              build->out->init_noise_sigma);
    }
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        if (!isfinite(row_sum(&build->out->rows[i]))) {
            return ac_sched_error(build,
                                  "row %d, timestep %g: found a coefficient that is not finite; "
                                  "diffusers gives NaN here (see prediction_type with "
                                  "rescale_betas_zero_snr, eta, trained_betas)",
                                  i, build->out->rows[i].timestep);
        }
    }
    return AC_OK;
}

/* diffusers' pipelines move the progress bar once a step; rows beyond num_inference_steps come
 * first and move nothing. */
static void
count_steps(ac_sched_build *build)
{
    int32_t warm_up = build->n_timesteps - build->options.num_inference_steps;
    for (int32_t i = 0; i < build->out->n_rows; i++) {
        int32_t index = build->options.begin + i;
        build->out->rows[i].counts = index >= warm_up || index == build->n_timesteps - 1;
    }
}

static ac_status
fill_schedule(ac_sched_build *build)
{
    AC_TRY(ac_sched_check_fields(build));
    AC_TRY(ac_sched_levels(build));
    AC_TRY(build->cls->fill(build));
    AC_TRY(check_finite(build));
    count_steps(build);
    return AC_OK;
}

ac_status
ac_schedule_new(const ac_json *config, const ac_sched_options *options, ac_schedule **out)
{
    ac_sched_build build = {.config = config, .options = *options};
    AC_TRY(check_options(options));
    AC_TRY(find_class(config, &build.cls));
    build.out = ac_calloc(1, sizeof *build.out);
    if (!build.out) {
        return ac_no_memory(sizeof *build.out);
    }
    ac_arena_init(&build.out->arena);
    build.out->init_noise_sigma = 1.0;
    ac_status status = fill_schedule(&build);
    if (status < 0) {
        ac_schedule_free(build.out);
        return status;
    }
    *out = build.out;
    return AC_OK;
}

void
ac_schedule_free(ac_schedule *schedule)
{
    if (schedule) {
        ac_arena_deinit(&schedule->arena);
        ac_free(schedule);
    }
}
