/* test_scheduler: tables from configs, and the kernel that applies a row.  What the numbers must
 * be is tested against diffusers in tests/parity/test_schedulers.py. */
#include "test.h"

#include "../../csrc/scheduler.h"
#include "../../csrc/schedulers/common.h"

#define COMMON "\"beta_schedule\": \"scaled_linear\", \"beta_start\": 0.00085, \"beta_end\": 0.012"

/* Linear ones: no clamp. */
static const char *const linear[] = {
    "{\"_class_name\": \"DDIMScheduler\", \"clip_sample\": false, " COMMON "}",
    "{\"_class_name\": \"DDIMScheduler\", \"clip_sample\": false, \"prediction_type\": \"sample\"}",
    "{\"_class_name\": \"PNDMScheduler\", \"skip_prk_steps\": true, " COMMON "}",
    "{\"_class_name\": \"PNDMScheduler\", \"prediction_type\": \"v_prediction\", " COMMON "}",
    "{\"_class_name\": \"EulerDiscreteScheduler\", \"use_karras_sigmas\": true, " COMMON "}",
    "{\"_class_name\": \"EulerAncestralDiscreteScheduler\", " COMMON "}",
    "{\"_class_name\": \"DPMSolverMultistepScheduler\", \"solver_order\": 3, " COMMON "}",
    "{\"_class_name\": \"DPMSolverMultistepScheduler\", \"algorithm_type\": \"sde-dpmsolver++\", "
    "\"lambda_min_clipped\": -Infinity}",
};

static ac_status
make(const char *text, ac_sched_options options, ac_schedule **out)
{
    const ac_json *config;
    ac_arena arena;
    ac_arena_init(&arena);
    ac_status status = ac_json_parse(&arena, text, strlen(text), "config", &config);
    if (status >= 0) {
        status = ac_schedule_new(config, &options, out);
    }
    ac_arena_deinit(&arena);
    return status;
}

static ac_schedule *
must_make(const char *text, int32_t steps)
{
    ac_schedule *schedule = NULL;
    ac_sched_options options = {.num_inference_steps = steps, .eta = 0.5};
    CHECK_OK(make(text, options, &schedule));
    return schedule;
}

/* ---- a run with given inputs ---------------------------------------------------------------- */

enum { IMAGES = 2, COUNT = 300, TOTAL = IMAGES * COUNT };

typedef struct run {
    float x[TOTAL], e[TOTAL], noise[TOTAL], registers[AC_SCHED_REGISTERS][TOTAL];
} run;

static void
fill(float *values, int64_t count, uint64_t *random)
{
    for (int64_t i = 0; i < count; i++) {
        values[i] = (float)test_uniform(random, -2.0, 2.0);
    }
}

static void
step(const ac_sched_row *row, run *r, float *work)
{
    float *registers[AC_SCHED_REGISTERS];
    for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        registers[i] = r->registers[i];
    }
    ac_sched_apply(row, IMAGES, COUNT, r->x, r->e, r->noise, registers, work);
}

/* A step of a sum is the sum of the steps, row by row, registers and all. */
static void
steps_superpose(void)
{
    static run a, b, both;
    uint64_t random = 7;
    for (size_t k = 0; k < AC_ARRAY_LEN(linear); k++) {
        ac_schedule *schedule = must_make(linear[k], 12);
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        memset(&both, 0, sizeof both);
        fill(a.x, TOTAL, &random);
        fill(b.x, TOTAL, &random);
        for (int32_t i = 0; i < TOTAL; i++) {
            both.x[i] = a.x[i] - 3.0f * b.x[i];
        }
        double scale = 8.0;
        for (int32_t row = 0; row < schedule->n_rows; row++) {
            fill(a.e, TOTAL, &random);
            fill(b.e, TOTAL, &random);
            fill(a.noise, TOTAL, &random);
            fill(b.noise, TOTAL, &random);
            for (int32_t i = 0; i < TOTAL; i++) {
                both.e[i] = a.e[i] - 3.0f * b.e[i];
                both.noise[i] = a.noise[i] - 3.0f * b.noise[i];
            }
            step(&schedule->rows[row], &a, NULL);
            step(&schedule->rows[row], &b, NULL);
            step(&schedule->rows[row], &both, NULL);
            for (int32_t i = 0; i < TOTAL; i++) {
                scale = fmax(scale, fabs((double)both.x[i]));
                CHECK_CLOSE(both.x[i], a.x[i] - 3.0 * b.x[i], 1e-5 * scale);
            }
        }
        ac_schedule_free(schedule);
    }
}

/* ---- the kernel ----------------------------------------------------------------------------- */

/* Rows of random coefficients, at lengths around the block size, against a plain loop. */
static void
kernel_matches_a_plain_loop(void)
{
    static const int64_t lengths[] = {1, 2, 255, 256, 257, 511, 513, 1000};
    static float tensor[4 + AC_SCHED_REGISTERS][3 * 1000];
    static double expected[4][3 * 1000];
    uint64_t random = 99;
    for (size_t l = 0; l < AC_ARRAY_LEN(lengths); l++) {
        int64_t count = lengths[l], total = 3 * count;
        ac_sched_row row = {.m_x = 0.3, .m_e = -1.7, .clip = l % 2 ? 0.9 : 0.0, .n_stores = 3};
        for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
            row.x_next[k] = test_uniform(&random, -1.0, 1.0);
            for (int32_t s = 0; s < 3; s++) {
                row.store[s].to = (s * 2 + (int32_t)l) % AC_SCHED_REGISTERS;
                row.store[s].c[k] = test_uniform(&random, -1.0, 1.0);
            }
        }
        for (size_t t = 0; t < AC_ARRAY_LEN(tensor); t++) {
            fill(tensor[t], total, &random);
        }
        float *registers[AC_SCHED_REGISTERS];
        for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
            registers[i] = tensor[4 + i];
        }
        for (int64_t i = 0; i < total; i++) {
            double m = 0.3 * tensor[0][i] - 1.7 * tensor[1][i];
            m = row.clip > 0.0 ? fmax(fmin(m, row.clip), -row.clip) : m;
            double basis[AC_BASIS_COUNT] = {tensor[0][i], tensor[1][i], m, tensor[2][i]};
            for (int32_t r = 0; r < AC_SCHED_REGISTERS; r++) {
                basis[AC_BASIS_R0 + r] = registers[r][i];
            }
            for (int32_t out = 0; out < 4; out++) {
                expected[out][i] = 0.0;
                for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
                    double c = out == 0 ? row.x_next[k] : row.store[out - 1].c[k];
                    expected[out][i] += c * basis[k];
                }
            }
        }
        ac_sched_apply(&row, 3, count, tensor[0], tensor[1], tensor[2], registers, NULL);
        for (int64_t i = 0; i < total; i++) {
            CHECK_CLOSE(tensor[0][i], expected[0][i], 1e-6);
            for (int32_t s = 0; s < 3; s++) {
                CHECK_CLOSE(registers[row.store[s].to][i], expected[1 + s][i], 1e-6);
            }
        }
    }
}

/* All results come from the old tensors: x and a register trade places. */
static void
everything_is_read_first(void)
{
    static run r, before;
    uint64_t random = 5;
    fill(r.x, TOTAL, &random);
    fill(r.registers[0], TOTAL, &random);
    before = r;
    ac_sched_row row = {.n_stores = 1};
    row.x_next[AC_BASIS_R0] = 1.0;
    row.store[0].c[AC_BASIS_X] = 1.0;
    step(&row, &r, NULL);
    CHECK(memcmp(r.x, before.registers[0], sizeof r.x) == 0);
    CHECK(memcmp(r.registers[0], before.x, sizeof r.x) == 0);
}

static int
by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Dynamic thresholding against a sort; images have their own limits. */
static void
threshold_matches_a_sort(void)
{
    static float x[2 * 777], e[2 * 777], start[2 * 777], sorted[777], work[777];
    static const double quantiles[] = {1e-300, 0.1, 0.5, 0.995, 1.0};
    static const int64_t counts[] = {1, 2, 3, 100, 777};
    uint64_t random = 3;
    for (size_t q = 0; q < AC_ARRAY_LEN(quantiles) * AC_ARRAY_LEN(counts); q++) {
        int64_t count = counts[q / AC_ARRAY_LEN(quantiles)];
        ac_sched_row row = {.m_x = 1.0, .threshold = quantiles[q % AC_ARRAY_LEN(quantiles)],
                            .threshold_max = 2.5};
        row.x_next[AC_BASIS_M] = 1.0;
        for (int64_t i = 0; i < 2 * count; i++) { /* many equal values, and a wider second image */
            double value = test_uniform(&random, -3.0, 3.0) * (i < count ? 0.5 : 1.5);
            x[i] = start[i] = (float)(i % 3 ? value : rint(value));
        }
        ac_sched_apply(&row, 2, count, x, e, NULL, NULL, work);
        for (int64_t image = 0; image < 2; image++) {
            for (int64_t i = 0; i < count; i++) {
                sorted[i] = fabsf(start[image * count + i]);
            }
            qsort(sorted, (size_t)count, sizeof *sorted, by_value);
            double rank = row.threshold * (double)(count - 1);
            int64_t below = (int64_t)rank, above = AC_MIN(below + 1, count - 1);
            double s = sorted[below] + (rank - (double)below) * ((double)sorted[above] -
                                                                 (double)sorted[below]);
            s = fmin(fmax(s, 1.0), 2.5);
            for (int64_t i = image * count; i < (image + 1) * count; i++) {
                CHECK_CLOSE(x[i], fmax(fmin((double)start[i], s), -s) / s, 1e-6);
            }
        }
    }
}

/* As torch.quantile: one NaN makes the limit NaN, wherever it is, and with it the whole image. */
static void
nan_stays_in_its_image(void)
{
    enum { N = 33 };
    float x[2 * N], e[2 * N] = {0}, work[N];
    ac_sched_row row = {.m_x = 1.0, .threshold = 0.1, .threshold_max = 9.0};
    row.x_next[AC_BASIS_M] = 1.0;
    for (int32_t at = 0; at < N; at++) {
        for (int32_t i = 0; i < 2 * N; i++) {
            x[i] = (float)(i * 7 % 11) - 5.0f;
        }
        x[at] = NAN;
        ac_sched_apply(&row, 2, N, x, e, NULL, NULL, work);
        for (int32_t i = 0; i < 2 * N; i++) {
            CHECK(isnan(x[i]) == (i < N));
        }
    }
}

/* ---- tables --------------------------------------------------------------------------------- */

static void
names_make_schedules(void)
{
    char text[128];
    int32_t count = 0;
    for (const char *const *name = ac_scheduler_names(); *name; name++, count++) {
        snprintf(text, sizeof text, "{\"_class_name\": \"%s\"}", *name);
        ac_schedule *schedule = must_make(text, 10);
        CHECK(schedule->n_rows >= 10);
        CHECK_INT(schedule->n_train, 1000);
        for (int32_t i = 1; i < schedule->n_train; i++) {
            CHECK(schedule->alphas_cumprod[i] < schedule->alphas_cumprod[i - 1]);
        }
        ac_schedule_free(schedule);
    }
    CHECK_INT(count, 5);
}

static void
begin_drops_rows(void)
{
    ac_schedule *whole = must_make(linear[0], 10), *tail = NULL;
    ac_sched_options options = {.num_inference_steps = 10, .eta = 0.5, .begin = 7};
    CHECK_OK(make(linear[0], options, &tail));
    CHECK_INT(tail->n_rows, 3);
    CHECK(memcmp(tail->rows, whole->rows + 7, 3 * sizeof *tail->rows) == 0);
    ac_schedule_free(tail);
    ac_schedule_free(whole);
    options.begin = 10;
    CHECK_STATUS(make(linear[0], options, &tail), AC_E_INVALID, "begin");
}

static void
refusals_name_the_field(void)
{
    static const struct {
        const char *text, *part;
        ac_status status;
    } rows[] = {
        {"{}", "_class_name", AC_E_UNSUPPORTED},
        {"3", "_class_name", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"HeunDiscreteScheduler\"}", "HeunDiscreteScheduler",
         AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"clip\": 1}", "\"clip\"", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"clip_sample\": 1}", "clip_sample",
         AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"num_train_timesteps\": 10.5}",
         "num_train_timesteps", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"num_train_timesteps\": 5}", "num_inference_steps",
         AC_E_INVALID},
        {"{\"_class_name\": \"DDIMScheduler\", \"beta_schedule\": 3}", "beta_schedule",
         AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"beta_start\": -Infinity}",
         "beta_start: found -inf, expected a finite number", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"EulerDiscreteScheduler\", \"use_karras_sigmas\": true, "
         "\"sigma_max\": Infinity}",
         "sigma_max: found inf", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"trained_betas\": [0.1, Infinity]}",
         "trained_betas: found inf at 1", AC_E_UNSUPPORTED},
        {"{\"_class_name\": \"DDIMScheduler\", \"beta_end\": NaN}",
         "found NaN, expected a number (in \"beta_end\")", AC_E_FORMAT},
    };
    ac_sched_options options = {.num_inference_steps = 10};
    ac_schedule *schedule = NULL;
    for (size_t i = 0; i < AC_ARRAY_LEN(rows); i++) {
        CHECK_STATUS(make(rows[i].text, options, &schedule), rows[i].status, rows[i].part);
    }
    options.num_inference_steps = 0;
    CHECK_STATUS(make(linear[0], options, &schedule), AC_E_INVALID, "num_inference_steps");
    options = (ac_sched_options){.num_inference_steps = 3, .eta = -0.1};
    CHECK_STATUS(make(linear[0], options, &schedule), AC_E_INVALID, "eta");
}

static ac_status
make_and_free(void *text)
{
    ac_schedule *schedule = NULL;
    ac_status status = make(text, (ac_sched_options){.num_inference_steps = 9}, &schedule);
    ac_schedule_free(schedule);
    return status;
}

static void
out_of_memory_is_said(void)
{
    for (size_t k = 0; k < AC_ARRAY_LEN(linear); k++) {
        test_oom(make_and_free, (void *)linear[k]);
    }
}

/* Against 40 digits. */
static void
beta_quantiles(void)
{
    static const struct {
        double p, a, b, x;
    } rows[] = {
        {1e-09, 0.6, 0.6, 1.8558824624914107e-15}, {0.001, 0.6, 0.6, 1.8558738517451997e-5},
        {0.02, 0.6, 0.6, 0.0027329820245770287}, {0.1, 0.6, 0.6, 0.039584405588780852},
        {0.37, 0.6, 0.6, 0.32279400209736164}, {0.5, 0.6, 0.6, 0.5},
        {0.63, 0.6, 0.6, 0.67720599790263836}, {0.9, 0.6, 0.6, 0.96041559441121917},
        {0.999, 0.6, 0.6, 0.99998144126148255}, {1e-09, 0.6, 1.7, 5.4644869039062862e-16},
        {0.001, 0.6, 1.7, 5.4644999679890887e-6}, {0.02, 0.6, 1.7, 0.00080553756592919338},
        {0.1, 0.6, 1.7, 0.011834154377310835}, {0.37, 0.6, 1.7, 0.10944853735381297},
        {0.5, 0.6, 1.7, 0.18752573459789916}, {0.63, 0.6, 1.7, 0.28984082450570332},
        {0.9, 0.6, 1.7, 0.63870967426799745}, {0.999, 0.6, 1.7, 0.97446928806925504},
        {1e-09, 2.5, 0.8, 0.00029077840624048224}, {0.001, 2.5, 0.8, 0.072729460341589427},
        {0.02, 2.5, 0.8, 0.23846127759845909}, {0.1, 2.5, 0.8, 0.44651676545060921},
        {0.37, 2.5, 0.8, 0.7297483486974147}, {0.5, 2.5, 0.8, 0.81203086118131098},
        {0.63, 2.5, 0.8, 0.87828857323158266}, {0.9, 2.5, 0.8, 0.97822275664185825},
        {0.999, 2.5, 0.8, 0.99993237360673243}, {1e-09, 9, 4, 0.055872177586221996},
        {0.001, 9, 4, 0.28080207865487312}, {0.02, 9, 4, 0.41508210011473252},
        {0.1, 9, 4, 0.52473370097446133}, {0.37, 9, 4, 0.6584991701039023},
        {0.5, 9, 4, 0.70242439039281048}, {0.63, 9, 4, 0.7439591034714069},
        {0.9, 9, 4, 0.84581234682569244}, {0.999, 9, 4, 0.95976295576226502},
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(rows); i++) {
        double x = ac_beta_ppf(rows[i].p, rows[i].a, rows[i].b);
        CHECK_CLOSE(x, rows[i].x, 1e-13);
        CHECK_CLOSE(x / rows[i].x, 1.0, 1e-12);
    }
    CHECK(ac_beta_ppf(0.0, 0.6, 0.6) == 0.0);
    CHECK(ac_beta_ppf(1.0, 0.6, 0.6) == 1.0);
    double last = 0.0;
    for (int i = 1; i < 5000; i++) { /* rising, and symmetric for equal parameters */
        double x = ac_beta_ppf(i / 5000.0, 0.6, 0.6);
        CHECK(x > last);
        CHECK_CLOSE(x + ac_beta_ppf(1.0 - i / 5000.0, 0.6, 0.6), 1.0, 1e-13);
        last = x;
    }
}

TEST_MAIN(TEST(steps_superpose), TEST(kernel_matches_a_plain_loop), TEST(everything_is_read_first),
          TEST(threshold_matches_a_sort), TEST(nan_stays_in_its_image), TEST(names_make_schedules),
          TEST(begin_drops_rows), TEST(refusals_name_the_field), TEST(out_of_memory_is_said),
          TEST(beta_quantiles))
