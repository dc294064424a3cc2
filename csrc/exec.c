/* exec: binds addresses to a plan's offsets and launches its steps.
 *
 * Addresses are resolved at the start of every run (some 10 ns an operand): the lane, its arena,
 * the weights and the caller's tensors may all be others than last time.  A replayed section needs
 * none of that. */
#include "exec_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static ac_status
init(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    const ac_backend *backend = plan->device->backend;
    const char *graph = getenv("ACCEL_GRAPH"), *sync = getenv("ACCEL_SYNC");
    size_t values = (size_t)AC_MAX(plan->graph->n_values, 1);
    size_t steps = (size_t)AC_MAX(plan->n_steps, 1);
    e->bound = ac_arena_alloc(&e->memory, values * sizeof *e->bound);
    e->edges = ac_arena_alloc(&e->memory, values * sizeof *e->edges);
    e->edge_at = ac_arena_alloc(&e->memory, values * sizeof *e->edge_at);
    e->problems = ac_arena_alloc(&e->memory, steps * sizeof *e->problems);
    if (!e->bound || !e->edges || !e->edge_at || !e->problems) {
        return ac_no_memory(values * sizeof *e->edges);
    }
    AC_TRY(ac_exec_find_edges(e));
    AC_TRY(ac_exec_find_weights(e));
    /* ACCEL_SYNC=1 names the step that fails: there must be steps. */
    e->can_record = backend->record_begin && !(graph && strcmp(graph, "off") == 0) &&
                    !(sync && strcmp(sync, "1") == 0);
    return copy_problems(e);
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

static void
release(ac_exec *e, void **memory)
{
    if (*memory) {
        ac_device_free(e->plan->device, *memory);
        *memory = NULL;
    }
}

/* All that the exec holds on the device.  The next run makes it again. */
static void
release_all(ac_exec *e)
{
    ac_exec_forget_recording(e);
    release(e, &e->keep);
    release(e, &e->slots);
    release(e, &e->extra);
    e->extra_bytes = 0;
    e->ran = false;
}

void
ac_exec_free(ac_exec *e)
{
    if (!e) {
        return;
    }
    release_all(e);
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

static size_t
derived_bytes(const ac_exec *e)
{
    size_t bytes = 0;
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        bytes += e->plan->derived[i].bytes;
    }
    return bytes;
}

/* `message` says what was asked for and what is free. */
static ac_status
out_of_memory(const ac_exec *e, const char *message)
{
    return ac_error(AC_E_MEMORY, "%s; this plan takes %zu bytes for activations, %zu between runs "
                                 "and %zu for derived weights", message, e->plan->arena_bytes,
                    e->plan->keep_bytes + e->slot_bytes, derived_bytes(e));
}

ac_status
ac_exec_memory(ac_exec *e, size_t bytes, void **out)
{
    ac_device *device = e->plan->device;
    if (bytes > e->extra_bytes) {
        release(e, &e->extra);
        e->extra_bytes = 0;
        ac_status status = ac_device_alloc(device, bytes, &e->extra);
        if (status == AC_E_MEMORY) {
            char message[1024];
            snprintf(message, sizeof message, "%s", ac_error_message());
            return out_of_memory(e, message);
        }
        AC_TRY(status);
        e->extra_bytes = bytes;
    }
    *out = e->extra;
    return AC_OK;
}

/* ---- binding --------------------------------------------------------------------------------- */

static ac_status
bind(ac_exec *e, ac_val v, const char *name, const ac_tensor *tensor, bool host)
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
    if (!ac_tensor_is_contiguous(tensor) && !e->edges[v].any_strides) {
        return ac_error(AC_E_INVALID, "%s: found a strided tensor, expected a contiguous one",
                        name);
    }
    if (!tensor->data) {
        return ac_error(AC_E_INVALID, "%s: found no data", name);
    }
    e->edges[v].caller = *tensor;
    e->edges[v].host = host && !ac_exec_on_host(e);
    return AC_OK;
}

ac_status
ac_exec_bind(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_input(e->plan->graph, name), name, tensor, false);
}

ac_status
ac_exec_bind_output(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_output(e->plan->graph, name), name, tensor, false);
}

ac_status
ac_exec_bind_host(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_input(e->plan->graph, name), name, tensor, true);
}

ac_status
ac_exec_bind_output_host(ac_exec *e, const char *name, const ac_tensor *tensor)
{
    return bind(e, ac_graph_find_output(e->plan->graph, name), name, tensor, true);
}

void
ac_exec_unbind(ac_exec *e)
{
    for (int32_t i = 0; i < e->n_edges; i++) {
        e->edges[e->edge_at[i]].caller.data = NULL;
    }
}

static ac_status
check_bound(const ac_exec *e)
{
    const ac_graph *g = e->plan->graph;
    for (int32_t i = 0; i < e->n_edges; i++) {
        ac_val v = e->edge_at[i];
        if (!e->edges[v].caller.data) {
            return ac_error(AC_E_INVALID, "%s: missing",
                            g->values[v].output ? g->values[v].output : g->values[v].name);
        }
    }
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

/* Strides that the plan could not know: a caller's, and those of a weight in [o, h, w, i] order. */
static bool
has_own_strides(const ac_exec *e, const ac_tensor *operand, ac_ref ref)
{
    return (ref.space == AC_SPACE_INPUT && e->edges[ref.index].any_strides) ||
           (ref.space == AC_SPACE_WEIGHT && operand->shape.rank == 4 &&
            e->bound[ref.index].shape.rank == 4 &&
            ac_shape_equal(&operand->shape, &e->bound[ref.index].shape));
}

void
ac_exec_resolve(ac_exec *e, const ac_device_lane *lane, int32_t s)
{
    const ac_step *step = &e->plan->steps[s];
    ac_problem *problem = &e->problems[s];
    for (int32_t k = 0; k < problem->n_inputs; k++) {
        ac_ref ref = step->input[k];
        problem->input[k].data = address(e, lane, ref);
        if (has_own_strides(e, &problem->input[k], ref)) {
            memcpy(problem->input[k].stride, e->bound[ref.index].stride,
                   sizeof problem->input[k].stride);
        }
    }
    problem->output.data = address(e, lane, step->output);
}

static const void *
prepared_of(const ac_exec *e, const ac_step *step)
{
    return step->prepared == AC_NONE ? NULL : e->derived[step->prepared]->data;
}

/* `status` of a launch, and whose it was. */
static ac_status
launched(const ac_exec *e, const ac_step *step, const char *kernel, ac_status status)
{
    return status < 0 ? ac_error_prefix(status, "%s (%s)", e->plan->graph->nodes[step->node].name,
                                        kernel)
                      : AC_OK;
}

ac_status
ac_exec_launch(ac_exec *e, ac_device_lane *lane, int32_t s)
{
    const ac_step *step = &e->plan->steps[s];
    void *scratch = step->scratch ? (char *)lane->arena + step->scratch_offset : NULL;
    return launched(e, step, step->kernel->name,
                    step->kernel->launch(lane->lane, &e->problems[s], scratch,
                                         prepared_of(e, step)));
}

static ac_status
launch_steps(ac_exec *e, ac_device_lane *lane, int32_t first, int32_t end)
{
    for (int32_t s = first; s < end; s++) {
        ac_exec_resolve(e, lane, s);
        AC_TRY(ac_exec_launch(e, lane, s));
    }
    return AC_OK;
}

/* The convolution is the last step but one, so that nothing else reads its result. */
static int32_t
tail_step(const ac_plan *plan)
{
    int32_t s = plan->n_steps - 2;
    if (s < plan->first[AC_RATE_STEP] || plan->steps[s].problem.op != AC_OP_CONV2D) {
        return AC_NONE;
    }
    const ac_step *conv = &plan->steps[s], *last = conv + 1;
    bool reads = last->input[0].space == conv->output.space &&
                 last->input[0].index == conv->output.index &&
                 last->input[0].offset == conv->output.offset;
    return last->problem.op == AC_OP_TO_NCHW && last->output.space == AC_SPACE_OUTPUT && reads
               ? s : AC_NONE;
}

bool
ac_exec_has_tail(const ac_exec *e, const ac_sampler_job *job)
{
    const ac_device *device = e->plan->device;
    int32_t s = tail_step(e->plan);
    return s != AC_NONE && device->backend->tail_fits &&
           device->backend->tail_fits(&device->caps, &e->plan->steps[s].problem, job);
}

ac_status
ac_exec_launch_tail(ac_exec *e, ac_device_lane *lane, const ac_sampler_job *job)
{
    const ac_device *device = e->plan->device;
    int32_t s = tail_step(e->plan);
    const ac_step *step = &e->plan->steps[s];
    ac_exec_resolve(e, lane, s);
    return launched(e, step, "tail",
                    device->backend->tail(device->self, lane->lane, &e->problems[s],
                                          prepared_of(e, step), job));
}

ac_status
ac_exec_launch_step(ac_exec *e, ac_device_lane *lane, const ac_run *run)
{
    int32_t end = run->tail ? tail_step(e->plan) : e->plan->n_steps;
    if (run->before) {
        AC_TRY(run->before(run->arg, lane));
    }
    AC_TRY(launch_steps(e, lane, e->plan->first[AC_RATE_STEP], end));
    if (run->tail) {
        AC_TRY(ac_exec_launch_tail(e, lane, run->tail));
    }
    return run->after ? run->after(run->arg, lane) : AC_OK;
}

/* ---- run ------------------------------------------------------------------------------------- */

static ac_status
run_on(ac_exec *e, ac_device_lane *lane, const ac_run *run)
{
    const ac_plan *plan = e->plan;
    ac_device *device = plan->device;
    AC_TRY(ac_device_lane_reserve(device, lane, plan->arena_bytes, plan->worker_scratch));
    if (plan->keep_bytes && !e->keep) {
        AC_TRY(ac_device_alloc(device, plan->keep_bytes, &e->keep));
    }
    AC_TRY(ac_exec_place_edges(e, run));
    AC_TRY(ac_exec_derive(e, lane)); /* last: its own failure frees what it made */
    ac_rate start = e->ran ? AC_MAX(run->from, AC_RATE_PROMPT) : AC_RATE_PROMPT;
    e->ran = false;
    AC_TRY(ac_exec_copy_in(e, lane, start));
    if (start < AC_RATE_STEP) {
        AC_TRY(launch_steps(e, lane, plan->first[start], plan->first[AC_RATE_STEP]));
    }
    AC_TRY(ac_exec_step(e, lane, run));
    AC_TRY(ac_exec_copy_out(e, lane));
    e->ran = true;
    return AC_OK;
}

/* The run's place among other work: after the exec's last run, in the order of the stream. */
static ac_status
enter_lane(ac_exec *e, ac_device_lane *lane, ac_stream stream)
{
    const ac_device *device = e->plan->device;
    if (device->backend->lane_follow) {
        AC_TRY(device->backend->lane_follow(device->self, lane->lane, stream));
        if (e->lane && e->lane != lane) {
            AC_TRY(device->backend->lane_wait(device->self, lane->lane, e->lane->lane));
        }
    }
    e->lane = lane; /* a failure leaves the last run's */
    return AC_OK;
}

/* What is queued may still use the caller's tensors, and memory that goes now. */
static ac_status
leave_failed(ac_exec *e, ac_device_lane *lane, ac_status status)
{
    ac_device *device = e->plan->device;
    char message[1024];
    snprintf(message, sizeof message, "%s", ac_error_message());
    if (!ac_exec_on_host(e)) {
        device->backend->sync(device->self, lane->lane);
    }
    if (status == AC_E_DEVICE && device->backend->failed) {
        device->backend->failed(device->self, message);
    }
    if (status == AC_E_MEMORY) {
        release_all(e);
        ac_device_lane_shrink(device, lane);
        return out_of_memory(e, message);
    }
    return ac_error(status, "%s", message);
}

static ac_status
leave(ac_exec *e, ac_device_lane *lane, const ac_run *run)
{
    const ac_device *device = e->plan->device;
    if (device->backend->lane_mark) {
        AC_TRY(device->backend->lane_mark(device->self, lane->lane));
    }
    if (run->done) {
        AC_TRY(device->backend->event_record(device->self, lane->lane, run->done));
    }
    bool wait = !run->queue && (!run->stream.given || ac_exec_has_host_output(e));
    return wait && !ac_exec_on_host(e) ? device->backend->sync(device->self, lane->lane) : AC_OK;
}

ac_status
ac_exec_run_with(ac_exec *e, const ac_run *run)
{
    ac_device *device = e->plan->device;
    ac_device_lane *lane;
    AC_TRY(check_bound(e));
    AC_TRY(ac_device_lane_take(device, e->lane, &lane));
    ac_status status = enter_lane(e, lane, run->stream); /* a failure leaves nothing queued */
    if (status == AC_OK) {
        status = run_on(e, lane, run);
        status = status < 0 ? leave_failed(e, lane, status) : leave(e, lane, run);
    }
    ac_device_lane_give(device, lane);
    if (status < 0) {
        e->prompt = 0;
    }
    return status;
}

static ac_status
visit_lane(ac_exec *e, ac_device_lane *lane, ac_stream stream, bool wait, ac_exec_fn fn, void *arg)
{
    const ac_device *device = e->plan->device;
    AC_TRY(enter_lane(e, lane, stream));
    AC_TRY(fn(arg, lane));
    if (device->backend->lane_mark) {
        AC_TRY(device->backend->lane_mark(device->self, lane->lane));
    }
    return wait ? device->backend->sync(device->self, lane->lane) : AC_OK;
}

ac_status
ac_exec_visit(ac_exec *e, ac_stream stream, bool wait, ac_exec_fn fn, void *arg)
{
    ac_device *device = e->plan->device;
    ac_device_lane *lane;
    AC_TRY(ac_device_lane_take(device, e->lane, &lane));
    ac_status status = visit_lane(e, lane, stream, wait, fn, arg);
    ac_device_lane_give(device, lane);
    return status;
}

ac_status
ac_exec_run_on(ac_exec *e, ac_rate from, ac_stream stream)
{
    return ac_exec_run_with(e, &(ac_run){.from = from, .stream = stream});
}

ac_status
ac_exec_run(ac_exec *e, ac_rate from)
{
    return ac_exec_run_with(e, &(ac_run){.from = from});
}
