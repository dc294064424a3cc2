/* denoise: guidance and the sampler's rows around a UNet.
 *
 * The UNet's exec runs its prompt and schedule sections with the first row and only the step
 * section after that.  Around the step section the backend's sampler scales the latents and applies
 * the row that the device's step counter names: nothing in it changes from row to row, so that one
 * recording serves them all.  A backend may have the row's tail, the last convolution, the row and
 * the next row's input, in one launch: then latents are scaled outside of rows only where they come
 * from outside.
 *
 * On the CPU all memory is the host's, and the loop works in the caller's latents and registers.
 * On a device it has its own, at addresses that stay with the exec: a recording lasts from call to
 * call. */
#include "denoise.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define ALIGN ((size_t)256)
#define AHEAD 2 /* rows that the host may be ahead of the device */

typedef struct loop {
    const ac_denoise_args *a;
    const ac_backend *backend;
    void *self;           /* the backend's */
    ac_exec *exec;
    ac_arena memory;      /* host */
    float *latents;       /* the caller's */
    int64_t batch;        /* of the UNet: n or 2n */
    int64_t per_image;    /* channels * height * width */
    size_t all;           /* bytes of the latents */
    ac_dtype io;          /* of the UNet's inputs */
    int32_t n_noise;      /* noises that the job holds: 1, or one for each row that draws */
    ac_sampler_job job;   /* addresses on the device */
    bool tail;            /* rows end with the backend's tail */
    float *timesteps;     /* [rows], on the device */
    char *head;           /* host copy of the state, the rows and the timesteps, head_bytes */
    size_t head_bytes;
    float *drawn;         /* host: n_noise noises; NULL: the caller's, or none */
    ac_rng *rng;          /* device: the generators as they were */
    ac_event *events[AHEAD + 1];
    int32_t step;         /* row that is next */
    int32_t broken;       /* host copy of the state's, as of the last wait */
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

/* ---- memory ---------------------------------------------------------------------------------- */

/* Offsets of what the loop keeps on the device; the head is uploaded in one piece. */
typedef struct layout {
    size_t state, rows, timesteps, head, sample, output, work, limits, latents, noise, registers;
    size_t tickets;
    size_t total;
    bool failed;
} layout;

static size_t
place(layout *m, size_t count, size_t item)
{
    size_t at = m->total, bytes;
    if (!ac_mul_size(count, item, &bytes) || !ac_add_size(bytes, at + ALIGN, &m->total)) {
        m->failed = true;
        return at;
    }
    m->total = m->total / ALIGN * ALIGN;
    return at;
}

static bool
any_row(const loop *l, bool (*is)(const ac_sched_row *row))
{
    for (int32_t i = 0; i < l->a->schedule->n_rows; i++) {
        if (is(&l->a->schedule->rows[i])) {
            return true;
        }
    }
    return false;
}

static bool
has_threshold(const ac_sched_row *row)
{
    return row->threshold > 0.0;
}

static bool
has_noise(const ac_sched_row *row)
{
    return row->draws_noise;
}

static layout
lay_out(const loop *l)
{
    layout m = {0};
    bool host = l->backend->host_memory;
    size_t rows = (size_t)l->a->schedule->n_rows, all = l->all / sizeof(float);
    size_t work = l->job.thresholds ? all : 0, batch = (size_t)(l->batch * l->per_image);
    m.state = place(&m, 1, sizeof(ac_sampler_state));
    m.rows = place(&m, rows, sizeof(ac_sched_row));
    m.timesteps = place(&m, rows, sizeof(float));
    m.head = m.total;
    m.sample = place(&m, batch, ac_dtype_size(l->io));
    m.output = place(&m, batch, sizeof(float));
    m.work = place(&m, work, sizeof(float));
    m.limits = place(&m, l->job.thresholds ? (size_t)l->a->images : 0, sizeof(double));
    m.noise = place(&m, host ? 0 : (size_t)l->n_noise * all, sizeof(float));
    m.latents = place(&m, host ? 0 : all, sizeof(float));
    m.registers = place(&m, host && l->a->registers ? 0 : AC_SCHED_REGISTERS * all, sizeof(float));
    m.tickets = place(&m, l->tail ? AC_SAMPLER_TICKETS(&l->job) : 0, sizeof(uint32_t));
    return m;
}

static void
set_addresses(loop *l, const layout *m, char *base)
{
    const ac_denoise_args *a = l->a;
    bool host = l->backend->host_memory;
    size_t all = l->all / sizeof(float);
    ac_sampler_job *job = &l->job;
    job->state = (ac_sampler_state *)(base + m->state);
    job->rows = (const ac_sched_row *)(base + m->rows);
    l->timesteps = (float *)(base + m->timesteps);
    job->sample = base + m->sample;
    job->output = (float *)(base + m->output);
    job->work = job->thresholds ? (float *)(base + m->work) : NULL;
    job->limits = job->thresholds ? (double *)(base + m->limits) : NULL;
    job->noise = l->n_noise ? (const float *)(base + m->noise) : NULL;
    job->latents = host ? l->latents : (float *)(base + m->latents);
    job->tickets = l->tail ? (uint32_t *)(base + m->tickets) : NULL;
    for (size_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        float *own = (float *)(base + m->registers);
        job->registers[i] = (host && a->registers ? a->registers : own) + i * all;
    }
}

/* A noise for each row where the generators are ours and the device is not: the host draws them
 * all before the first step, so that it never waits later. */
static void
count_noises(loop *l)
{
    const ac_denoise_args *a = l->a;
    l->n_noise = any_row(l, has_noise);
    if (a->noise || l->backend->host_memory) {
        return;
    }
    l->n_noise = 0;
    for (int32_t i = a->first_row; i < a->schedule->n_rows; i++) {
        l->n_noise += a->schedule->rows[i].draws_noise;
    }
}

static ac_status
fill_head(loop *l, const layout *m)
{
    const ac_denoise_args *a = l->a;
    l->head_bytes = m->head;
    l->head = ac_arena_alloc(&l->memory, m->head);
    if (!l->head) {
        return ac_no_memory(m->head);
    }
    ac_sampler_state *state = (ac_sampler_state *)(l->head + m->state);
    ac_sched_row *rows = (ac_sched_row *)(l->head + m->rows);
    float *timesteps = (float *)(l->head + m->timesteps);
    *state = (ac_sampler_state){.step = a->first_row, .guidance_scale = a->guidance_scale,
                                .guidance_rescale = a->guidance_rescale};
    int32_t drawn = 0;
    for (int32_t i = 0; i < a->schedule->n_rows; i++) {
        rows[i] = a->schedule->rows[i];
        timesteps[i] = (float)rows[i].timestep;
        if (l->n_noise > 1 && i >= a->first_row && rows[i].draws_noise) {
            rows[i].noise_at = drawn++;
        }
    }
    return AC_OK;
}

static ac_status
allocate(loop *l)
{
    const ac_denoise_args *a = l->a;
    void *base;
    l->job.images = a->images;
    l->job.per_image = l->per_image;
    l->job.n_rows = a->schedule->n_rows;
    l->job.guided = l->batch > a->images;
    l->job.rescales = l->job.guided && a->guidance_rescale > 0.0;
    l->job.thresholds = any_row(l, has_threshold);
    l->job.io = l->io;
    l->tail = ac_exec_has_tail(l->exec, &l->job);
    count_noises(l);
    layout m = lay_out(l);
    if (m.failed) {
        return ac_error(AC_E_INVALID, "latents: found dimensions whose product does not fit");
    }
    AC_TRY(ac_exec_memory(l->exec, m.total, &base));
    set_addresses(l, &m, base);
    AC_TRY(fill_head(l, &m));
    size_t drawn = a->noise || !l->n_noise ? 0 : (size_t)l->n_noise * l->all;
    l->drawn = drawn ? ac_arena_alloc(&l->memory, drawn) : NULL;
    if (drawn && !l->drawn) {
        return ac_no_memory(drawn);
    }
    for (int32_t i = 0; i <= AHEAD && l->backend->event_new; i++) {
        AC_TRY(l->backend->event_new(l->self, &l->events[i]));
    }
    return AC_OK;
}

/* ---- the UNet -------------------------------------------------------------------------------- */

static ac_build_args
build_args(const loop *l)
{
    const ac_denoise_args *a = l->a;
    ac_build_args args = {.entry = "forward", .batch = l->batch, .height = a->height,
                          .width = a->width, .tokens = a->tokens,
                          .timesteps = a->schedule->n_rows, .loop = true, .io_dtype = l->io,
                          .compute = a->compute, .tf32 = a->tf32};
    for (int32_t i = 0; i < a->n_conditions; i++) {
        if (strcmp(a->condition[i].name, "time_ids") == 0) {
            args.time_ids = a->condition[i].tensor.shape.dim[1];
        }
        args.masked |= strcmp(a->condition[i].name, "encoder_attention_mask") == 0;
    }
    return args;
}

static ac_dtype
io_dtype(const ac_denoise_args *a)
{
    for (int32_t i = 0; i < a->n_conditions; i++) {
        if (strcmp(a->condition[i].name, "encoder_hidden_states") == 0) {
            return a->condition[i].tensor.dtype;
        }
    }
    return AC_F32;
}

static ac_status
bind(loop *l)
{
    const ac_denoise_args *a = l->a;
    ac_shape shape = AC_SHAPE(l->batch, a->channels, a->height, a->width);
    ac_tensor sample = ac_tensor_of(l->job.sample, l->io, shape);
    ac_tensor output = ac_tensor_of(l->job.output, AC_F32, shape);
    ac_tensor step = ac_tensor_of(&l->job.state->step, AC_I32, AC_SHAPE(1));
    ac_tensor times = ac_tensor_of(l->timesteps, AC_F32, AC_SHAPE(a->schedule->n_rows));
    AC_TRY(ac_exec_bind(l->exec, "sample", &sample));
    AC_TRY(ac_exec_bind_output(l->exec, "sample", &output));
    AC_TRY(ac_exec_bind(l->exec, "timestep", &times));
    AC_TRY(ac_exec_bind(l->exec, "step", &step));
    for (int32_t i = 0; i < a->n_conditions; i++) {
        const ac_condition *c = &a->condition[i];
        AC_TRY((c->device ? ac_exec_bind : ac_exec_bind_host)(l->exec, c->name, &c->tensor));
    }
    return AC_OK;
}

/* ---- copies between the caller and the loop -------------------------------------------------- */

static ac_status
copy_in(const loop *l, ac_device_lane *lane, void *to, const void *from, size_t bytes)
{
    return (l->a->device ? l->backend->copy : l->backend->upload)(l->self, lane->lane, to, from,
                                                                 bytes);
}

static ac_status
copy_out(const loop *l, ac_device_lane *lane, void *to, const void *from, size_t bytes)
{
    return (l->a->device ? l->backend->copy : l->backend->download)(l->self, lane->lane, to, from,
                                                                   bytes);
}

static ac_status
before_step(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    return l->backend->sampler(l->self, lane->lane, &l->job, AC_SAMPLER_SCALE);
}

/* The next row's input is made of them here, if rows do not begin with that. */
static ac_status
latents_in(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    AC_TRY(copy_in(l, lane, l->job.latents, l->latents, l->all));
    return l->tail && l->step < l->job.n_rows ? before_step(l, lane) : AC_OK;
}

static ac_status
start_device(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    const ac_denoise_args *a = l->a;
    AC_TRY(l->backend->upload(l->self, lane->lane, l->job.state, l->head, l->head_bytes));
    if (l->backend->host_memory) {
        return AC_OK;
    }
    if (l->drawn) {
        AC_TRY(l->backend->upload(l->self, lane->lane, (float *)l->job.noise, l->drawn,
                                  (size_t)l->n_noise * l->all));
    }
    if (a->registers) {
        AC_TRY(copy_in(l, lane, l->job.registers[0], a->registers, AC_SCHED_REGISTERS * l->all));
    }
    return latents_in(l, lane);
}

/* Whether the host waits where the latents come out. */
static bool
waits(const loop *l)
{
    return !(l->a->device && l->a->stream.given);
}

/* Only where it is waited for: a download to the heap would wait by itself. */
static ac_status
broken_out(loop *l, ac_device_lane *lane)
{
    return l->backend->download(l->self, lane->lane, &l->broken, &l->job.state->broken,
                                sizeof l->broken);
}

static ac_status
latents_out(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    AC_TRY(copy_out(l, lane, l->latents, l->job.latents, l->all));
    return l->a->finite && waits(l) ? broken_out(l, lane) : AC_OK;
}

static ac_status
end_device(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    if (l->a->registers) {
        AC_TRY(copy_out(l, lane, l->a->registers, l->job.registers[0],
                        AC_SCHED_REGISTERS * l->all));
    }
    if (!l->a->callback) { /* which has seen them already */
        AC_TRY(copy_out(l, lane, l->latents, l->job.latents, l->all));
    }
    return l->a->finite ? broken_out(l, lane) : AC_OK;
}

static ac_status
noise_in(void *arg, ac_device_lane *lane)
{
    const loop *l = arg;
    const float *from = l->a->noise + l->step * l->a->images * l->per_image;
    return copy_in(l, lane, (float *)l->job.noise, from, l->all);
}

/* In the order of the rows' work; waits for it where the host reads or writes next. */
static ac_status
visit(loop *l, ac_exec_fn fn)
{
    if (l->backend->host_memory && fn != start_device) {
        return AC_OK; /* the loop works in the caller's memory */
    }
    bool wait = fn != start_device && fn != noise_in && waits(l);
    wait = wait || (fn == end_device && l->a->finite);
    return ac_exec_visit(l->exec, l->a->stream, wait, fn, l);
}

/* ---- noise ----------------------------------------------------------------------------------- */

static void
draw(const loop *l, float *noise)
{
    const ac_denoise_args *a = l->a;
    if (a->n_rng == 1) {
        ac_rng_normal(&a->rng[0], noise, a->images * l->per_image);
        return;
    }
    for (int64_t n = 0; n < a->images; n++) {
        ac_rng_normal(&a->rng[n], noise + n * l->per_image, l->per_image);
    }
}

static ac_status
draw_ahead(loop *l)
{
    if (l->backend->host_memory || !l->drawn) {
        return AC_OK;
    }
    size_t bytes = (size_t)l->a->n_rng * sizeof *l->rng;
    l->rng = ac_arena_alloc(&l->memory, bytes);
    if (!l->rng) {
        return ac_no_memory(bytes);
    }
    memcpy(l->rng, l->a->rng, bytes);
    for (int32_t i = 0; i < l->n_noise; i++) {
        draw(l, l->drawn + (size_t)i * (l->all / sizeof(float)));
    }
    return AC_OK;
}

/* A run that ended early leaves the generators where the rows that ran left them. */
static void
draw_back(loop *l)
{
    if (!l->rng || l->step >= l->a->schedule->n_rows) {
        return;
    }
    memcpy(l->a->rng, l->rng, (size_t)l->a->n_rng * sizeof *l->rng);
    for (int32_t i = l->a->first_row; i < l->step; i++) {
        if (l->a->schedule->rows[i].draws_noise) {
            draw(l, l->drawn);
        }
    }
}

/* ---- rows ------------------------------------------------------------------------------------ */

static ac_status
after_step(void *arg, ac_device_lane *lane)
{
    loop *l = arg;
    if (l->backend->host_memory && l->a->schedule->rows[l->step].draws_noise) {
        if (l->drawn) {
            draw(l, l->drawn);
        }
        l->job.noise = l->drawn ? l->drawn
                                : l->a->noise + l->step * l->a->images * l->per_image;
    }
    return l->backend->sampler(l->self, lane->lane, &l->job, AC_SAMPLER_APPLY);
}

static ac_status
run_row(loop *l)
{
    const ac_denoise_args *a = l->a;
    int32_t row = l->step - a->first_row;
    if (a->noise && a->schedule->rows[l->step].draws_noise) {
        AC_TRY(visit(l, noise_in));
    }
    ac_run run = {.from = row == 0 ? AC_RATE_PROMPT : AC_RATE_STEP, .stream = a->stream,
                  .queue = true, .fixed = true, .before = l->tail ? NULL : before_step,
                  .after = l->tail ? NULL : after_step, .arg = l,
                  .tail = l->tail ? &l->job : NULL, .done = l->events[row % (AHEAD + 1)],
                  .key = l->backend->host_memory
                             ? 0 : ac_hash(&l->job, sizeof l->job, AC_HASH_SEED)};
    AC_TRY(ac_exec_run_with(l->exec, &run));
    /* Cancel and signals are heard within AHEAD rows. */
    if (row >= AHEAD && l->events[0]) {
        AC_TRY(l->backend->event_wait(l->self, l->events[(row - AHEAD) % (AHEAD + 1)]));
    }
    return AC_OK;
}

/* What is known of it by now. */
static ac_status
check_finite(const loop *l)
{
    const ac_denoise_args *a = l->a;
    int32_t broken = l->backend->host_memory ? l->job.state->broken : l->broken;
    if (!a->finite || !broken) {
        return AC_OK;
    }
    return ac_error(AC_E_NUMERIC, "unet: found NaN or infinity in the latents after step %d of "
                                  "%d, timestep %g, expected finite numbers; see its weights, or "
                                  "the range of its dtype", broken, a->schedule->n_rows,
                    a->schedule->rows[broken - 1].timestep);
}

/* As a callback returns. */
static ac_status
report(loop *l, int32_t row)
{
    const ac_denoise_args *a = l->a;
    double timestep = a->schedule->rows[row].timestep;
    if (!a->callback) {
        AC_TRY(check_finite(l));
        return a->poll ? a->poll(a->callback_arg, row, timestep) : AC_OK;
    }
    AC_TRY(visit(l, latents_out));
    AC_TRY(check_finite(l));
    ac_status said = a->callback(a->callback_arg, row, timestep, l->latents);
    if (said == 0) {
        AC_TRY(visit(l, latents_in));
    }
    return said;
}

static ac_status
run_rows(loop *l)
{
    const ac_denoise_args *a = l->a;
    while (l->step < a->schedule->n_rows) {
        if (a->cancel && atomic_load(a->cancel)) {
            return ac_error(AC_E_CANCELLED, "cancelled before step %d of %d", l->step,
                            a->schedule->n_rows);
        }
        AC_TRY(run_row(l));
        ac_status said = report(l, l->step++);
        if (said != 0) {
            return said;
        }
    }
    return AC_OK;
}

/* Also where a callback stopped or raised: the caller sees the latents so far. */
static ac_status
run_loop(loop *l)
{
    AC_TRY(allocate(l));
    AC_TRY(bind(l));
    AC_TRY(draw_ahead(l));
    l->step = l->a->first_row;
    AC_TRY(visit(l, start_device));
    ac_status status = run_rows(l);
    draw_back(l);
    if (status >= 0 || status == AC_E_CANCELLED) {
        AC_TRY(visit(l, end_device));
    }
    AC_TRY(AC_MIN(status, 0));
    return check_finite(l);
}

ac_status
ac_denoise(const ac_denoise_args *a, float *latents)
{
    AC_TRY(check(a));
    ac_device *device = ac_model_device(a->unet);
    loop l = {.a = a, .backend = device->backend, .self = device->self, .latents = latents,
              .batch = a->guidance_scale > 1 ? 2 * a->images : a->images,
              .per_image = a->channels * a->height * a->width, .io = io_dtype(a)};
    l.all = (size_t)(a->images * l.per_image) * sizeof(float);
    memset(&l.job, 0, sizeof l.job); /* hashed, padding and all */
    ac_build_args args = build_args(&l);
    AC_TRY(ac_model_take(a->unet, &args, 0, &l.exec));
    ac_arena_init(&l.memory);
    ac_status status = run_loop(&l);
    for (int32_t i = 0; i <= AHEAD && l.backend->event_free; i++) {
        l.backend->event_free(l.self, l.events[i]);
    }
    ac_arena_deinit(&l.memory);
    ac_exec_set_prompt(l.exec, 0);
    ac_model_give(a->unet, l.exec);
    return status;
}
