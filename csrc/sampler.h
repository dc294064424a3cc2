/* sampler: a row of a schedule, and the job of applying rows around a UNet.
 *
 *     scheduler.c fills rows -> [sampler] -> denoise.c runs them, a backend applies them
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
 */
#ifndef AC_SAMPLER_H
#define AC_SAMPLER_H

#include "tensor.h"

#define AC_SCHED_REGISTERS 6
enum { AC_BASIS_X, AC_BASIS_E, AC_BASIS_M, AC_BASIS_NOISE, AC_BASIS_R0,
       AC_BASIS_COUNT = AC_BASIS_R0 + AC_SCHED_REGISTERS };
#define AC_SCHED_STORES 3

typedef struct ac_sched_row {
    double timestep;       /* what the UNet is told */
    double scale_in;
    double m_x, m_e;
    double clip;           /* clamp of m to [-clip, clip]; 0: none */
    double threshold;      /* dynamic thresholding: quantile of |m| per image (Imagen), 0: none */
    double threshold_max;  /* sample_max_value */
    double x_next[AC_BASIS_COUNT];
    int32_t n_stores;
    struct { int32_t to; double c[AC_BASIS_COUNT]; } store[AC_SCHED_STORES];
    double start_x, start_noise; /* img2img begins here with start_x * x0 + start_noise * noise */
    bool draws_noise;      /* the generator advances at this row, as diffusers' does, even where
                              the noise's coefficient is 0 */
    int32_t noise_at;      /* which of the noises that a job holds; set by the loop */
    bool counts;           /* progress: false for the extra evaluations of higher-order samplers */
} ac_sched_row;

/* What changes from step to step and from call to call, in the device's memory. */
typedef struct ac_sampler_state {
    int32_t step; /* the row that comes next; the UNet reads it, applying a row counts it up */
    int32_t broken; /* the first row, counted from 1, that left latents not finite; 0: none */
    double guidance_scale;
    double guidance_rescale;
} ac_sampler_state;

typedef enum ac_sampler_phase {
    AC_SAMPLER_SCALE, /* before the UNet: latents -> sample */
    AC_SAMPLER_APPLY  /* after it: output -> latents and registers, `broken`, and the next row */
} ac_sampler_phase;

/* Of a job: more than the parts that any kernel makes of it, which count themselves there. */
#define AC_SAMPLER_TICKETS(job) ((size_t)((job)->images * (job)->per_image) + 1)

/* All addresses are of the device's memory.  Latents and all arithmetic on them are f32 or better,
 * whatever the UNet computes in. */
typedef struct ac_sampler_job {
    int64_t images, per_image;
    int32_t n_rows;  /* behind the last one a tail makes no input, nor does a GPU's SCALE */
    bool guided;     /* sample and output have 2 n images, the unconditional ones first */
    bool rescales;   /* guidance_rescale is not 0 */
    bool thresholds; /* rows have a threshold */
    ac_dtype io;     /* of sample */
    const ac_sched_row *rows;
    ac_sampler_state *state;
    void *sample;
    float *output;      /* overwritten */
    float *latents;     /* [images, per_image] */
    const float *noise; /* [.., images, per_image], the row's at noise_at; NULL: no row has any */
    float *registers[AC_SCHED_REGISTERS];
    float *work;        /* [images, per_image], for thresholds */
    double *limits;     /* [images], for thresholds */
    uint32_t *tickets;  /* [AC_SAMPLER_TICKETS], for the tail; SCALE clears them.  NULL: none */
} ac_sampler_job;

/* x [n, count] -> x'; e [n, count] is already guided; noise NULL unless the row uses it;
 * registers: AC_SCHED_REGISTERS arrays of n*count f32.  `count` elements an image.  Plain C, f32
 * storage with double arithmetic; `work` holds count floats when the row thresholds, else NULL.
 * A basis tensor whose coefficients are all 0 is not read. */
void ac_sched_apply(const ac_sched_row *row, int64_t n, int64_t count, float *x, const float *e,
                    const float *noise, float *const *registers, float *work);

#endif
