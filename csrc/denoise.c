/* denoise: guidance and the sampler's rows around a UNet.
 *
 * The UNet's exec runs its prompt and schedule sections with the first row and only the step
 * section after that. */
#include "denoise.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

typedef struct loop {
    const ac_denoise_args *a;
    ac_exec *exec;
    ac_arena memory;
    int64_t batch;        /* of the UNet: n or 2n */
    int64_t per_image;    /* channels * height * width */
    float *sample;        /* [batch, c, h, w], what the UNet sees */
    float *output;        /* [batch, c, h, w] */
    float *noise;         /* [n, c, h, w]; NULL: the caller's */
    float *work;          /* per_image, for thresholding */
    float *registers[AC_SCHED_REGISTERS];
    float *timesteps;     /* [rows] */
    int32_t step;
} loop;

/* ---- before the loop ------------------------------------------------------------------------- */

static ac_status
check(const ac_denoise_args *a)
{
    if (a->images < 1 || a->channels < 1 || a->height < 1 || a->width < 1) {
        return ac_error(AC_E_INVALID, "latents: found an empty shape, expected [n, c, h, w]");
    }
    if (!isfinite(a->guidance_scale) || !isfinite(a->guidance_rescale)) {
        return ac_error(AC_E_INVALID, "guidance: found %g and rescale %g, expected finite numbers",
                        a->guidance_scale, a->guidance_rescale);
    }
    if (a->first_row < 0 || a->first_row >= a->schedule->n_rows) {
        return ac_error(AC_E_INVALID, "first_row: found %d, expected 0 to %d", a->first_row,
                        a->schedule->n_rows - 1);
    }
    if (!a->noise && a->n_rng != 1 && a->n_rng != a->images) {
        return ac_error(AC_E_INVALID, "generator: found %d, expected one, or one for each of the "
                                      "%lld images", a->n_rng, (long long)a->images);
    }
    return AC_OK;
}

static float *
floats(loop *l, int64_t count)
{
    return ac_arena_alloc(&l->memory, (size_t)count * sizeof(float));
}

static ac_status
allocate(loop *l)
{
    const ac_denoise_args *a = l->a;
    int64_t all = a->images * l->per_image;
    l->sample = floats(l, l->batch * l->per_image);
    l->output = floats(l, l->batch * l->per_image);
    l->noise = a->noise ? NULL : floats(l, all);
    l->work = floats(l, l->per_image);
    l->timesteps = floats(l, a->schedule->n_rows);
    bool complete = l->sample && l->output && (a->noise || l->noise) && l->work && l->timesteps;
    for (int i = 0; i < AC_SCHED_REGISTERS; i++) {
        l->registers[i] = a->registers ? a->registers + i * all : floats(l, all);
        complete = complete && l->registers[i];
    }
    return complete ? AC_OK : ac_no_memory((size_t)all * sizeof(float) * 10);
}

static ac_build_args
build_args(const loop *l)
{
    const ac_denoise_args *a = l->a;
    ac_build_args args = {.entry = "forward", .batch = l->batch, .height = a->height,
                          .width = a->width, .tokens = a->tokens,
                          .timesteps = a->schedule->n_rows, .loop = true, .io_dtype = AC_F32,
                          .compute = a->compute};
    for (int32_t i = 0; i < a->n_conditions; i++) {
        if (strcmp(a->condition[i].name, "time_ids") == 0) {
            args.time_ids = a->condition[i].tensor.shape.dim[1];
        }
        args.masked |= strcmp(a->condition[i].name, "encoder_attention_mask") == 0;
    }
    return args;
}

static ac_status
bind(loop *l)
{
    const ac_denoise_args *a = l->a;
    ac_shape shape = AC_SHAPE(l->batch, a->channels, a->height, a->width);
    ac_tensor sample = ac_tensor_of(l->sample, AC_F32, shape);
    ac_tensor output = ac_tensor_of(l->output, AC_F32, shape);
    ac_tensor step = ac_tensor_of(&l->step, AC_I32, AC_SHAPE(1));
    ac_tensor times = ac_tensor_of(l->timesteps, AC_F32, AC_SHAPE(a->schedule->n_rows));
    for (int32_t i = 0; i < a->schedule->n_rows; i++) {
        l->timesteps[i] = (float)a->schedule->rows[i].timestep;
    }
    AC_TRY(ac_exec_bind(l->exec, "sample", &sample));
    AC_TRY(ac_exec_bind_output(l->exec, "sample", &output));
    AC_TRY(ac_exec_bind(l->exec, "timestep", &times));
    AC_TRY(ac_exec_bind(l->exec, "step", &step));
    for (int32_t i = 0; i < a->n_conditions; i++) {
        AC_TRY(ac_exec_bind(l->exec, a->condition[i].name, &a->condition[i].tensor));
    }
    return AC_OK;
}

/* ---- one row --------------------------------------------------------------------------------- */

/* Both halves of the batch see the same latents, scaled as the row says. */
static void
fill_sample(loop *l, const ac_sched_row *row, const float *latents)
{
    int64_t all = l->a->images * l->per_image;
    float scale = (float)row->scale_in;
    for (int64_t i = 0; i < all; i++) {
        l->sample[i] = latents[i] * scale;
    }
    if (l->batch > l->a->images) {
        memcpy(l->sample + all, l->sample, (size_t)all * sizeof *l->sample);
    }
}

static double
deviation(const float *x, int64_t count)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += x[i];
    }
    double mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++) {
        squares += (x[i] - mean) * (x[i] - mean);
    }
    return sqrt(squares / (double)(count - 1));
}

/* e = u + scale (c - u), then rescaled towards the deviation of c, image by image.  The result
 * replaces the first half (u). */
static void
guide(loop *l)
{
    const ac_denoise_args *a = l->a;
    if (l->batch == a->images) {
        return;
    }
    int64_t all = a->images * l->per_image;
    float scale = (float)a->guidance_scale;
    const float *c = l->output + all;
    float *u = l->output;
    for (int64_t i = 0; i < all; i++) {
        u[i] += scale * (c[i] - u[i]);
    }
    for (int64_t n = 0; n < a->images && a->guidance_rescale > 0; n++) {
        float *e = u + n * l->per_image;
        double ratio = deviation(c + n * l->per_image, l->per_image) / deviation(e, l->per_image);
        float factor = (float)(a->guidance_rescale * ratio + 1.0 - a->guidance_rescale);
        for (int64_t i = 0; i < l->per_image; i++) {
            e[i] *= factor;
        }
    }
}

static const float *
draw_noise(loop *l)
{
    const ac_denoise_args *a = l->a;
    if (a->noise) {
        return a->noise + l->step * a->images * l->per_image;
    }
    if (a->n_rng == 1) {
        ac_rng_normal(&a->rng[0], l->noise, a->images * l->per_image);
        return l->noise;
    }
    for (int64_t n = 0; n < a->images; n++) {
        ac_rng_normal(&a->rng[n], l->noise + n * l->per_image, l->per_image);
    }
    return l->noise;
}

static ac_status
run_row(loop *l, float *latents)
{
    const ac_denoise_args *a = l->a;
    const ac_sched_row *row = &a->schedule->rows[l->step];
    fill_sample(l, row, latents);
    AC_TRY(ac_exec_run(l->exec, l->step == a->first_row ? AC_RATE_PROMPT : AC_RATE_STEP));
    guide(l);
    ac_sched_apply(row, a->images, l->per_image, latents, l->output,
                   row->draws_noise ? draw_noise(l) : NULL, l->registers, l->work);
    return AC_OK;
}

static ac_status
run_rows(loop *l, float *latents)
{
    const ac_denoise_args *a = l->a;
    for (l->step = a->first_row; l->step < a->schedule->n_rows; l->step++) {
        if (a->cancel && atomic_load(a->cancel)) {
            return ac_error(AC_E_CANCELLED, "cancelled before step %d of %d", l->step,
                            a->schedule->n_rows);
        }
        AC_TRY(run_row(l, latents));
        if (a->callback) {
            ac_status said = a->callback(a->callback_arg, l->step,
                                         a->schedule->rows[l->step].timestep, latents);
            if (said != 0) {
                return AC_MIN(said, 0);
            }
        }
    }
    return AC_OK;
}

ac_status
ac_denoise(const ac_denoise_args *a, float *latents)
{
    AC_TRY(check(a));
    loop l = {.a = a, .batch = a->guidance_scale > 1 ? 2 * a->images : a->images,
              .per_image = a->channels * a->height * a->width};
    ac_arena_init(&l.memory);
    ac_status status = allocate(&l);
    if (status == AC_OK) {
        ac_build_args args = build_args(&l);
        status = ac_model_take(a->unet, &args, 0, &l.exec);
    }
    if (status == AC_OK) {
        status = bind(&l);
        if (status == AC_OK) {
            status = run_rows(&l, latents);
        }
        ac_exec_set_prompt(l.exec, 0);
        ac_model_give(a->unet, l.exec);
    }
    ac_arena_deinit(&l.memory);
    return status;
}
