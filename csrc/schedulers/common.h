/* schedulers/common: what the samplers' table makers share.
 *
 *     config (JSON) -> noise levels -> timesteps -> sigmas -> rows
 *
 * scheduler.c fills an ac_sched_build with what all classes have, calls the class's `fill`, and
 * checks the result.  A new sampler is one file with an ac_sched_class and one line in
 * scheduler.c's list.
 *
 * Numbers.  diffusers keeps betas and alphas_cumprod in f32; those are the noise levels a model is
 * told about, so they are made with the same roundings here.  Timesteps are what it is told in a
 * run, and keep diffusers' roundings too.  All else is double.
 */
#ifndef AC_SCHEDULERS_COMMON_H
#define AC_SCHEDULERS_COMMON_H

#include "../scheduler.h"

#define AC_SCHED_MAX_ROWS 100000 /* UNet calls, and training steps: bounds memory for any config */

typedef enum ac_prediction {
    AC_PREDICT_EPSILON,
    AC_PREDICT_SAMPLE,
    AC_PREDICT_V,
    AC_PREDICT_FLOW,
    AC_PREDICT_ORIGINAL /* "original_sample", Euler's other name for sample */
} ac_prediction;

#define AC_TAKES(name) (1u << AC_PREDICT_##name)

typedef enum ac_spacing { AC_SPACING_LINSPACE, AC_SPACING_LEADING, AC_SPACING_TRAILING } ac_spacing;

typedef struct ac_sched_class ac_sched_class;

typedef struct ac_sched_build {
    const ac_sched_class *cls;
    const ac_json *config;
    ac_sched_options options;
    ac_schedule *out;
    int32_t n_train;      /* num_train_timesteps */
    int32_t n_alphas;     /* length of the next three; not n_train only with trained_betas */
    double *alphas;       /* [n_alphas] alphas_cumprod, f32 values */
    double *sigmas;       /* [n_alphas] sqrt((1 - a) / a); rising, but for the last one after
                             rescale_betas_zero_snr */
    double *log_sigmas;   /* [n_alphas] as diffusers has them, in f32: they decide timesteps */
    ac_spacing spacing;
    int32_t steps_offset;
    ac_prediction prediction;
    int32_t n_timesteps;  /* len(scheduler.timesteps), set by fill before any row */
} ac_sched_build;

struct ac_sched_class {
    const char *name;            /* "_class_name" */
    ac_spacing spacing;          /* the class's default */
    bool has_zero_snr;           /* knows rescale_betas_zero_snr */
    bool lifts_zero_snr;         /* then the last alpha is 2^-24, so that sigma is finite */
    uint32_t predictions;        /* AC_TAKES(...) of the prediction_type values it knows */
    ac_status (*fill)(ac_sched_build *build);
};

extern const ac_sched_class ac_sched_ddim, ac_sched_pndm, ac_sched_euler, ac_sched_euler_ancestral,
    ac_sched_dpm_multistep;

/* ---- config: an absent or null field takes `fallback` ---------------------------------------- */

ac_status ac_sched_error(const ac_sched_build *build, const char *format, ...) AC_PRINTF(2, 3);
ac_status ac_sched_get_bool(const ac_sched_build *build, const char *field, bool fallback,
                            bool *out);
ac_status ac_sched_get_int(const ac_sched_build *build, const char *field, int64_t fallback,
                           int64_t low, int64_t high, int64_t *out);
ac_status ac_sched_get_number(const ac_sched_build *build, const char *field, double fallback,
                              double *out);
/* The same, and an infinity is taken: no limit. */
ac_status ac_sched_get_limit(const ac_sched_build *build, const char *field, double fallback,
                             double *out);
/* Index in `choices` (NULL at the end). */
ac_status ac_sched_get_choice(const ac_sched_build *build, const char *field,
                              const char *const *choices, int32_t fallback, int32_t *out);
/* thresholding, dynamic_thresholding_ratio and sample_max_value. */
ac_status ac_sched_get_threshold(const ac_sched_build *build, bool *on, double *ratio,
                                 double *max_value);
/* Every field is one that some diffusers scheduler defines. */
ac_status ac_sched_check_fields(const ac_sched_build *build);

/* ---- noise levels ---------------------------------------------------------------------------- */

/* Fills n_train, alphas, sigmas, spacing, steps_offset, prediction from the config. */
ac_status ac_sched_levels(ac_sched_build *build);
/* alphas_cumprod[t] with Python's meaning of a negative index; an error where diffusers has an
 * IndexError. */
ac_status ac_sched_alpha(const ac_sched_build *build, int64_t t, double *out);

/* ---- timesteps and sigmas -------------------------------------------------------------------- */

typedef struct ac_sched_grid {
    int32_t last;      /* training steps in use: n_train, or fewer (lambda_min_clipped) */
    int32_t extra;     /* 1: one more point is made and the lowest dropped (DPM-Solver) */
    bool fractional;   /* linspace is not rounded (Euler); the UNet is told the nearest f32 */
} ac_sched_grid;

/* Descending timesteps in the arena.  With trailing spacing there may be one more or fewer than
 * num_inference_steps, as NumPy's arange makes them. */
ac_status ac_sched_timesteps(const ac_sched_build *build, ac_sched_grid grid, double **out,
                             int32_t *count);
/* Room for timesteps, sigmas and the like, in the schedule's arena. */
ac_status ac_sched_doubles(const ac_sched_build *build, int64_t count, double **out);
/* Allocates out->rows for n_timesteps less options.begin; 0 everywhere. */
ac_status ac_sched_rows(ac_sched_build *build, int32_t n_timesteps);

/* Which of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas is on, at most one. */
typedef enum ac_sigma_kind {
    AC_SIGMA_PLAIN,
    AC_SIGMA_KARRAS,
    AC_SIGMA_EXPONENTIAL,
    AC_SIGMA_BETA,
    AC_SIGMA_LU /* use_lu_lambdas, DPM-Solver's own: exponential between f32 logarithms */
} ac_sigma_kind;

ac_status ac_sched_sigma_kind(const ac_sched_build *build, ac_sigma_kind *out);
/* `count` sigmas from `high` down to `low`. */
void ac_sched_sigmas(ac_sigma_kind kind, double high, double low, double *out, int32_t count);
/* final_sigmas_type: 0 or the smallest training sigma. */
ac_status ac_sched_final_sigma(const ac_sched_build *build, double *out, bool *is_zero);
/* np.linspace(start, stop, count)[index], bit for bit. */
double ac_sched_linspace(double start, double stop, int32_t count, int32_t index);
/* np.interp(t, arange(n_alphas), sigmas). */
double ac_sched_sigma_at(const ac_sched_build *build, double t);
/* sigmas[index] computed in f32. */
float ac_sched_sigma_f32(const ac_sched_build *build, int32_t index);
/* The timestep of a sigma: linear in log sigma between training steps, in f32 as in diffusers. */
double ac_sched_time_of(const ac_sched_build *build, double sigma);

/* ---- shared by the two Euler samplers (euler.c) ---------------------------------------------- */

/* scale_in, m and start of a row at `sigma`. */
void ac_sched_euler_convert(ac_prediction prediction, double sigma, ac_sched_row *row);
/* x_next of a step from `sigma` to `target`. */
void ac_sched_euler_step(ac_prediction prediction, double sigma, double target, ac_sched_row *row);
ac_status ac_sched_euler_check(const ac_sched_build *build, double sigma, int32_t row);
double ac_sched_euler_noise(const ac_sched_build *build, const double *sigmas, int32_t count);

/* ---- mathematics ----------------------------------------------------------------------------- */

/* Inverse of the regularised incomplete beta function: x with I_x(a, b) = p.  a, b > 0. */
double ac_beta_ppf(double p, double a, double b);

#endif
