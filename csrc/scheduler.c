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

#include <assert.h>
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

/* ---- a row on the host ----------------------------------------------------------------------- */

/* Elements at a time: the double temporaries of a block stay in the first cache level. */
#define BLOCK 256

/* The pieces of an image: f32 pointers in basis order, NULL where there is no tensor (m is made
 * on the way). */
typedef struct sched_tensors {
    const float *basis[AC_BASIS_COUNT];
} sched_tensors;

/* out = a x + b e, before the clamp. */
static void
convert_block(const ac_sched_row *row, const float *x, const float *e, int64_t length,
              double *restrict out)
{
    for (int64_t i = 0; i < length; i++) {
        out[i] = row->m_x * (double)x[i] + row->m_e * (double)e[i];
    }
}

static void
clamp_block(double limit, double divisor, int64_t length, double *m)
{
    for (int64_t i = 0; i < length; i++) {
        double value = m[i] < -limit ? -limit : m[i] > limit ? limit : m[i];
        m[i] = value / divisor;
    }
}

/* out = sum of coefficient times basis over a block that starts at `at`. */
static void
combine_block(const double coefficient[AC_BASIS_COUNT], const sched_tensors *tensors,
              const double *m, int64_t at, int64_t length, double *restrict out)
{
    memset(out, 0, (size_t)length * sizeof *out);
    for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
        double c = coefficient[k];
        if (c == 0.0) {
            continue;
        }
        if (k == AC_BASIS_M) {
            for (int64_t i = 0; i < length; i++) {
                out[i] += c * m[i];
            }
            continue;
        }
        assert(tensors->basis[k]);
        const float *from = tensors->basis[k] + at;
        for (int64_t i = 0; i < length; i++) {
            out[i] += c * (double)from[i];
        }
    }
}

static void
write_block(const double *from, int64_t length, float *restrict to)
{
    for (int64_t i = 0; i < length; i++) {
        to[i] = (float)from[i];
    }
}

/* Puts the element of rank `k` at index k, smaller ones before it, larger ones after it. */
static void
select_rank(float *values, int64_t count, int64_t k)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        float pivot = values[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            for (; values[i] < pivot; i++) {
            }
            for (; values[j] > pivot; j--) {
            }
            if (i <= j) {
                float swap = values[i];
                values[i++] = values[j];
                values[j--] = swap;
            }
        }
        if (k <= j) {
            high = j;
        } else if (k >= i) {
            low = i;
        } else {
            return;
        }
    }
}

/* Quantile `q` of |m| over an image, linear between neighbours, as torch.quantile.  NaN in m gives
 * NaN. */
static double
image_quantile(const ac_sched_row *row, const float *x, const float *e, int64_t count, float *work)
{
    for (int64_t i = 0; i < count; i++) {
        work[i] = (float)fabs(row->m_x * (double)x[i] + row->m_e * (double)e[i]);
        if (isnan(work[i])) {
            return NAN;
        }
    }
    double rank = row->threshold * (double)(count - 1);
    int64_t below = (int64_t)rank;
    select_rank(work, count, below);
    double low = work[below];
    if (below + 1 >= count) {
        return low;
    }
    float high = work[below + 1];
    for (int64_t i = below + 2; i < count; i++) {
        high = work[i] < high ? work[i] : high;
    }
    return low + (rank - (double)below) * ((double)high - low);
}

/* Clamp limit and divisor of an image's m; infinity: no clamp. */
static void
limits_of(const ac_sched_row *row, const float *x, const float *e, int64_t count, float *work,
          double *limit, double *divisor)
{
    *limit = row->clip > 0.0 ? row->clip : INFINITY;
    *divisor = 1.0;
    if (row->threshold > 0.0) {
        double s = image_quantile(row, x, e, count, work);
        s = s < 1.0 ? 1.0 : s; /* NaN stays */
        *limit = *divisor = s > row->threshold_max ? row->threshold_max : s;
    }
}

static void
apply_image(const ac_sched_row *row, int64_t count, float *x, const float *e, const float *noise,
            float *const registers[AC_SCHED_REGISTERS], float *work)
{
    double m[BLOCK], next[BLOCK], stored[AC_SCHED_STORES][BLOCK], limit, divisor;
    sched_tensors tensors = {{[AC_BASIS_X] = x, [AC_BASIS_E] = e, [AC_BASIS_NOISE] = noise}};
    for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        tensors.basis[AC_BASIS_R0 + i] = registers[i];
    }
    limits_of(row, x, e, count, work, &limit, &divisor);
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t length = AC_MIN(count - at, BLOCK);
        convert_block(row, x + at, e + at, length, m);
        if (limit < INFINITY || divisor != 1.0) {
            clamp_block(limit, divisor, length, m);
        }
        /* everything is read before anything is written */
        combine_block(row->x_next, &tensors, m, at, length, next);
        for (int32_t s = 0; s < row->n_stores; s++) {
            combine_block(row->store[s].c, &tensors, m, at, length, stored[s]);
        }
        write_block(next, length, x + at);
        for (int32_t s = 0; s < row->n_stores; s++) {
            write_block(stored[s], length, registers[row->store[s].to] + at);
        }
    }
}

void
ac_sched_apply(const ac_sched_row *row, int64_t n, int64_t count, float *x, const float *e,
               const float *noise, float *const *registers, float *work)
{
    assert(row->threshold == 0.0 || work);
    for (int64_t image = 0; image < n; image++) {
        int64_t offset = image * count;
        float *local[AC_SCHED_REGISTERS];
        for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
            local[i] = registers && registers[i] ? registers[i] + offset : NULL;
        }
        apply_image(row, count, x + offset, e + offset, noise ? noise + offset : NULL, local,
                    work);
    }
}
