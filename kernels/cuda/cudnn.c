/* cudnn: see dnn.h.  The backend C API; attribute types must match exactly. */
#include "cudnn_library.h"
#include "tune.h"

#include <stdio.h>
#include <string.h>

enum { CONFIGURATIONS = 24, COMPILED = 1 };

/* ---- problems -------------------------------------------------------------------------------- */

/* A configuration, made a plan when it is first tried. */
typedef struct way {
    ac_dnn_descriptor configuration, plan;
    bool failed, compiled; /* compiled: at run time */
    char name[AC_TUNE_WAY];
} way;

typedef struct problem {
    ac_dnn_key key;
    way *ways; /* the library's, in its order; our own ones follow them in number */
    int32_t count, chosen;
} problem;

struct ac_cuda_dnn {
    cudnnHandle_t handle;
    ac_cuda_known problems;
};

static void
destroy(ac_dnn_descriptor *d)
{
    if (*d) {
        ac_dnn.BackendDestroyDescriptor(*d);
        *d = NULL;
    }
}

/* All ways but `keep`. */
static void
free_ways(problem *p, int32_t keep)
{
    for (int32_t i = 0; i < p->count; i++) {
        if (i != keep) {
            destroy(&p->ways[i].plan);
        }
        destroy(&p->ways[i].configuration);
    }
}

void
ac_cuda_dnn_free(ac_cuda_dnn *d)
{
    if (!d) {
        return;
    }
    for (int32_t i = 0; i < d->problems.count; i++) {
        problem *p = d->problems.at[i].item;
        free_ways(p, -1);
        ac_cuda_host->free(p->ways);
    }
    if (d->handle) {
        ac_dnn.Destroy(d->handle);
    }
    ac_cuda_known_free(&d->problems);
    ac_cuda_host->free(d);
}

static ac_status
refuse(const char *what, cudnnStatus_t status)
{
    char text[200] = "";
    ac_dnn.GetLastErrorString(text, sizeof text);
    text[strcspn(text, "\n")] = '\0';
    if (status == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED) {
        return ac_cuda_no_memory(what);
    }
    bool unsupported = CUDNN_STATUS_CATEGORY(status) != CUDNN_STATUS_EXECUTION_FAILED;
    return ac_cuda_fail(unsupported ? AC_E_UNSUPPORTED : AC_E_DEVICE,
                        "cuda: %s: cuDNN status %d %s", what, (int)status, text);
}

static ac_status
check(cudnnStatus_t status, const char *what)
{
    return status == CUDNN_STATUS_SUCCESS ? AC_OK : refuse(what, status);
}

/* ---- configurations -------------------------------------------------------------------------- */

/* Whether an engine's results are as exact as asked for, and the same in every run. */
static bool
engine_fits(ac_dnn_descriptor engine, const ac_dnn_key *key, bool *compiled)
{
    cudnnBackendNumericalNote_t note[CUDNN_NUMERICAL_NOTE_TYPE_COUNT + 8];
    cudnnBackendBehaviorNote_t behavior[CUDNN_BEHAVIOR_NOTE_TYPE_COUNT + 8];
    int64_t notes = 0, behaviors = 0;
    if (ac_dnn.BackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                                   CUDNN_TYPE_NUMERICAL_NOTE, AC_ARRAY_LEN(note), &notes, note) ||
        ac_dnn.BackendGetAttribute(engine, CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE,
                                   CUDNN_TYPE_BEHAVIOR_NOTE, AC_ARRAY_LEN(behavior), &behaviors,
                                   behavior)) {
        return false;
    }
    bool fits = true, cores = key->dtype != AC_F32 || key->tf32; /* f32 on them is TF32 */
    for (int64_t i = 0; i < notes; i++) {
        fits = fits && (note[i] == CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP ||
                        (note[i] == CUDNN_NUMERICAL_NOTE_TENSOR_CORE && cores));
    }
    *compiled = false;
    for (int64_t i = 0; i < behaviors; i++) {
        *compiled = *compiled || behavior[i] == CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION;
    }
    return fits;
}

/* Engine and its knobs, "e41 9e3779b97f4a7c15". */
static void
name_knobs(ac_dnn_descriptor configuration, int64_t engine, char name[AC_TUNE_WAY])
{
    ac_dnn_descriptor knob[CUDNN_KNOB_TYPE_COUNTS];
    int64_t count = 0;
    uint64_t hash = AC_TUNE_HASH;
    int32_t made = 0;
    while (made < CUDNN_KNOB_TYPE_COUNTS &&
           ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, &knob[made]) ==
               CUDNN_STATUS_SUCCESS) {
        made++;
    }
    if (ac_dnn.BackendGetAttribute(configuration, CUDNN_ATTR_ENGINECFG_KNOB_CHOICES,
                                   CUDNN_TYPE_BACKEND_DESCRIPTOR, made, &count, knob)) {
        count = 0;
    }
    for (int64_t i = 0; i < count; i++) {
        cudnnBackendKnobType_t type = CUDNN_KNOB_TYPE_COUNTS;
        int64_t value = 0, one;
        ac_dnn.BackendGetAttribute(knob[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE,
                                   CUDNN_TYPE_KNOB_TYPE, 1, &one, &type);
        ac_dnn.BackendGetAttribute(knob[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, 1,
                                   &one, &value);
        hash = ac_tune_hash(hash, &type, sizeof type);
        hash = ac_tune_hash(hash, &value, sizeof value);
    }
    for (int32_t i = 0; i < made; i++) {
        destroy(&knob[i]);
    }
    snprintf(name, AC_TUNE_WAY, "e%lld %016llx", (long long)engine, (unsigned long long)hash);
}

/* Takes `configuration` over if it fits. */
static bool
take(problem *p, ac_dnn_descriptor configuration, int32_t *compiled)
{
    ac_dnn_descriptor engine = NULL;
    int64_t one, index = -1;
    bool needs_compiler = false, fits = false;
    if (p->count == CONFIGURATIONS ||
        ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine)) {
        return false;
    }
    if (!ac_dnn.BackendGetAttribute(configuration, CUDNN_ATTR_ENGINECFG_ENGINE,
                                    CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &one, &engine) &&
        !ac_dnn.BackendGetAttribute(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1,
                                    &one, &index)) {
        fits = engine_fits(engine, &p->key, &needs_compiler);
    }
    destroy(&engine);
    /* A convolution's engine 0 is a hundred times slower than ours. */
    fits = fits && (p->key.kind != AC_DNN_CONV || (index != 0 && !needs_compiler)) &&
           (!needs_compiler || *compiled < COMPILED);
    if (fits) {
        *compiled += needs_compiler;
        way *w = &p->ways[p->count++];
        w->configuration = configuration;
        w->compiled = needs_compiler;
        name_knobs(configuration, index, w->name);
    }
    return fits;
}

static cudnnStatus_t
ask(problem *p, ac_dnn_descriptor graph, cudnnBackendHeurMode_t mode, int32_t *compiled)
{
    enum { MOST = 64 };
    ac_dnn_descriptor heuristic = NULL, found[MOST] = {NULL};
    int64_t count = 0;
    cudnnStatus_t status = ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR,
                                                          &heuristic);
    for (int i = 0; !status && i < MOST; i++) {
        status = ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &found[i]);
    }
    status = status ? status
                    : ac_dnn.BackendSetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
                                                 CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph);
    status = status ? status
                    : ac_dnn.BackendSetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_MODE,
                                                 CUDNN_TYPE_HEUR_MODE, 1, &mode);
    status = status ? status : ac_dnn.BackendFinalize(heuristic);
    status = status ? status
                    : ac_dnn.BackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                                 CUDNN_TYPE_BACKEND_DESCRIPTOR, MOST, &count,
                                                 found);
    for (int i = 0; i < MOST; i++) {
        if (!status && i < count && take(p, found[i], compiled)) {
            found[i] = NULL;
        }
        destroy(&found[i]);
    }
    destroy(&heuristic);
    return status;
}

/* The configurations for a problem; none when the library cannot do it. */
static void
list_ways(ac_cuda_dnn *d, problem *p, const ac_dnn_call *call)
{
    ac_dnn_graph g = {.status = CUDNN_STATUS_SUCCESS};
    int32_t compiled = 0;
    call->describe(&g, &p->key);
    ac_dnn_descriptor graph = ac_dnn_begin(&g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    ac_dnn_set(&g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
               g.n_operations, g.operation);
    ac_dnn_set(&g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &d->handle);
    ac_dnn_end(&g, graph, false);
    if (g.status == CUDNN_STATUS_SUCCESS) {
        ask(p, graph, CUDNN_HEUR_MODE_A, &compiled);
        if (p->count == 0) {
            ask(p, graph, CUDNN_HEUR_MODE_FALLBACK, &compiled);
        }
    } else {
        refuse("a graph", g.status);
    }
    for (int32_t i = g.n_made - 1; i >= 0; i--) {
        destroy(&g.made[i]);
    }
}

/* ---- running --------------------------------------------------------------------------------- */

typedef struct trial {
    const ac_dnn_call *call;
    ac_cuda_dnn *dnn;
    problem *problem;
} trial;

static void
key_text(const ac_dnn_key *key, char text[AC_TUNE_KEY])
{
    int used = snprintf(text, AC_TUNE_KEY, "cuDNN %zu %s %s%s", ac_dnn.version,
                        key->kind == AC_DNN_CONV ? "conv" : "attention",
                        ac_dtype_name((ac_dtype)key->dtype), key->tf32 ? " tf32" : "");
    for (size_t i = 0; i < AC_ARRAY_LEN(key->value) && used < AC_TUNE_KEY; i++) {
        used += snprintf(text + used, (size_t)(AC_TUNE_KEY - used), " %lld",
                         (long long)key->value[i]);
    }
}

/* A new plan from `attribute`: a configuration, or the JSON of an earlier one. */
static cudnnStatus_t
new_plan(ac_cuda_dnn *d, cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type,
         int64_t count, const void *values, ac_dnn_descriptor *plan)
{
    cudnnStatus_t status = ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR,
                                                          plan);
    status = status ? status
                    : ac_dnn.BackendSetAttribute(*plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
                                                 CUDNN_TYPE_HANDLE, 1, &d->handle);
    status = status ? status : ac_dnn.BackendSetAttribute(*plan, attribute, type, count, values);
    status = status ? status : ac_dnn.BackendFinalize(*plan);
    if (status) {
        destroy(plan);
    }
    return status;
}

/* Where a compiled plan is kept; false: nowhere. */
static bool
store_title(const trial *t, const way *w, const char **folder, char *title, size_t size)
{
    char text[AC_TUNE_KEY];
    const char *device;
    *folder = w->compiled ? ac_tune_folder(*ac_cuda_libraries_slot(t->call->lane), &device) : NULL;
    if (*folder) {
        key_text(&t->problem->key, text);
        snprintf(title, size, "%s: %s %s", device, text, w->name);
    }
    return *folder != NULL;
}

static void
store_plan(const char *folder, const char *title, ac_dnn_descriptor plan)
{
    int64_t length = 0;
    char *json;
    if (ac_dnn.BackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION,
                                   CUDNN_TYPE_CHAR, 0, &length, NULL) ||
        length <= 0 || ac_cuda_heap((size_t)length, (void **)&json) < 0) {
        return;
    }
    if (!ac_dnn.BackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION,
                                    CUDNN_TYPE_CHAR, length, &length, json)) {
        ac_dnn_store_write(folder, title, json, (size_t)length);
    }
    ac_cuda_host->free(json);
}

static cudnnStatus_t
load_or_make(trial *t, way *w)
{
    const char *folder;
    char title[AC_TUNE_KEY + AC_TUNE_WAY + 80], *json;
    size_t length;
    bool stored = store_title(t, w, &folder, title, sizeof title);
    if (stored && ac_dnn_store_read(folder, title, &json, &length)) {
        cudnnStatus_t status = new_plan(t->dnn, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION,
                                        CUDNN_TYPE_CHAR, (int64_t)length, json, &w->plan);
        ac_cuda_host->free(json);
        if (status == CUDNN_STATUS_SUCCESS) {
            return status;
        }
    }
    cudnnStatus_t status = new_plan(t->dnn, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
                                    CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &w->configuration, &w->plan);
    if (!status && stored) {
        store_plan(folder, title, w->plan);
    }
    return status;
}

static ac_status
make_plan(trial *t, way *w)
{
    int64_t bytes = 0, one;
    cudnnStatus_t status = load_or_make(t, w);
    status = status ? status
                    : ac_dnn.BackendGetAttribute(w->plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                                 CUDNN_TYPE_INT64, 1, &one, &bytes);
    if (!status && bytes > (int64_t)t->call->workspace_bytes) {
        status = CUDNN_STATUS_NOT_SUPPORTED;
    }
    if (status) {
        w->failed = true;
        destroy(&w->plan);
        return refuse("a plan", status);
    }
    return AC_OK;
}

static cudnnStatus_t
execute(const ac_dnn_call *c, ac_cuda_dnn *d, ac_dnn_descriptor plan)
{
    ac_dnn_descriptor pack = NULL;
    cudnnStatus_t status = ac_dnn.BackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR,
                                                          &pack);
    status = status ? status
                    : ac_dnn.BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
                                                 CUDNN_TYPE_INT64, c->n_operands, c->id);
    status = status ? status
                    : ac_dnn.BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
                                                 CUDNN_TYPE_VOID_PTR, c->n_operands, c->address);
    status = status ? status
                    : ac_dnn.BackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                                                 CUDNN_TYPE_VOID_PTR, 1, &c->workspace);
    status = status ? status : ac_dnn.BackendFinalize(pack);
    status = status ? status : ac_dnn.SetStream(d->handle, c->lane->stream);
    status = status ? status : ac_dnn.BackendExecute(d->handle, plan, pack);
    destroy(&pack);
    return status;
}

static ac_status
run_way(void *context, int32_t i)
{
    trial *t = context;
    const ac_dnn_call *c = t->call;
    if (i >= t->problem->count) {
        return c->own[i - t->problem->count].run(c->lane, c->context);
    }
    way *w = &t->problem->ways[i];
    if (w->failed) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "cuda: cuDNN refused this configuration");
    }
    if (!w->plan) {
        AC_TRY(make_plan(t, w));
    }
    AC_TRY(check(execute(c, t->dnn, w->plan), "cudnnBackendExecute"));
    return ac_cuda_launched(c->lane, cudaGetLastError(), "cudnnBackendExecute");
}

static void
name_way(const void *context, int32_t i, char name[AC_TUNE_WAY])
{
    const trial *t = context;
    int32_t own = i - t->problem->count;
    snprintf(name, AC_TUNE_WAY, "%s", own < 0 ? t->problem->ways[i].name : t->call->own[own].name);
}

/* The choice, and the problem done with it once; a choice that fails is followed by the others in
 * their order. */
static ac_status
first_run(trial *t)
{
    problem *p = t->problem;
    const ac_dnn_call *c = t->call;
    char text[AC_TUNE_KEY];
    int32_t all = p->count + c->n_own, best = 0;
    int32_t worth = all > c->n_slow ? all - c->n_slow : all; /* measuring */
    key_text(&p->key, text);
    if (all == 0) {
        return ac_cuda_fail(AC_E_UNSUPPORTED, "cuda: neither cuDNN nor a kernel of ours has %s",
                            text);
    }
    ac_tune_ways ways = {text, worth, t, name_way, run_way};
    ac_status status = ac_tune_choose(c->lane, *ac_cuda_libraries_slot(c->lane), &ways, &best);
    status = status == AC_OK ? run_way(t, best) : status;
    for (int32_t i = 0; status == AC_E_UNSUPPORTED && i < all; i++) {
        best = i;
        status = run_way(t, i);
    }
    AC_TRY(status);
    p->chosen = best;
    free_ways(p, best);
    return AC_OK;
}

static ac_status
find_handle(ac_cuda_libraries *libraries, bool without)
{
    if (!libraries->dnn) {
        AC_TRY(ac_cuda_heap(sizeof *libraries->dnn, (void **)&libraries->dnn));
    }
    return libraries->dnn->handle || without
               ? AC_OK
               : check(ac_dnn.Create(&libraries->dnn->handle), "cudnnCreate");
}

static ac_status
run_new(trial *t, problem *p)
{
    AC_TRY(ac_cuda_heap(sizeof *p->ways * CONFIGURATIONS, (void **)&p->ways));
    if (!t->call->without) {
        list_ways(t->dnn, p, t->call);
    }
    t->problem = p;
    AC_TRY(first_run(t));
    return ac_cuda_known_add(&t->dnn->problems, p, sizeof p->key);
}

static ac_status
new_problem(trial *t)
{
    problem *p;
    AC_TRY(ac_cuda_heap(sizeof *p, (void **)&p));
    p->key = t->call->key;
    p->chosen = -1;
    ac_status status = run_new(t, p);
    if (status < 0) {
        free_ways(p, -1);
        ac_cuda_host->free(p->ways);
        ac_cuda_host->free(p);
    }
    return status;
}

static ac_status
run(const ac_dnn_call *call, ac_cuda_libraries *libraries)
{
    AC_TRY(find_handle(libraries, call->without));
    trial t = {.call = call, .dnn = libraries->dnn};
    t.problem = ac_cuda_known_find(&t.dnn->problems, &call->key, sizeof call->key);
    return t.problem ? run_way(&t, t.problem->chosen) : new_problem(&t);
}

ac_status
ac_dnn_run(const ac_dnn_call *call)
{
    ac_cuda_libraries *libraries;
    int previous;
    AC_TRY(ac_cuda_libraries_enter(call->lane, &libraries, &previous));
    return ac_cuda_libraries_leave(call->lane, previous, run(call, libraries));
}
