/* denoise: the loop.  Rows of a schedule drive a UNet, guidance and the sampler's step.
 *
 *     schedule rows + UNet exec -> [denoise] -> latents
 *
 * What the rows, the prompt and the UNet are is known before the loop; per step it does no
 * allocation and takes no decision but the callback's.
 */
#ifndef AC_DENOISE_H
#define AC_DENOISE_H

#include "model.h"
#include "rng.h"
#include "scheduler.h"

/* Called after row `index` with the caller's latents [n, c, h, w] f32, which it may change in
 * place; where they are on the device, in the order of the stream.  Returns 0 to go on, 1 to stop
 * here (the latents so far are the result), or a negative status: the run fails with the message
 * set. */
typedef ac_status (*ac_step_fn)(void *arg, int32_t index, double timestep, float *latents);

typedef struct ac_condition {
    const char *name; /* of a UNet input */
    ac_tensor tensor;
    bool device;      /* in the device's memory, not the host's */
} ac_condition;

typedef struct ac_denoise_args {
    ac_model *unet;
    const ac_schedule *schedule;
    int32_t first_row;      /* img2img starts later; 0 for text to image */
    int64_t images;         /* n */
    int64_t height, width;  /* of the latents */
    int64_t channels;       /* of the latents */
    /* Conditions for the UNet by input name, batch n, or 2n with guidance: negative ones first. */
    const ac_condition *condition;
    int32_t n_conditions;
    int64_t tokens;
    ac_dtype compute;       /* of the UNet's activations; what the UNet is given has the dtype of
                             * "encoder_hidden_states", latents and the sampler are f32 or better */
    int32_t tf32;           /* AC_TF32_*, of the UNet */
    double guidance_scale;  /* <= 1: no guidance, batch n */
    double guidance_rescale; /* 0: off (Lin et al. 2023, section 3.4) */
    ac_rng *rng;            /* n of them, or one for all images as PyTorch draws for a batch */
    int32_t n_rng;
    /* latents, noise and registers are in the device's memory (CUDA: of the model's GPU). */
    bool device;
    ac_stream stream;       /* given: what is on the device belongs to it, and so does the result */
    /* Noise of somebody else's generator: [n_rows, n, c, h, w] f32, row k read when row k runs and
     * draws_noise, so the callback may fill it row by row.  NULL: drawn from rng. */
    const float *noise;
    /* What the sampler remembers: [AC_SCHED_REGISTERS, n, c, h, w] f32, so that another call can go
     * on at a later first_row, with other conditions or guidance.  NULL: the loop's own. */
    float *registers;
    /* NULL: none.  Without one nothing is copied between the rows, and the host never waits for a
     * row before it submits the next: it stays two rows ahead, so that it can be stopped. */
    ac_step_fn callback;
    void *callback_arg;     /* of poll too */
    /* Called after a row where there is no callback: progress, signals.  On a device the row was
     * submitted and may still be running.  Returns as a callback.  NULL: none. */
    ac_status (*poll)(void *arg, int32_t index, double timestep);
    /* NaN or infinity in the latents ends the run with AC_E_NUMERIC, which names the row: at once
     * on a CPU and where a callback gets them in host memory, else at the end, waited for. */
    bool finite;
    const _Atomic int *cancel; /* not 0: stop with AC_E_CANCELLED; NULL: none */
} ac_denoise_args;

/* latents [n, c, h, w] f32: noise times init_noise_sigma in, the sample out. */
ac_status ac_denoise(const ac_denoise_args *args, float *latents);

#endif
