/* profile: runs a plan over random inputs and times its steps.  See profile.h.
 *
 *     a run as usual           derives weights, lets kernels choose algorithms, binds addresses
 *     each section recorded    once as it is, once with a mark before and after each step
 *     the sampler, in a loop   recorded with marks too, over memory of its own; then the tail
 *     replayed, read           `repeats` times; the best of each step
 *
 * Without a backend that records (the CPU) sections are launched, and the host's clock read. */
#include "profile.h"

#include "exec_internal.h"

#include <string.h>

#define REPEATS 10

/* ---- points in time -------------------------------------------------------------------------- */

typedef struct timer {
    ac_exec *exec;
    ac_device_lane *lane;
    ac_recording *recording;
    double *host;       /* ms; marks of a device whose launches return when done */
    double *ms;         /* between neighbouring marks */
} timer;

static ac_status
mark(timer *t, int32_t index)
{
    const ac_device *device = t->exec->plan->device;
    if (device->backend->time_mark) {
        return device->backend->time_mark(device->self, t->lane->lane, index);
    }
    t->host[index] = ac_now_ms();
    return AC_OK;
}

static ac_status
read_marks(timer *t, int32_t count)
{
    const ac_device *device = t->exec->plan->device;
    if (device->backend->time_read) {
        return device->backend->time_read(device->self, t->lane->lane, count, t->ms);
    }
    for (int32_t i = 0; i + 1 < count; i++) {
        t->ms[i] = t->host[i + 1] - t->host[i];
    }
    return AC_OK;
}

/* ---- a section ------------------------------------------------------------------------------- */

typedef struct section {
    int32_t first, end;
    bool each; /* a mark after every step, or only at both ends */
    const ac_sampler_job *job; /* not NULL: its two phases, or its tail, instead of steps */
    bool tail;
} section;

static ac_status
launch_sampler(timer *t, const ac_sampler_job *job)
{
    const ac_device *device = t->exec->plan->device;
    for (int32_t i = 0; i < 2; i++) {
        ac_sampler_phase phase = i ? AC_SAMPLER_APPLY : AC_SAMPLER_SCALE;
        AC_TRY(device->backend->sampler(device->self, t->lane->lane, job, phase));
        AC_TRY(mark(t, i + 1));
    }
    return AC_OK;
}

static ac_status
launch_tail(timer *t, const ac_sampler_job *job)
{
    AC_TRY(ac_exec_launch_tail(t->exec, t->lane, job));
    return mark(t, 1);
}

static ac_status
launch(timer *t, const section *s)
{
    int32_t marks = 0;
    AC_TRY(mark(t, marks++));
    if (s->job) {
        return s->tail ? launch_tail(t, s->job) : launch_sampler(t, s->job);
    }
    for (int32_t i = s->first; i < s->end; i++) {
        ac_exec_resolve(t->exec, t->lane, i);
        AC_TRY(ac_exec_launch(t->exec, t->lane, i));
        if (s->each || i == s->end - 1) {
            AC_TRY(mark(t, marks++));
        }
    }
    return AC_OK;
}

static ac_status
record(timer *t, const section *s)
{
    const ac_device *device = t->exec->plan->device;
    AC_TRY(device->backend->record_begin(device->self, t->lane->lane));
    ac_status launched = launch(t, s);
    ac_status ended = device->backend->record_end(device->self, t->lane->lane, &t->recording);
    return launched < 0 ? launched : ended;
}

static void
forget(timer *t)
{
    const ac_device *device = t->exec->plan->device;
    if (t->recording) {
        device->backend->record_free(device->self, t->recording);
        t->recording = NULL;
    }
}

/* The least time between each two marks of the section. */
static ac_status
time_section(timer *t, const section *s, int32_t repeats, double *best)
{
    const ac_device *device = t->exec->plan->device;
    int32_t times = s->job ? 2 - s->tail : s->each ? s->end - s->first : 1;
    AC_TRY(launch(t, s)); /* also makes the marks, which a recording must not */
    AC_TRY(device->backend->sync(device->self, t->lane->lane));
    if (t->exec->can_record && record(t, s) < 0) {
        ac_log(1, "profile: recording failed, launches are timed: %s", ac_error_message());
        forget(t);
    }
    for (int32_t r = 0; r < repeats; r++) {
        AC_TRY(t->recording ? device->backend->replay(device->self, t->lane->lane, t->recording)
                            : launch(t, s));
        AC_TRY(read_marks(t, times + 1));
        for (int32_t i = 0; i < times; i++) {
            best[i] = r == 0 ? t->ms[i] : AC_MIN(best[i], t->ms[i]);
        }
    }
    forget(t);
    return AC_OK;
}

/* ---- the sampler ----------------------------------------------------------------------------- */

static const ac_value *
find_input(const ac_exec *e, const char *name)
{
    for (int32_t i = 0; i < e->n_edges; i++) {
        const ac_value *value = &e->plan->graph->values[e->edge_at[i]];
        if (!value->output && strcmp(value->name, name) == 0) {
            return value;
        }
    }
    return NULL;
}

/* Offsets of what a job works on; all the rest is from `arrays` on, `all` bytes each. */
typedef struct job_layout {
    size_t n_rows, rows, arrays, all, total;
} job_layout;

/* Applying a row goes on to the next one: there is a row for every time that the sampler or the
 * tail runs. */
static job_layout
lay_out_job(const ac_value *sample, int32_t repeats)
{
    job_layout m = {.n_rows = 2 * ((size_t)repeats + 4), .rows = 256};
    m.all = ac_align_up((size_t)ac_shape_count(&sample->shape) * sizeof(float), 256);
    m.arrays = ac_align_up(m.rows + m.n_rows * sizeof(ac_sched_row), 256);
    m.total = m.arrays + (4 + AC_SCHED_REGISTERS) * m.all + 256;
    return m;
}

static ac_sampler_job
make_job(const ac_value *sample, const job_layout *m, char *base)
{
    int64_t batch = sample->shape.dim[0];
    bool guided = batch % 2 == 0;
    ac_sampler_job job = {.images = guided ? batch / 2 : batch, .guided = guided,
                          .per_image = ac_shape_count(&sample->shape) / batch,
                          .io = sample->dtype, .n_rows = (int32_t)m->n_rows,
                          .state = (ac_sampler_state *)base,
                          .rows = (const ac_sched_row *)(base + m->rows),
                          .sample = base + m->arrays,
                          .output = (float *)(base + m->arrays + m->all),
                          .latents = (float *)(base + m->arrays + 2 * m->all)};
    for (size_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        job.registers[i] = (float *)(base + m->arrays + (3 + i) * m->all);
    }
    job.tickets = (uint32_t *)(base + m->arrays + (3 + AC_SCHED_REGISTERS) * m->all);
    return job;
}

static void
fill_rows(const job_layout *m, char *host)
{
    ac_sampler_state *state = (ac_sampler_state *)host;
    ac_sched_row *rows = (ac_sched_row *)(host + m->rows);
    state->guidance_scale = 7.5;
    for (size_t i = 0; i < m->n_rows; i++) {
        rows[i] = (ac_sched_row){.scale_in = 0.9, .m_x = 1.1, .m_e = -0.4, .n_stores = 1};
        rows[i].x_next[AC_BASIS_X] = rows[i].x_next[AC_BASIS_M] = 0.5;
        rows[i].x_next[AC_BASIS_R0] = 0.3;
        rows[i].store[0].c[AC_BASIS_M] = 1.0;
    }
}

static ac_status
time_phases(timer *t, const ac_sampler_job *job, int32_t repeats, ac_profile_times *times)
{
    section s = {.job = job};
    AC_TRY(time_section(t, &s, repeats, times->sampler));
    s.tail = ac_exec_has_tail(t->exec, job);
    return s.tail ? time_section(t, &s, repeats, &times->tail) : AC_OK;
}

static ac_status
time_job(timer *t, const ac_value *sample, int32_t repeats, char *host, ac_profile_times *times)
{
    ac_device *device = t->exec->plan->device;
    job_layout m = lay_out_job(sample, repeats);
    void *memory;
    fill_rows(&m, host);
    AC_TRY(ac_device_alloc(device, m.total, &memory));
    ac_sampler_job job = make_job(sample, &m, memory);
    ac_status status = device->backend->upload(device->self, t->lane->lane, memory, host, m.total);
    if (status == AC_OK) {
        status = time_phases(t, &job, repeats, times);
    }
    ac_status done = device->backend->sync(device->self, t->lane->lane);
    ac_device_free(device, memory);
    return status < 0 ? status : done;
}

/* Only a loop's plan takes the row it is at. */
static ac_status
time_sampler(timer *t, int32_t repeats, ac_profile_times *times)
{
    const ac_value *sample = find_input(t->exec, "sample");
    if (!sample || !find_input(t->exec, "step")) {
        return AC_OK;
    }
    size_t bytes = lay_out_job(sample, repeats).total;
    char *host = ac_calloc(1, bytes);
    if (!host) {
        return ac_no_memory(bytes);
    }
    ac_status status = time_job(t, sample, repeats, host, times);
    ac_free(host);
    return status;
}

static ac_status
time_all(timer *t, int32_t repeats, ac_profile_times *times)
{
    const ac_plan *plan = t->exec->plan;
    for (int32_t r = AC_RATE_PROMPT; r < AC_RATE_COUNT; r++) {
        section s = {.first = plan->first[r], .end = plan->first[r + 1]};
        if (s.first == s.end) {
            continue;
        }
        AC_TRY(time_section(t, &s, repeats, &times->section[r]));
        s.each = true;
        AC_TRY(time_section(t, &s, repeats, times->step + s.first));
    }
    return time_sampler(t, repeats, times);
}

ac_status
ac_exec_profile(ac_exec *e, int32_t repeats, ac_profile_times *times)
{
    ac_device *device = e->plan->device;
    size_t bytes = (size_t)(e->plan->n_steps + 2) * sizeof(double);
    timer t = {.exec = e};
    AC_TRY(ac_exec_run(e, AC_RATE_PROMPT));
    AC_TRY(ac_device_lane_take(device, e->lane, &t.lane));
    e->lane = t.lane;
    t.host = ac_calloc(1, bytes);
    t.ms = ac_calloc(1, bytes);
    ac_status status = t.host && t.ms ? AC_OK : ac_no_memory(bytes);
    if (status == AC_OK) {
        status = ac_device_lane_reserve(device, t.lane, e->plan->arena_bytes,
                                        e->plan->worker_scratch);
    }
    if (status == AC_OK && device->backend->lane_follow) {
        status = device->backend->lane_follow(device->self, t.lane->lane, (ac_stream){0});
    }
    if (status == AC_OK) {
        status = time_all(&t, repeats, times);
    }
    forget(&t);
    ac_free(t.host);
    ac_free(t.ms);
    ac_device_lane_give(device, t.lane);
    return status;
}

/* ---- random inputs --------------------------------------------------------------------------- */

/* Uniform in +-sqrt(3): a power-limited chip is faster on zeros. */
static void
fill(const char *name, const ac_tensor *t)
{
    uint64_t state = ac_hash(name, strlen(name), AC_HASH_SEED) | 1;
    bool mask = strstr(name, "mask") != NULL, time = strcmp(name, "timestep") == 0;
    int64_t count = ac_tensor_count(t);
    for (int64_t i = 0; i < count; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        double x = ((double)(state >> 11) * 0x1p-52 - 1.0) * 1.7320508;
        x = mask || !ac_dtype_is_float(t->dtype) ? 0.0 : time ? 500.0 : x;
        ac_element_set(t->data, t->dtype, i, x);
    }
}

/* Memory for all edges, one block after the other, 64 bytes apart at least. */
static ac_status
bind_random(ac_exec *e, char *memory, size_t *bytes)
{
    size_t at = 0;
    for (int32_t i = 0; i < e->n_edges; i++) {
        const ac_value *value = &e->plan->graph->values[e->edge_at[i]];
        ac_tensor t = ac_tensor_of(memory ? memory + at : NULL, value->dtype, value->shape);
        at = ac_align_up(at + ac_tensor_bytes(&t), 64);
        if (!memory) {
            continue;
        }
        if (value->output) {
            AC_TRY(ac_exec_bind_output_host(e, value->output, &t));
        } else {
            fill(value->name, &t);
            AC_TRY(ac_exec_bind_host(e, value->name, &t));
        }
    }
    *bytes = at;
    return AC_OK;
}

static ac_status
profile_exec(ac_model *model, ac_exec *e, const ac_profile_args *args, bool json, ac_text *text)
{
    size_t bytes = 0, steps = (size_t)AC_MAX(e->plan->n_steps, 1) * sizeof(double);
    AC_TRY(bind_random(e, NULL, &bytes));
    char *memory = ac_malloc_aligned(AC_MAX(bytes, 64));
    ac_profile_times times = {.step = ac_calloc(1, steps)};
    ac_status status = memory && times.step ? AC_OK : ac_no_memory(bytes + steps);
    if (status == AC_OK) {
        status = bind_random(e, memory, &bytes);
    }
    if (status == AC_OK) {
        status = ac_exec_profile(e, args->repeats, &times);
    }
    if (status == AC_OK) {
        ac_profile_report(e->plan, ac_model_class_name(model), args, &times, json, text);
    }
    ac_exec_unbind(e);
    ac_free_aligned(memory);
    ac_free(times.step);
    return status;
}

ac_status
ac_model_profile(ac_model *model, const ac_build_args *build, const ac_profile_args *args,
                 bool json, ac_text *text)
{
    const ac_caps *caps = &ac_model_device(model)->caps;
    bool half = build->compute != AC_F32;
    ac_profile_args full = *args;
    ac_exec *exec;
    full.repeats = args->repeats > 0 ? args->repeats : REPEATS;
    full.flops = args->flops > 0.0 ? args->flops : half ? caps->half_flops : caps->float_flops;
    if (full.tf32_flops <= 0.0) {
        full.tf32_flops = args->flops > 0.0 ? args->flops : caps->half_flops / 2.0;
    }
    full.bandwidth = args->bandwidth > 0.0 ? args->bandwidth : caps->bandwidth;
    AC_TRY(ac_model_take(model, build, 0, &exec));
    ac_exec_set_prompt(exec, 0);
    ac_status status = profile_exec(model, exec, &full, json, text);
    ac_model_give(model, exec);
    return status;
}
