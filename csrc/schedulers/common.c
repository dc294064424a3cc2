/* schedulers/common: the config, and the noise levels made of it.  See common.h. */
#include "common.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define HALF_PI 1.5707963267948966192313216916398

/* ---- config ---------------------------------------------------------------------------------- */

ac_status
ac_sched_error(const ac_sched_build *build, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    ac_verror(AC_E_UNSUPPORTED, format, args);
    va_end(args);
    return ac_error_prefix(AC_E_UNSUPPORTED, "%s", build->cls->name);
}

/* NULL when the field is absent or null. */
static const ac_json *
get(const ac_sched_build *build, const char *field)
{
    const ac_json *value = ac_json_get(build->config, field);
    return value && value->kind != AC_JSON_NULL ? value : NULL;
}

static const char *
kind_name(const ac_json *value)
{
    static const char *const name[] = {"null", "a boolean", "a number", "a string", "an array",
                                       "an object"};
    return name[value->kind];
}

static ac_status
wrong_kind(const ac_sched_build *build, const char *field, const ac_json *found,
           const char *expected)
{
    return ac_sched_error(build, "%s: found %s, expected %s", field, kind_name(found), expected);
}

/* These set *out first, also where they fail: compilers do not know that an error is negative, and
 * would find the caller's variable without a value. */

ac_status
ac_sched_get_bool(const ac_sched_build *build, const char *field, bool fallback, bool *out)
{
    const ac_json *value = get(build, field);
    *out = fallback;
    if (value && value->kind != AC_JSON_BOOL) {
        return wrong_kind(build, field, value, "true or false");
    }
    if (value) {
        *out = value->boolean;
    }
    return AC_OK;
}

ac_status
ac_sched_get_int(const ac_sched_build *build, const char *field, int64_t fallback, int64_t low,
                 int64_t high, int64_t *out)
{
    const ac_json *value = get(build, field);
    *out = fallback;
    if (value && (value->kind != AC_JSON_NUMBER || !value->is_integer)) {
        return wrong_kind(build, field, value, "an integer");
    }
    if (value) {
        *out = value->integer;
    }
    if (*out < low || *out > high) {
        return ac_sched_error(build, "%s: found %lld, expected %lld to %lld", field,
                              (long long)*out, (long long)low, (long long)high);
    }
    return AC_OK;
}

ac_status
ac_sched_get_limit(const ac_sched_build *build, const char *field, double fallback, double *out)
{
    const ac_json *value = get(build, field);
    *out = fallback;
    if (value && value->kind != AC_JSON_NUMBER) {
        return wrong_kind(build, field, value, "a number");
    }
    if (value) {
        *out = value->number;
    }
    return AC_OK;
}

ac_status
ac_sched_get_number(const ac_sched_build *build, const char *field, double fallback, double *out)
{
    AC_TRY(ac_sched_get_limit(build, field, fallback, out));
    if (!isfinite(*out)) {
        return ac_sched_error(build, "%s: found %g, expected a finite number", field, *out);
    }
    return AC_OK;
}

ac_status
ac_sched_get_choice(const ac_sched_build *build, const char *field, const char *const *choices,
                    int32_t fallback, int32_t *out)
{
    const ac_json *value = get(build, field);
    *out = fallback;
    if (!value) {
        return AC_OK;
    }
    if (value->kind != AC_JSON_STRING) {
        return wrong_kind(build, field, value, "a string");
    }
    for (int32_t i = 0; choices[i]; i++) {
        if (strcmp(value->string, choices[i]) == 0) {
            *out = i;
            return AC_OK;
        }
    }
    char list[256] = "";
    size_t used = 0;
    for (int32_t i = 0; choices[i] && used < sizeof list; i++) {
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "",
                                 choices[i]);
    }
    return ac_sched_error(build, "%s: found \"%.64s\", expected one of %s", field, value->string,
                          list);
}

ac_status
ac_sched_get_threshold(const ac_sched_build *build, bool *on, double *ratio, double *max_value)
{
    AC_TRY(ac_sched_get_bool(build, "thresholding", false, on));
    AC_TRY(ac_sched_get_number(build, "dynamic_thresholding_ratio", 0.995, ratio));
    AC_TRY(ac_sched_get_limit(build, "sample_max_value", 1.0, max_value));
    if (*on && !(*ratio >= 0.0 && *ratio <= 1.0)) {
        return ac_sched_error(build, "dynamic_thresholding_ratio: found %g, expected 0 to 1",
                              *ratio);
    }
    if (*on && !(*max_value > 0.0)) {
        return ac_sched_error(build, "sample_max_value: found %g, expected above 0", *max_value);
    }
    *ratio = fmax(*ratio, DBL_MIN); /* a row's 0 means no thresholding */
    return AC_OK;
}

static ac_status
get_prediction(ac_sched_build *build)
{
    static const char *const name[] = {"epsilon", "sample", "v_prediction", "flow_prediction",
                                       "original_sample", NULL};
    int32_t found;
    AC_TRY(ac_sched_get_choice(build, "prediction_type", name, AC_PREDICT_EPSILON, &found));
    if (!(build->cls->predictions & (1u << found))) {
        return ac_sched_error(build,
                              "prediction_type: found \"%s\", which this class does not know "
                              "(nor does diffusers')",
                              name[found]);
    }
    build->prediction = (ac_prediction)found;
    return AC_OK;
}

/* ---- betas and what follows from them -------------------------------------------------------- */

ac_status
ac_sched_doubles(const ac_sched_build *build, int64_t count, double **out)
{
    size_t bytes = (size_t)count * sizeof **out;
    *out = ac_arena_alloc(&build->out->arena, bytes);
    return *out ? AC_OK : ac_no_memory(bytes);
}

/* torch.linspace in f32: from the start in the first half, from the end in the second, one
 * rounding an element. */
static float
linspace_f32(double start, double stop, int32_t count, int32_t index)
{
    float a = (float)start, b = (float)stop;
    if (count == 1) {
        return a;
    }
    float step = (b - a) / (float)(count - 1);
    return index < count / 2 ? fmaf(step, (float)index, a)
                             : fmaf(-step, (float)(count - 1 - index), b);
}

/* Share of the signal left at time t in [0, 1] (Nichol and Dhariwal 2021). */
static double
cosine_level(double t)
{
    double c = cos((t + 0.008) / 1.008 * HALF_PI);
    return c * c;
}

static float
cosine_beta(int32_t count, int32_t index)
{
    double now = (double)index / count, next = (double)(index + 1) / count;
    return (float)fmin(1.0 - cosine_level(next) / cosine_level(now), 0.999);
}

static ac_status
trained_betas(ac_sched_build *build, const ac_json *list)
{
    if (list->kind != AC_JSON_ARRAY || list->length == 0 || list->length > AC_SCHED_MAX_ROWS) {
        return wrong_kind(build, "trained_betas", list, "a list of numbers");
    }
    build->n_alphas = (int32_t)list->length;
    AC_TRY(ac_sched_doubles(build, build->n_alphas, &build->alphas));
    for (int32_t i = 0; i < build->n_alphas; i++) {
        if (list->item[i].kind != AC_JSON_NUMBER) {
            return wrong_kind(build, "trained_betas", &list->item[i], "a list of numbers");
        }
        if (!isfinite(list->item[i].number)) {
            return ac_sched_error(build, "trained_betas: found %g at %d, expected finite numbers",
                                  list->item[i].number, i);
        }
        build->alphas[i] = (float)list->item[i].number;
    }
    return AC_OK;
}

/* Leaves betas in build->alphas. */
static ac_status
make_betas(ac_sched_build *build)
{
    enum { LINEAR, SCALED_LINEAR, COSINE };
    static const char *const name[] = {"linear", "scaled_linear", "squaredcos_cap_v2", NULL};
    double start, end;
    int32_t schedule;
    AC_TRY(ac_sched_get_number(build, "beta_start", 0.0001, &start));
    AC_TRY(ac_sched_get_number(build, "beta_end", 0.02, &end));
    const ac_json *list = get(build, "trained_betas");
    if (list) {
        return trained_betas(build, list);
    }
    AC_TRY(ac_sched_get_choice(build, "beta_schedule", name, LINEAR, &schedule));
    int32_t n = build->n_alphas = build->n_train;
    AC_TRY(ac_sched_doubles(build, n, &build->alphas));
    for (int32_t i = 0; i < n; i++) {
        float root = linspace_f32(sqrt(start), sqrt(end), n, i);
        build->alphas[i] = schedule == LINEAR          ? linspace_f32(start, end, n, i)
                           : schedule == SCALED_LINEAR ? root * root
                                                       : cosine_beta(n, i);
    }
    return AC_OK;
}

/* Betas to the running product of 1 - beta, in place: summed in double, kept in f32. */
static void
accumulate(double *levels, int32_t count)
{
    double product = 1.0;
    for (int32_t i = 0; i < count; i++) {
        product *= 1.0f - (float)levels[i];
        levels[i] = (float)product;
    }
}

/* Lin et al. 2023, algorithm 1: shift and scale sqrt(alphas_cumprod) so that it ends at 0, back to
 * betas, and the product again.  In f32, step by step: the small differences near the end carry
 * the roundings of all that came before. */
static void
rescale_zero_snr(double *levels, int32_t count)
{
    float first = sqrtf((float)levels[0]), last = sqrtf((float)levels[count - 1]);
    float scale = first / (first - last);
    float before = 1.0f;
    for (int32_t i = 0; i < count; i++) {
        float root = (sqrtf((float)levels[i]) - last) * scale;
        float level = root * root;
        levels[i] = 1.0f - level / before;
        before = level;
    }
    accumulate(levels, count);
}

static ac_status
check_betas(const ac_sched_build *build)
{
    for (int32_t i = 0; i < build->n_alphas; i++) {
        if (!(build->alphas[i] >= 0.0 && build->alphas[i] <= 1.0)) {
            return ac_sched_error(build,
                                  "beta %d: found %g, expected 0 to 1; see beta_start, beta_end "
                                  "and trained_betas",
                                  i, build->alphas[i]);
        }
    }
    return AC_OK;
}

static ac_status
make_levels(ac_sched_build *build)
{
    AC_TRY(make_betas(build));
    AC_TRY(check_betas(build));
    accumulate(build->alphas, build->n_alphas);
    bool zero_snr = false;
    if (build->cls->has_zero_snr) {
        AC_TRY(ac_sched_get_bool(build, "rescale_betas_zero_snr", false, &zero_snr));
    }
    if (zero_snr) {
        if (build->alphas[0] <= build->alphas[build->n_alphas - 1]) {
            return ac_sched_error(build, "rescale_betas_zero_snr: found betas that add no noise, "
                                         "where diffusers divides by zero");
        }
        rescale_zero_snr(build->alphas, build->n_alphas);
        if (build->cls->lifts_zero_snr) {
            build->alphas[build->n_alphas - 1] = 0x1p-24;
        }
    }
    AC_TRY(ac_sched_doubles(build, build->n_alphas, &build->sigmas));
    AC_TRY(ac_sched_doubles(build, build->n_alphas, &build->log_sigmas));
    for (int32_t i = 0; i < build->n_alphas; i++) {
        build->sigmas[i] = sqrt((1.0 - build->alphas[i]) / build->alphas[i]);
        build->log_sigmas[i] = (float)log(ac_sched_sigma_f32(build, i));
    }
    return AC_OK;
}

ac_status
ac_sched_levels(ac_sched_build *build)
{
    static const char *const spacing[] = {"linspace", "leading", "trailing", NULL};
    int64_t n_train, offset;
    int32_t index;
    AC_TRY(ac_sched_get_int(build, "num_train_timesteps", 1000, 1, AC_SCHED_MAX_ROWS, &n_train));
    AC_TRY(ac_sched_get_int(build, "steps_offset", 0, -AC_SCHED_MAX_ROWS, AC_SCHED_MAX_ROWS,
                            &offset));
    AC_TRY(ac_sched_get_choice(build, "timestep_spacing", spacing, (int32_t)build->cls->spacing,
                               &index));
    AC_TRY(get_prediction(build));
    build->n_train = (int32_t)n_train;
    build->steps_offset = (int32_t)offset;
    build->spacing = (ac_spacing)index;
    AC_TRY(make_levels(build));
    build->out->alphas_cumprod = build->alphas;
    build->out->n_train = build->n_alphas;
    return AC_OK;
}

ac_status
ac_sched_alpha(const ac_sched_build *build, int64_t t, double *out)
{
    int64_t index = t < 0 ? t + build->n_alphas : t;
    if (index < 0 || index >= build->n_alphas) {
        return ac_sched_error(build,
                              "timestep %lld: expected below the %d training steps (diffusers "
                              "raises IndexError); see steps_offset and timestep_spacing",
                              (long long)t, build->n_alphas);
    }
    *out = build->alphas[index];
    return AC_OK;
}
