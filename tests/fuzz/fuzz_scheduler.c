/* fuzz_scheduler: two characters of options (steps, begin and eta), then scheduler_config.json.
 *
 * What is accepted has finite rows whose indices are in range, and its rows can be applied.
 */
#include "../../csrc/scheduler.h"
#include "fuzz.h"

#include <math.h>
#include <string.h>

#define BASE "\"num_train_timesteps\":1000,\"beta_start\":0.00085,\"beta_end\":0.012,"             \
             "\"beta_schedule\":\"scaled_linear\","

const char *const fuzz_seeds[] = {
    "a0{\"_class_name\":\"DDIMScheduler\"," BASE "\"clip_sample\":false,\"set_alpha_to_one\":false,"
    "\"steps_offset\":1,\"prediction_type\":\"v_prediction\",\"thresholding\":true,"
    "\"timestep_spacing\":\"trailing\",\"rescale_betas_zero_snr\":true}",
    "e!{\"_class_name\":\"PNDMScheduler\"," BASE "\"skip_prk_steps\":true,\"steps_offset\":1,"
    "\"set_alpha_to_one\":false,\"trained_betas\":null}",
    "i\"{\"_class_name\":\"PNDMScheduler\"," BASE "\"skip_prk_steps\":false,"
    "\"timestep_spacing\":\"linspace\"}",
    "o0{\"_class_name\":\"EulerDiscreteScheduler\"," BASE "\"use_karras_sigmas\":true,"
    "\"interpolation_type\":\"linear\",\"timestep_spacing\":\"linspace\",\"sigma_min\":null}",
    "u1{\"_class_name\":\"EulerAncestralDiscreteScheduler\"," BASE
    "\"prediction_type\":\"epsilon\"}",
    "x0{\"_class_name\":\"DPMSolverMultistepScheduler\"," BASE "\"algorithm_type\":\"dpmsolver++\","
    "\"solver_order\":3,\"solver_type\":\"midpoint\",\"lower_order_final\":true,"
    "\"use_karras_sigmas\":true,\"lambda_min_clipped\":-Infinity,\"variance_type\":null}",
    "z5{\"_class_name\":\"DPMSolverMultistepScheduler\"," BASE "\"algorithm_type\":"
    "\"sde-dpmsolver++\",\"euler_at_final\":true,\"final_sigmas_type\":\"zero\",\"use_lu_lambdas\":"
    "true,\"trained_betas\":[0.1,0.2,0.3,0.4,0.5]}",
    NULL,
};
const char *const fuzz_words[] = {
    "\"DDIMScheduler\"", "\"PNDMScheduler\"", "\"EulerDiscreteScheduler\"",
    "\"EulerAncestralDiscreteScheduler\"", "\"DPMSolverMultistepScheduler\"", "null", "true",
    "false", "Infinity", "-Infinity", "0", "-1", "1e300", "1e-300", "5e-324", "2147483648", "0.5",
    "1", "2", "3", "4", "[]", "[0]", "[0.5,0.5]", "[1,2,3]", "{}", "\"x\"", "\"linear\"",
    "\"scaled_linear\"", "\"squaredcos_cap_v2\"", "\"leading\"", "\"trailing\"", "\"linspace\"",
    "\"epsilon\"", "\"sample\"", "\"v_prediction\"", "\"flow_prediction\"", "\"dpmsolver\"",
    "\"dpmsolver++\"", "\"sde-dpmsolver\"", "\"sde-dpmsolver++\"", "\"heun\"", "\"bh1\"",
    "\"log_linear\"", "\"sigma_min\"", "\"zero\"", "\"learned_range\"", "\"fixed_small\"",
    "\"trained_betas\":", "\"use_exponential_sigmas\":true,", "\"use_beta_sigmas\":true,",
    "\"use_karras_sigmas\":true,", "\"use_lu_lambdas\":true,", "\"use_flow_sigmas\":true,",
    "\"sigma_min\":", "\"sigma_max\":", "\"rho\":", "\"thresholding\":true,",
    "\"dynamic_thresholding_ratio\":", "\"sample_max_value\":", "\"clip_sample_range\":",
    "\"flow_shift\":", "\"rescale_betas_zero_snr\":true,", "\"lambda_min_clipped\":",
    "\"solver_order\":", "\"steps_offset\":", "\"num_train_timesteps\":",
    "\"euler_at_final\":true,",
    NULL,
};

enum { IMAGES = 2, COUNT = 12, N = IMAGES * COUNT };

static void
check_rows(const ac_schedule *s)
{
    FUZZ_CHECK(s->n_rows > 0 && isfinite(s->init_noise_sigma));
    float x[N], e[N], noise[N], work[COUNT], store[AC_SCHED_REGISTERS][N];
    float *registers[AC_SCHED_REGISTERS];
    for (int r = 0; r < AC_SCHED_REGISTERS; r++) {
        registers[r] = store[r];
        memset(store[r], 0, sizeof store[r]);
    }
    for (int i = 0; i < N; i++) {
        x[i] = (float)i;
        e[i] = 1.0f / (float)(1 + i);
        noise[i] = i % 2 ? 1.0f : -1.0f;
    }
    for (int32_t i = 0; i < s->n_rows; i++) {
        const ac_sched_row *row = &s->rows[i];
        FUZZ_CHECK(isfinite(row->timestep) && isfinite(row->scale_in) && isfinite(row->m_e));
        FUZZ_CHECK(row->n_stores >= 0 && row->n_stores <= AC_SCHED_STORES);
        for (int32_t k = 0; k < row->n_stores; k++) {
            FUZZ_CHECK(row->store[k].to >= 0 && row->store[k].to < AC_SCHED_REGISTERS);
        }
        for (int k = 0; k < AC_BASIS_COUNT; k++) {
            FUZZ_CHECK(isfinite(row->x_next[k]));
        }
        if (i < 64) {
            ac_sched_apply(row, IMAGES, COUNT, x, e, noise, registers, work);
        }
    }
}

static int
digit(uint8_t c)
{
    return c >= '0' && c <= '9' ? c - '0' : 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) {
        return -1;
    }
    ac_arena arena;
    const ac_json *config = NULL;
    ac_schedule *schedule = NULL;
    ac_sched_options options = {.num_inference_steps = data[0] - 'a' + 1,
                                .eta = data[1] == '!' ? 1.0 : 0.25 * digit(data[1]),
                                .begin = data[1] == '"' ? 2 : digit(data[1]) / 4};
    ac_arena_init(&arena);
    ac_status status = ac_json_parse(&arena, (const char *)data + 2, size - 2, "fuzz", &config);
    if (status == AC_OK) {
        status = ac_schedule_new(config, &options, &schedule);
    }
    if (status == AC_OK) {
        check_rows(schedule);
        ac_schedule_free(schedule);
    } else {
        FUZZ_CHECK(ac_error_message()[0] && status != AC_E_INTERNAL);
    }
    ac_arena_deinit(&arena);
    return status == AC_OK ? 0 : -1;
}
