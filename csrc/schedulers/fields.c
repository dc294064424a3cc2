/* schedulers/fields: the fields that some scheduler of diffusers (0.42.1) defines.
 *
 * Published scheduler_config.json files carry fields of other classes (SDXL's Euler file has
 * skip_prk_steps), left there when the class was switched with from_config.  Those are ignored, as
 * diffusers does; a field that no scheduler defines is a mistake, and raises.
 */
#include "common.h"

#include <string.h>

/* The arguments of every __init__ in diffusers/schedulers, sorted. */
static const char *const known[] = {
    "algorithm_type", "alpha_cum_end", "alpha_cum_start", "base_image_seq_len", "base_shift",
    "beta_end", "beta_schedule", "beta_start", "block_length", "clip_denoised", "clip_sample",
    "clip_sample_range", "correct_steps", "corrector_k", "corrector_order", "corrector_selection",
    "corrector_selection_tau", "corrector_steps", "disable_corrector",
    "dynamic_thresholding_ratio", "editing_threshold", "entropy_bound", "eps", "eta",
    "euler_at_final", "final_sigmas_type", "final_step_size_scale", "flow_shift", "gamma",
    "gamma_cum_end", "gamma_cum_start", "interpolation_type", "invert_sigmas",
    "lambda_min_clipped", "lower_order_final", "mask_token_id", "masking_schedule",
    "max_image_seq_len", "max_shift", "minimal_topk", "n_grid", "noise_mode",
    "noise_sampler_seed", "num_inference_steps", "num_policy_substeps", "num_train_timesteps",
    "num_vec_classes", "original_inference_steps", "predict_x0", "prediction_type",
    "predictor_order", "rescale_betas_zero_snr", "rho", "s", "s_noise", "sample_max_value",
    "sampling_eps", "scale_factors", "scaler", "schedule_mode", "scheduler_type",
    "set_alpha_to_one", "shift", "shift_terminal", "sigma_data", "sigma_max", "sigma_min",
    "sigma_schedule", "skip_prk_steps", "snr", "snr_shift_scale", "solver_order", "solver_p",
    "solver_type", "stage_range", "stages", "steps_offset", "stochastic_sampling", "t_lim_ode",
    "t_lim_ode_below", "t_max", "t_min", "tail_step_multiplier", "tail_steps", "tau_func",
    "threshold", "thresholding", "time_shift_type", "timestep_scaling", "timestep_spacing",
    "timestep_type", "trained_betas", "tsr_k", "tsr_sigma", "upscale_mode", "use_beta_sigmas",
    "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type"
};

static bool
is_known(const char *field)
{
    for (size_t i = 0; i < AC_ARRAY_LEN(known); i++) {
        if (strcmp(field, known[i]) == 0) {
            return true;
        }
    }
    return false;
}

ac_status
ac_sched_check_fields(const ac_sched_build *build)
{
    for (size_t i = 0; i < build->config->length; i++) {
        const char *field = build->config->key[i];
        if (field[0] != '_' && !is_known(field)) {
            return ac_sched_error(build,
                                  "found field \"%s\", expected only fields that a diffusers "
                                  "scheduler defines",
                                  field);
        }
    }
    return AC_OK;
}
