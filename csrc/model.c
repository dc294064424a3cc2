/* model: one set of weights, plans by shape, execs by run.
 *
 *     config.json + weights -> [model] -> graph, passes, plan, exec, each when first needed
 */
#include "model.h"

#include "lock.h"
#include "passes/passes.h"

#include <stdio.h>
#include <string.h>

/* Plans kept: PLANS_ALWAYS of any size, up to PLANS_MOST while they keep little on the device.
 * One of SD 1.5's (SDXL's) UNet takes 0.8 (2) MB on the host and 8 (51) MB of K and V on the device
 * at batch 2, and a recording.  When it went its next call plans for 2 (4) ms, waits for the device
 * and launches step by step: who goes round over more sizes than are kept never replays. */
#define PLANS_ALWAYS 8
#define PLANS_MOST 32
#define LITTLE_BYTES ((size_t)64 << 20)
#define MAX_IDLE_EXECS 4 /* a plan; more exist only while that many runs overlap */

typedef struct pooled_exec {
    ac_exec *exec;
    bool busy;
} pooled_exec;

typedef struct cached_plan {
    ac_build_args args;   /* entry points into the class's table */
    ac_plan *plan;
    pooled_exec *execs;
    int32_t n_execs, cap_execs;
    uint64_t used;        /* clock of the last take */
    bool stale;           /* dropped while runs were on it: goes with the last of them */
} cached_plan;

struct ac_model {
    pthread_mutex_t lock;
    int32_t references;
    const ac_model_class *cls;
    void *config;
    ac_weights *weights;      /* NULL: none, plans only */
    bool joined;              /* derives into the weights: leaves them at the end */
    ac_device *device;
    uint32_t passes_off;
    cached_plan **plans;
    int32_t n_plans, cap_plans;
    uint64_t clock;
    uint64_t generation;      /* of the weights when `signature` was made */
    uint64_t signature;       /* of their names, dtypes and shapes */
    size_t weight_bytes;      /* of them all, at that time */
    int64_t runs;
    double plan_ms;
    char unrecorded[256];     /* as an exec first said it */
};

/* ---- life ------------------------------------------------------------------------------------ */

static uint64_t
signature_of(const ac_weights *weights, size_t *bytes)
{
    uint64_t hash = AC_HASH_SEED;
    *bytes = 0;
    for (int32_t i = 0; weights && i < ac_weights_count(weights); i++) {
        const char *name = ac_weights_name(weights, i);
        const ac_tensor *t = ac_weights_find(weights, name);
        hash = ac_hash(name, strlen(name), hash);
        hash = ac_hash(&t->dtype, sizeof t->dtype, hash);
        hash = ac_hash(t->shape.dim, sizeof t->shape.dim, hash);
        *bytes += ac_tensor_bytes(t);
    }
    return hash;
}

static ac_status
init(ac_model *m, const ac_json *config, ac_weights *weights, const char *device,
     const char *passes_off)
{
    AC_TRY(ac_model_class_find(config, &m->cls));
    m->config = ac_calloc(1, m->cls->config_size);
    if (!m->config) {
        return ac_no_memory(m->cls->config_size);
    }
    AC_TRY(m->cls->parse(config, m->config));
    AC_TRY(ac_passes_off_from_text(passes_off, &m->passes_off));
    AC_TRY(ac_device_open(device, &m->device));
    if (weights) {
        m->weights = ac_weights_ref(weights);
        AC_TRY(ac_model_check_weights(m->cls, m->config, weights));
        m->generation = ac_weights_generation(weights);
        m->signature = signature_of(weights, &m->weight_bytes);
    }
    return AC_OK;
}

static void
release_memory(void *device, void *memory)
{
    ac_device_free(device, memory);
}

ac_status
ac_model_new(const ac_json *config, ac_weights *weights, const char *device,
             const char *passes_off, ac_model **out)
{
    ac_model *m = ac_calloc(1, sizeof *m);
    if (!m) {
        return ac_no_memory(sizeof *m);
    }
    m->references = 1;
    pthread_mutex_init(&m->lock, NULL);
    ac_status status = init(m, config, weights, device, passes_off);
    if (status == AC_OK && weights) {
        status = ac_weights_set_release(weights, release_memory, m->device);
        m->joined = status == AC_OK;
    }
    if (status < 0) {
        ac_model_unref(m);
        return status;
    }
    *out = m;
    return AC_OK;
}

ac_model *
ac_model_ref(ac_model *m)
{
    ac_lock(&m->lock);
    m->references++;
    ac_unlock(&m->lock);
    return m;
}

static void
free_plan(cached_plan *p)
{
    for (int32_t i = 0; i < p->n_execs; i++) {
        ac_exec_free(p->execs[i].exec);
    }
    ac_free(p->execs);
    ac_plan_free(p->plan);
    ac_free(p);
}

void
ac_model_unref(ac_model *m)
{
    if (!m) {
        return;
    }
    ac_lock(&m->lock);
    bool last = --m->references == 0;
    ac_unlock(&m->lock);
    if (!last) {
        return;
    }
    for (int32_t i = 0; i < m->n_plans; i++) {
        free_plan(m->plans[i]);
    }
    ac_free(m->plans);
    if (m->weights) {
        if (m->joined) {
            ac_weights_leave(m->weights);
        }
        ac_weights_unref(m->weights);
    }
    ac_device_unref(m->device);
    pthread_mutex_destroy(&m->lock);
    ac_free(m->config);
    ac_free(m);
}

const char *
ac_model_class_name(const ac_model *m)
{
    return m->cls->name;
}

ac_device *
ac_model_device(ac_model *m)
{
    return m->device;
}

/* ---- plans ----------------------------------------------------------------------------------- */

/* The entry as the class's own string, so that args can be compared and kept. */
static ac_status
own_args(const ac_model *m, const ac_build_args *args, ac_build_args *out)
{
    *out = *args;
    const char *const *entry = m->cls->entries;
    while (*entry && (!args->entry || strcmp(*entry, args->entry) != 0)) {
        entry++;
    }
    if (!*entry) {
        return ac_error(AC_E_INVALID, "entry: found \"%.64s\", expected \"%s\" or another entry of "
                                      "%s", args->entry ? args->entry : "", m->cls->entries[0],
                        m->cls->name);
    }
    out->entry = *entry;
    out->tf32 = args->compute == AC_F32 && m->device->caps.tf32 ? args->tf32 : 0;
    return AC_OK;
}

static bool
same_args(const ac_build_args *a, const ac_build_args *b)
{
    return a->entry == b->entry && a->batch == b->batch && a->height == b->height &&
           a->width == b->width && a->tokens == b->tokens && a->timesteps == b->timesteps &&
           a->time_ids == b->time_ids && a->loop == b->loop && a->masked == b->masked &&
           a->hidden_states == b->hidden_states && a->clip_skip == b->clip_skip &&
           a->io_dtype == b->io_dtype && a->compute == b->compute && a->tf32 == b->tf32;
}

/* What the weights really are, before passes look: kernels and casts depend on it. */
static void
set_weight_dtypes(const ac_model *m, ac_graph *g)
{
    for (ac_val v = 0; v < g->n_values && m->weights; v++) {
        if (g->values[v].kind == AC_VALUE_WEIGHT) {
            const ac_tensor *t = ac_weights_find(m->weights, g->values[v].name);
            g->values[v].dtype = t ? t->dtype : g->values[v].dtype;
        }
    }
}

static ac_status
build_graph(const ac_model *m, const ac_build_args *args, const ac_dumps *dumps, ac_graph **out)
{
    ac_graph *g;
    AC_TRY(ac_graph_new(args->compute, &g));
    g->tf32 = args->tf32;
    m->cls->build(m->config, args, g);
    ac_status status = ac_graph_status(g);
    if (status == AC_OK) {
        set_weight_dtypes(m, g);
        status = ac_passes_run(g, m->passes_off, dumps);
    }
    if (status == AC_OK) {
        status = ac_cast_weights(g, args->compute);
    }
    if (status < 0) {
        ac_graph_free(g);
        return status;
    }
    *out = g;
    return AC_OK;
}

static ac_status
new_plan(ac_model *m, const ac_build_args *args, cached_plan **out)
{
    double start = ac_now_ms();
    cached_plan *p = ac_calloc(1, sizeof *p);
    if (!p) {
        return ac_no_memory(sizeof *p);
    }
    p->args = *args;
    ac_graph *g;
    ac_status status = build_graph(m, args, NULL, &g);
    if (status == AC_OK) {
        status = ac_plan_new(g, m->device, &p->plan);
    }
    if (status < 0) {
        ac_free(p);
        return status;
    }
    m->plan_ms = ac_now_ms() - start;
    ac_log(2, "%s %s: batch %lld, %lldx%lld: %d steps, arena %.1f MB, planned in %.1f ms",
           m->cls->name, args->entry, (long long)args->batch, (long long)args->height,
           (long long)args->width, p->plan->n_steps, (double)p->plan->arena_bytes / 1e6,
           m->plan_ms);
    *out = p;
    return AC_OK;
}

static bool
plan_busy(const cached_plan *p)
{
    for (int32_t i = 0; i < p->n_execs; i++) {
        if (p->execs[i].busy) {
            return true;
        }
    }
    return false;
}

static void
remove_plan(ac_model *m, int32_t at)
{
    free_plan(m->plans[at]);
    m->plans[at] = m->plans[--m->n_plans];
}

static void
drop_idle(ac_model *m)
{
    for (int32_t i = m->n_plans - 1; i >= 0; i--) {
        m->plans[i]->stale = true;
        if (!plan_busy(m->plans[i])) {
            remove_plan(m, i);
        }
    }
}

static size_t
kept_bytes(const ac_model *m)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < m->n_plans; i++) {
        bytes += m->plans[i]->plan->keep_bytes * (size_t)m->plans[i]->n_execs;
    }
    return bytes;
}

/* Whether there is no room for one more, which will keep `bytes`.  Where a replay saves much of a
 * call, a quarter of what the weights take is little: 25 sizes of SDXL. */
static bool
crowded(const ac_model *m, size_t bytes)
{
    size_t share = m->device->backend->record_begin ? m->weight_bytes / 4 : 0;
    return m->n_plans >= PLANS_MOST ||
           (m->n_plans >= PLANS_ALWAYS && kept_bytes(m) + bytes > AC_MAX(share, LITTLE_BYTES));
}

/* For the new one the least recently used ones go that no run is on. */
static ac_status
keep_plan(ac_model *m, cached_plan *p)
{
    while (crowded(m, p->plan->keep_bytes)) {
        int32_t oldest = AC_NONE;
        for (int32_t i = 0; i < m->n_plans; i++) {
            if (!plan_busy(m->plans[i]) &&
                (oldest == AC_NONE || m->plans[i]->used < m->plans[oldest]->used)) {
                oldest = i;
            }
        }
        if (oldest == AC_NONE) {
            break;
        }
        remove_plan(m, oldest);
    }
    if (m->n_plans == m->cap_plans) {
        int32_t capacity = AC_MAX(2 * m->cap_plans, PLANS_ALWAYS);
        cached_plan **grown = ac_realloc(m->plans, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return ac_no_memory((size_t)capacity * sizeof *grown);
        }
        m->plans = grown;
        m->cap_plans = capacity;
    }
    m->plans[m->n_plans++] = p;
    return AC_OK;
}

/* Plans hold dtypes and shapes of weights, not addresses: they go only when those change. */
static ac_status
follow_weights(ac_model *m)
{
    if (!m->weights || ac_weights_generation(m->weights) == m->generation) {
        return AC_OK;
    }
    uint64_t signature = signature_of(m->weights, &m->weight_bytes);
    if (signature != m->signature) {
        drop_idle(m);
        AC_TRY(ac_model_check_weights(m->cls, m->config, m->weights));
        signature = signature_of(m->weights, &m->weight_bytes);
    }
    m->generation = ac_weights_generation(m->weights);
    m->signature = signature;
    return AC_OK;
}

static ac_status
find_plan(ac_model *m, const ac_build_args *args, cached_plan **out)
{
    ac_build_args own;
    AC_TRY(own_args(m, args, &own));
    AC_TRY(follow_weights(m));
    for (int32_t i = 0; i < m->n_plans; i++) {
        if (!m->plans[i]->stale && same_args(&m->plans[i]->args, &own)) {
            *out = m->plans[i];
            (*out)->used = ++m->clock;
            return AC_OK;
        }
    }
    cached_plan *p = NULL;
    AC_TRY(new_plan(m, &own, &p));
    ac_status status = keep_plan(m, p);
    if (status < 0) {
        free_plan(p);
        return status;
    }
    p->used = ++m->clock;
    *out = p;
    return AC_OK;
}

/* ---- execs ----------------------------------------------------------------------------------- */

static ac_status
add_exec(ac_model *m, cached_plan *p, pooled_exec **out)
{
    if (p->n_execs == p->cap_execs) {
        int32_t capacity = AC_MAX(2 * p->cap_execs, 2);
        pooled_exec *grown = ac_realloc(p->execs, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return ac_no_memory((size_t)capacity * sizeof *grown);
        }
        p->execs = grown;
        p->cap_execs = capacity;
    }
    pooled_exec *slot = &p->execs[p->n_execs];
    *slot = (pooled_exec){0};
    AC_TRY(ac_exec_new(p->plan, m->weights, &slot->exec));
    p->n_execs++;
    *out = slot;
    return AC_OK;
}

static ac_status
take_locked(ac_model *m, const ac_build_args *args, uint64_t prompt, ac_exec **out)
{
    cached_plan *p;
    AC_TRY(find_plan(m, args, &p));
    pooled_exec *found = NULL;
    for (int32_t i = 0; i < p->n_execs; i++) {
        pooled_exec *e = &p->execs[i];
        bool same = prompt && ac_exec_prompt(e->exec) == prompt;
        if (!e->busy && (!found || same)) {
            found = e;
        }
    }
    if (!found) {
        AC_TRY(add_exec(m, p, &found));
    }
    found->busy = true;
    *out = found->exec;
    return AC_OK;
}

ac_status
ac_model_take(ac_model *m, const ac_build_args *args, uint64_t prompt, ac_exec **out)
{
    if (!m->weights) {
        return ac_error(AC_E_INVALID, "%s: this model has no weights, it can be planned and "
                                      "explained but not run", m->cls->name);
    }
    if (m->device->backend == &ac_backend_null) {
        return ac_error(AC_E_INVALID, "%s: the null device computes nothing, this model can be "
                                      "planned and explained but not run", m->cls->name);
    }
    ac_lock(&m->lock);
    ac_status status = take_locked(m, args, prompt, out);
    ac_unlock(&m->lock);
    return status;
}

static bool
give_to(cached_plan *p, ac_exec *exec)
{
    for (int32_t i = 0; i < p->n_execs; i++) {
        if (p->execs[i].exec != exec) {
            continue;
        }
        p->execs[i].busy = false;
        if (p->n_execs > MAX_IDLE_EXECS) {
            ac_exec_free(exec);
            p->execs[i] = p->execs[--p->n_execs];
        }
        return true;
    }
    return false;
}

void
ac_model_give(ac_model *m, ac_exec *exec)
{
    ac_exec_unbind(exec);
    ac_lock(&m->lock);
    m->runs++;
    if (!m->unrecorded[0]) {
        snprintf(m->unrecorded, sizeof m->unrecorded, "%s", ac_exec_unrecorded(exec));
    }
    for (int32_t i = 0; i < m->n_plans; i++) {
        if (give_to(m->plans[i], exec)) {
            if (m->plans[i]->stale && !plan_busy(m->plans[i])) {
                remove_plan(m, i);
            }
            break;
        }
    }
    ac_unlock(&m->lock);
}

void
ac_model_drop_plans(ac_model *m)
{
    ac_lock(&m->lock);
    drop_idle(m);
    ac_unlock(&m->lock);
    ac_device_trim(m->device);
}

ac_status
ac_model_make_room(ac_model *m, const ac_build_args *args, size_t *freed)
{
    cached_plan *p;
    size_t arena = 0;
    ac_lock(&m->lock);
    ac_status status = find_plan(m, args, &p);
    if (status == AC_OK) {
        arena = p->plan->arena_bytes;
    }
    ac_unlock(&m->lock);
    *freed = status == AC_OK ? ac_device_make_room(m->device, arena) : 0;
    return status;
}

/* ---- looking in ------------------------------------------------------------------------------ */

static ac_status
list_io(const ac_graph *g, ac_io **out, int32_t *count)
{
    ac_io *io = ac_malloc((size_t)AC_MAX(g->n_values, 1) * sizeof *io);
    if (!io) {
        return ac_no_memory((size_t)g->n_values * sizeof *io);
    }
    int32_t n = 0;
    for (ac_val v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        if (value->kind == AC_VALUE_INPUT || value->output) {
            io[n++] = (ac_io){.name = value->output ? value->output : value->name,
                              .dtype = value->dtype, .shape = value->shape,
                              .output = value->output != NULL};
        }
    }
    *out = io;
    *count = n;
    return AC_OK;
}

ac_status
ac_model_io(ac_model *m, const ac_build_args *args, ac_io **out, int32_t *count)
{
    ac_lock(&m->lock);
    cached_plan *p;
    ac_status status = find_plan(m, args, &p);
    if (status == AC_OK) {
        status = list_io(p->plan->graph, out, count);
    }
    ac_unlock(&m->lock);
    return status;
}

static ac_status
explain_passes(ac_model *m, const ac_build_args *args, bool json, ac_text *text)
{
    ac_graph *g;
    ac_text_printf(text, json ? "{\"passes\":[" : "");
    AC_TRY(build_graph(m, args, &(ac_dumps){.text = text, .json = json}, &g));
    ac_graph_free(g);
    ac_text_printf(text, json ? "],\n\"plan\":" : "");
    return AC_OK;
}

ac_status
ac_model_explain(ac_model *m, const ac_build_args *args, bool json, bool dumps, ac_text *text)
{
    ac_lock(&m->lock);
    cached_plan *p;
    ac_status status = find_plan(m, args, &p);
    if (status == AC_OK && dumps) {
        status = explain_passes(m, &p->args, json, text);
    }
    if (status == AC_OK) {
        ac_plan_explain(p->plan, json, text);
        ac_text_printf(text, "%s", json && dumps ? "}\n" : "");
    }
    ac_unlock(&m->lock);
    return status;
}

void
ac_model_get_stats(ac_model *m, ac_model_stats *out)
{
    ac_lock(&m->lock);
    *out = (ac_model_stats){.runs = m->runs, .plans = m->n_plans, .plan_ms = m->plan_ms,
                            .keep_bytes = kept_bytes(m)};
    memcpy(out->unrecorded, m->unrecorded, sizeof out->unrecorded);
    for (int32_t i = 0; i < m->n_plans; i++) {
        const cached_plan *p = m->plans[i];
        out->execs += p->n_execs;
        if (p->plan->arena_bytes >= out->arena_bytes) {
            out->arena_bytes = p->plan->arena_bytes;
            out->bound_bytes = p->plan->bound_bytes;
        }
    }
    ac_unlock(&m->lock);
}
