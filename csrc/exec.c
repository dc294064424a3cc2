/* exec: binds addresses to a plan's offsets and launches its steps.
 *
 * Addresses are resolved at the start of every run (some 10 ns an operand): the lane, its arena,
 * the weights and the caller's tensors may all be others than last time. */
#include "exec.h"

#include <string.h>

struct ac_exec {
    const ac_plan *plan;
    ac_weights *weights;
    ac_device_lane *lane;    /* of the last run: preferred in the next, for warm caches */
    void *keep;              /* plan->keep_bytes of device memory */
    ac_tensor *bound;        /* one a graph value: the caller's inputs and outputs, weights */
    bool *strided_ok;        /* one a graph value: an input whose readers take any strides */
    ac_derived **derived;    /* plan->n_derived, owned by the weights */
    ac_problem *problems;    /* plan->n_steps, with tensors of their own */
    uint8_t *needed;         /* one a LOAD step: must run to derive */
    uint64_t generation;     /* of the weights when `bound` was filled */
    bool weights_bound;
    bool ran;                /* slow sections hold results */
    uint64_t prompt;
    ac_arena memory;         /* of the arrays above */
};

/* ---- life ------------------------------------------------------------------------------------ */

static ac_status
copy_problems(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    for (int32_t s = 0; s < plan->n_steps; s++) {
        size_t bytes = (size_t)plan->steps[s].problem.n_inputs * sizeof(ac_tensor);
        ac_tensor *input = ac_arena_alloc(&e->memory, bytes);
        if (!input) {
            return ac_no_memory(bytes);
        }
        e->problems[s] = plan->steps[s].problem;
        if (bytes) {
            memcpy(input, plan->steps[s].problem.input, bytes);
        }
        e->problems[s].input = input;
    }
    return AC_OK;
}

/* An input with gaps may be read only by kernels that take any strides. */
static void
find_strided(ac_exec *e)
{
    const ac_graph *g = e->plan->graph;
    for (ac_val v = 0; v < g->n_values; v++) {
        e->strided_ok[v] = g->values[v].kind == AC_VALUE_INPUT;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        for (int32_t k = 0; k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE && node->op != AC_OP_TO_NHWC) {
                e->strided_ok[node->input[k]] = false;
            }
        }
    }
}

static ac_status
init(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    size_t values = (size_t)AC_MAX(plan->graph->n_values, 1);
    size_t steps = (size_t)AC_MAX(plan->n_steps, 1);
    e->bound = ac_arena_alloc(&e->memory, values * sizeof *e->bound);
    e->strided_ok = ac_arena_alloc(&e->memory, values * sizeof *e->strided_ok);
    e->derived = ac_arena_alloc(&e->memory, (size_t)AC_MAX(plan->n_derived, 1) *
                                                sizeof *e->derived);
    e->problems = ac_arena_alloc(&e->memory, steps * sizeof *e->problems);
    e->needed = ac_arena_alloc(&e->memory, steps);
    if (!e->bound || !e->strided_ok || !e->derived || !e->problems || !e->needed) {
        return ac_no_memory(values * sizeof *e->bound);
    }
    find_strided(e);
    AC_TRY(copy_problems(e));
    if (plan->keep_bytes) {
        ac_device *device = plan->device;
        AC_TRY(device->backend->alloc(device->self, plan->keep_bytes, &e->keep));
    }
    return AC_OK;
}

ac_status
ac_exec_new(const ac_plan *plan, ac_weights *weights, ac_exec **out)
{
    ac_exec *e = ac_calloc(1, sizeof *e);
    if (!e) {
        return ac_no_memory(sizeof *e);
    }
    ac_arena_init(&e->memory);
    e->plan = plan;
    e->weights = weights ? ac_weights_ref(weights) : NULL;
    ac_status status = init(e);
    if (status < 0) {
        ac_exec_free(e);
        return status;
    }
    *out = e;
    return AC_OK;
}

void
ac_exec_free(ac_exec *e)
{
    if (!e) {
        return;
    }
    if (e->keep) {
        e->plan->device->backend->free(e->plan->device->self, e->keep);
    }
    ac_weights_unref(e->weights);
    ac_arena_deinit(&e->memory);
    ac_free(e);
}

uint64_t
ac_exec_prompt(const ac_exec *e)
{
    return e->prompt;
}

void
ac_exec_set_prompt(ac_exec *e, uint64_t token)
{
    e->prompt = token;
}

/* ---- binding --------------------------------------------------------------------------------- */

static ac_status
bind(ac_exec *e, ac_val v, const char *name, const ac_tensor *tensor)
{
    const ac_graph *g = e->plan->graph;
    if (v == AC_NONE) {
        return ac_error(AC_E_INVALID, "%.128s: this model has no such input or output", name);
    }
    const ac_value *value = &g->values[v];
    if (tensor->dtype != value->dtype) {
        return ac_error(AC_E_DTYPE, "%s: found %s, expected %s", name,
                        ac_dtype_name(tensor->dtype), ac_dtype_name(value->dtype));
    }
    if (!ac_shape_equal(&tensor->shape, &value->shape)) {
        char found[AC_SHAPE_TEXT], expected[AC_SHAPE_TEXT];
        return ac_error(AC_E_SHAPE, "%s: found %s, expected %s", name,
                        ac_shape_text(&tensor->shape, found),
                        ac_shape_text(&value->shape, expected));
    }
    if (!ac_tensor_is_contiguous(tensor) && !e->strided_ok[v]) {
        return ac_error(AC_E_INVALID, "%s: found a strided tensor, expected a contiguous one",
                        name);
    }
    if (!tensor->data) {
        return ac_error(AC_E_INVALID, "%s: found no data", name);
    }
    e->bound[v] = *tensor;
    return AC_OK;
}

ac_status
ac_exec_bind(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_input(e->plan->graph, name), name, tensor);
}

ac_status
ac_exec_bind_output(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_output(e->plan->graph, name), name, tensor);
}

void
ac_exec_unbind(ac_exec *e)
{
    const ac_graph *g = e->plan->graph;
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].kind == AC_VALUE_INPUT || g->values[v].output) {
            e->bound[v].data = NULL;
        }
    }
}

static ac_status
bind_weight(ac_exec *e, ac_val v)
{
    const ac_value *value = &e->plan->graph->values[v];
    const ac_tensor *source = e->weights ? ac_weights_find(e->weights, value->name) : NULL;
    if (!source) {
        return ac_error(AC_E_WEIGHTS, "%s: missing", value->name);
    }
    if (source->dtype != value->dtype || ac_tensor_count(source) != ac_shape_count(&value->shape)) {
        return ac_error(AC_E_INTERNAL, "%s: its dtype or shape changed under a plan", value->name);
    }
    e->bound[v] = ac_tensor_of(source->data, source->dtype, value->shape);
    return AC_OK;
}

/* A source that was re-bound with another dtype may want another size than last time. */
static ac_status
derived_memory(ac_device *device, ac_derived *d, size_t bytes)
{
    if (d->data && d->bytes != bytes) {
        device->backend->free(device->self, d->data);
        d->data = NULL;
    }
    if (!d->data) {
        d->valid = false;
        d->bytes = 0;
        AC_TRY(device->backend->alloc(device->self, bytes, &d->data));
        d->bytes = bytes;
    }
    return AC_OK;
}

/* A weight on the host, for a device that cannot read there: its copy is a derived weight. */
static ac_status
upload_weight(ac_exec *e, ac_device_lane *lane, ac_val v)
{
    ac_device *device = e->plan->device;
    const char *name = e->plan->graph->values[v].name;
    ac_derived *copy;
    ac_text text = {0};
    ac_text_printf(&text, "upload(%s)", name);
    char *made = ac_text_take(&text);
    if (!made) {
        return ac_no_memory(text.length);
    }
    ac_status status = ac_weights_derived(e->weights, made, &name, 1, &copy);
    ac_free(made);
    AC_TRY(status);
    AC_TRY(derived_memory(device, copy, ac_tensor_bytes(&e->bound[v])));
    if (!copy->valid) {
        copy->checksum = ac_weights_checksum(e->weights, &name, 1);
        AC_TRY(device->backend->upload(device->self, lane->lane, copy->data, e->bound[v].data,
                                       copy->bytes));
        AC_TRY(device->backend->sync(device->self, lane->lane)); /* other lanes read it too */
        copy->valid = true;
    }
    e->bound[v].data = copy->data;
    return AC_OK;
}

static ac_status
bind_weights(ac_exec *e, ac_device_lane *lane)
{
    const ac_graph *g = e->plan->graph;
    bool upload = !e->plan->device->backend->host_memory;
    uint64_t generation = e->weights ? ac_weights_generation(e->weights) : 0;
    if (e->weights_bound && generation == e->generation && !upload) {
        return AC_OK;
    }
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].kind == AC_VALUE_WEIGHT) {
            AC_TRY(bind_weight(e, v));
            if (upload) {
                AC_TRY(upload_weight(e, lane, v));
            }
        }
    }
    if (!e->weights_bound || generation != e->generation) {
        e->ran = false;
    }
    e->weights_bound = true;
    e->generation = generation;
    return AC_OK;
}

/* ---- addresses ------------------------------------------------------------------------------- */

static void *
address(const ac_exec *e, const ac_device_lane *lane, ac_ref ref)
{
    char *base = NULL;
    switch (ref.space) {
    case AC_SPACE_INPUT:
    case AC_SPACE_OUTPUT:
    case AC_SPACE_WEIGHT:
        base = e->bound[ref.index].data;
        break;
    case AC_SPACE_DERIVED:
        base = e->derived[ref.index] ? e->derived[ref.index]->data : NULL;
        break;
    case AC_SPACE_ARENA:
        base = lane->arena;
        break;
    case AC_SPACE_KEEP:
        base = e->keep;
        break;
    case AC_SPACE_NONE:
        break;
    }
    return base ? base + ref.offset : NULL;
}

static void
resolve(ac_exec *e, const ac_device_lane *lane, int32_t s)
{
    const ac_step *step = &e->plan->steps[s];
    ac_problem *problem = &e->problems[s];
    for (int32_t k = 0; k < problem->n_inputs; k++) {
        ac_ref ref = step->input[k];
        problem->input[k].data = address(e, lane, ref);
        if (ref.space == AC_SPACE_INPUT && e->strided_ok[ref.index]) {
            memcpy(problem->input[k].stride, e->bound[ref.index].stride,
                   sizeof problem->input[k].stride);
        }
    }
    problem->output.data = address(e, lane, step->output);
}

static ac_status
launch(ac_exec *e, ac_device_lane *lane, int32_t s)
{
    const ac_step *step = &e->plan->steps[s];
    void *scratch = step->scratch ? (char *)lane->arena + step->scratch_offset : NULL;
    const void *prepared = step->prepared == AC_NONE ? NULL : e->derived[step->prepared]->data;
    ac_status status = step->kernel->launch(lane->lane, &e->problems[s], scratch, prepared);
    if (status < 0) {
        const ac_node *node = &e->plan->graph->nodes[step->node];
        return ac_error_prefix(status, "%s (%s)", node->name, step->kernel->name);
    }
    return AC_OK;
}

/* ---- derived weights ------------------------------------------------------------------------- */

/* Marks the LOAD steps to run: those whose results are missing, and what they come from, up to
 * weights and to derived values that are there. */
static void
mark_needed(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    const ac_graph *g = plan->graph;
    memset(e->needed, 0, (size_t)AC_MAX(plan->n_steps, 1));
    for (int32_t i = 0; i < plan->n_derived; i++) {
        if (!e->derived[i]->valid && !plan->derived[i].prepare) {
            e->needed[plan->step_of[g->values[plan->derived[i].value].node]] = 1;
        }
    }
    for (int32_t s = plan->first[AC_RATE_PROMPT] - 1; s >= 0; s--) {
        const ac_step *step = &plan->steps[s];
        for (int32_t k = 0; e->needed[s] && k < step->problem.n_inputs; k++) {
            if (step->input[k].space != AC_SPACE_ARENA) {
                continue; /* a weight, or derived by itself */
            }
            const ac_node *from = ac_producer(g, g->nodes[step->node].input[k]);
            while (ac_op_is_view(from->op)) {
                from = ac_producer(g, from->input[0]);
            }
            e->needed[plan->step_of[from - g->nodes]] = 1;
        }
    }
}

static ac_status
allocate_derived(ac_exec *e, int32_t i)
{
    const ac_plan_derived *want = &e->plan->derived[i];
    ac_device *device = e->plan->device;
    if (!e->derived[i]) {
        AC_TRY(ac_weights_derived(e->weights, want->key, want->source, want->n_sources,
                                  &e->derived[i]));
    }
    return derived_memory(device, e->derived[i], want->bytes);
}

static ac_status
prepare_weight(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    const ac_step *step = e->plan->derived[i].prepare;
    int32_t s = (int32_t)(step - e->plan->steps);
    resolve(e, lane, s);
    return step->kernel->prepare(lane->lane, &e->problems[s], e->derived[i]->data);
}

/* Before the sources are read: what changes while they are shows at the next check. */
static void
take_checksums(ac_exec *e)
{
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        ac_derived *d = e->derived[i];
        if (!d->valid) {
            d->checksum = ac_weights_checksum(e->weights, d->source, d->n_sources);
        }
    }
}

static ac_status
derive_locked(ac_exec *e, ac_device_lane *lane)
{
    const ac_plan *plan = e->plan;
    bool all_valid = true;
    for (int32_t i = 0; i < plan->n_derived; i++) {
        AC_TRY(allocate_derived(e, i));
        all_valid = all_valid && e->derived[i]->valid;
    }
    if (all_valid) {
        return AC_OK;
    }
    mark_needed(e);
    take_checksums(e);
    for (int32_t s = plan->first[AC_RATE_LOAD]; s < plan->first[AC_RATE_PROMPT]; s++) {
        if (e->needed[s]) {
            resolve(e, lane, s);
            AC_TRY(launch(e, lane, s));
        }
    }
    for (int32_t i = 0; i < plan->n_derived; i++) {
        ac_derived *d = e->derived[i];
        if (d->valid) {
            continue;
        }
        if (plan->derived[i].prepare) {
            AC_TRY(prepare_weight(e, lane, i));
        }
        d->valid = true;
    }
    e->ran = false;
    /* Other lanes take what is valid without waiting for this one. */
    return plan->device->backend->sync(plan->device->self, lane->lane);
}

static ac_status
derive(ac_exec *e, ac_device_lane *lane)
{
    if (!e->weights) {
        return bind_weights(e, lane);
    }
    ac_weights_make_begin(e->weights);
    ac_status status = bind_weights(e, lane);
    if (status == AC_OK) {
        status = derive_locked(e, lane);
    }
    ac_weights_make_end(e->weights);
    return status;
}

/* ---- run ------------------------------------------------------------------------------------- */

static ac_status
check_bound(const ac_exec *e)
{
    const ac_graph *g = e->plan->graph;
    for (ac_val v = 0; v < g->n_values; v++) {
        bool edge = g->values[v].kind == AC_VALUE_INPUT || g->values[v].output;
        if (edge && !e->bound[v].data) {
            return ac_error(AC_E_INVALID, "%s: missing",
                            g->values[v].output ? g->values[v].output : g->values[v].name);
        }
    }
    return AC_OK;
}

static ac_status
run_on(ac_exec *e, ac_device_lane *lane, ac_rate from)
{
    const ac_plan *plan = e->plan;
    AC_TRY(ac_device_lane_reserve(plan->device, lane, plan->arena_bytes, plan->worker_scratch));
    AC_TRY(derive(e, lane));
    ac_rate start = e->ran ? AC_MAX(from, AC_RATE_PROMPT) : AC_RATE_PROMPT;
    e->ran = false;
    for (int32_t s = plan->first[start]; s < plan->n_steps; s++) {
        resolve(e, lane, s);
        AC_TRY(launch(e, lane, s));
    }
    e->ran = true;
    return AC_OK;
}

ac_status
ac_exec_run(ac_exec *e, ac_rate from)
{
    ac_device *device = e->plan->device;
    ac_device_lane *lane;
    AC_TRY(check_bound(e));
    AC_TRY(ac_device_lane_take(device, e->lane, &lane));
    e->lane = lane;
    ac_status status = run_on(e, lane, from);
    ac_device_lane_give(device, lane);
    if (status < 0) {
        e->prompt = 0;
    }
    return status;
}
