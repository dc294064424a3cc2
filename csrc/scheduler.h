/* scheduler: a sampler as a table of rows, made on the host in double before the loop.
 *
 * Each step is linear in the latent, the model's output, noise and a few remembered tensors, with
 * one clamp on the way (Karras et al. 2022 and the samplers of diffusers all have this form):
 *
 *     input  = scale_in * x                     what the UNet sees
 *     e      = guidance(unet(input, timestep))
 *     m      = clip(m_x * x + m_e * e)          the converted output (x0, or e as it is)
 *     basis  = [x, e, m, noise, r0 .. r5]
 *     x'     = sum x_next[k] basis[k]
 *     r[s]'  = sum store.c[k] basis[k]          for each store, all from the old basis
 *
 * schedulers/<name>.c fills the rows from scheduler_config.json; one kernel applies them.  What
 * does not fit raises by name.
 */
#ifndef AC_SCHEDULER_H
#define AC_SCHEDULER_H

#include "json.h"
#include "sampler.h"

typedef struct ac_schedule {
    int32_t n_rows;        /* UNet calls, len(scheduler.timesteps) less options.begin */
    ac_sched_row *rows;
    double init_noise_sigma;
    bool noise_f32;        /* noise is drawn in f32 whatever the latents' dtype (DPM-Solver) */
    double *alphas_cumprod; /* [n_train] */
    int32_t n_train;
    ac_arena arena;        /* owns all of it */
} ac_schedule;

typedef struct ac_sched_options {
    int32_t num_inference_steps; /* 1 .. num_train_timesteps (diffusers' own limits apply) */
    double eta;                  /* DDIM and friends; pipe(eta=); others ignore it, as diffusers */
    int32_t begin;               /* img2img: rows of scheduler.timesteps[begin:], multistep samplers
                                    start without history there; 0: all rows */
} ac_sched_options;

/* `config`: parsed scheduler_config.json with "_class_name".  An unknown class, an option or value
 * that is not supported, or a combination where diffusers gives NaN or raises (the list is in
 * scheduler.c) raises and names it.  Fields of other diffusers schedulers are ignored, as
 * from_config does; fields of none raise; names that begin with "_" are ignored. */
ac_status ac_schedule_new(const ac_json *config, const ac_sched_options *options,
                          ac_schedule **out);
void ac_schedule_free(ac_schedule *schedule);

/* Names of the classes in the table, NULL at the end. */
const char *const *ac_scheduler_names(void);

#endif
