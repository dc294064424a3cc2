/* exec_weights: where a run finds weights, and the making of derived ones.
 *
 * A weight that lies where the device reads it is used there.  Another one is copied to the device:
 * for good when steps beyond LOAD read it (the copy is a derived weight, shared by all plans), else
 * only while something is derived from it.  A kernel's prepared form stands for the weight it was
 * made of.  Who derives holds the weights' make lock: one at a time. */
#include "exec_internal.h"

#include <string.h>

#define ALIGN ((size_t)256)

/* ---- what is read by whom -------------------------------------------------------------------- */

/* The step's kernel reads this operand only to prepare it. */
static bool
only_prepares(const ac_step *step, int32_t k)
{
    return step->prepared != AC_NONE && k == AC_LINEAR_W;
}

ac_status
ac_exec_find_weights(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    size_t values = (size_t)AC_MAX(plan->graph->n_values, 1);
    size_t derived = (size_t)AC_MAX(plan->n_derived, 1);
    e->derived = ac_arena_alloc(&e->memory, derived * sizeof *e->derived);
    e->copies = ac_arena_alloc(&e->memory, values * sizeof *e->copies);
    e->on_host = ac_arena_alloc(&e->memory, values * sizeof *e->on_host);
    e->resident = ac_arena_alloc(&e->memory, values * sizeof *e->resident);
    e->passing = ac_arena_alloc(&e->memory, derived * sizeof *e->passing);
    e->fresh = ac_arena_alloc(&e->memory, (derived + values) * sizeof *e->fresh);
    e->needed = ac_arena_alloc(&e->memory, (size_t)AC_MAX(plan->n_steps, 1));
    if (!e->derived || !e->copies || !e->on_host || !e->resident || !e->passing || !e->fresh ||
        !e->needed) {
        return ac_no_memory(values * sizeof *e->copies);
    }
    for (int32_t i = 0; i < plan->n_derived; i++) {
        e->passing[i] = !plan->derived[i].prepare && !ac_exec_on_host(e);
    }
    for (int32_t s = plan->first[AC_RATE_PROMPT]; s < plan->n_steps; s++) {
        const ac_step *step = &plan->steps[s];
        for (int32_t k = 0; k < step->problem.n_inputs; k++) {
            if (only_prepares(step, k)) {
                continue;
            }
            if (step->input[k].space == AC_SPACE_WEIGHT) {
                e->resident[step->input[k].index] = true;
            } else if (step->input[k].space == AC_SPACE_DERIVED) {
                e->passing[step->input[k].index] = false;
            }
        }
    }
    return AC_OK;
}

/* ---- memory of derived weights --------------------------------------------------------------- */

static void
release_derived(ac_exec *e, ac_derived *d)
{
    if (d->data && !d->borrowed) {
        ac_device_free(e->plan->device, d->data);
    }
    d->data = NULL;
    d->bytes = 0;
    d->valid = d->borrowed = false;
}

/* A source that was re-bound with another dtype may want another size than last time. */
static ac_status
derived_memory(ac_exec *e, ac_derived *d, size_t bytes, bool *fresh)
{
    ac_device *device = e->plan->device;
    if (d->data && (d->bytes != bytes || d->borrowed)) {
        release_derived(e, d);
    }
    if (!d->data) {
        d->valid = false;
        AC_TRY(ac_device_alloc(device, bytes, &d->data));
        d->bytes = bytes;
        *fresh = true;
    }
    return AC_OK;
}

/* What this call allocated goes again; nobody else has seen it: the make lock is held. */
static void
release_fresh(ac_exec *e)
{
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        if (e->fresh[i] && e->derived[i]) {
            release_derived(e, e->derived[i]);
        }
    }
    bool *fresh = e->fresh + AC_MAX(e->plan->n_derived, 1);
    for (ac_val v = 0; v < e->plan->graph->n_values; v++) {
        if (fresh[v] && e->copies[v]) {
            release_derived(e, e->copies[v]);
        }
    }
    e->weights_bound = false;
}

/* ---- weights as they are --------------------------------------------------------------------- */

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
    if (ac_shape_equal(&source->shape, &value->shape)) {
        memcpy(e->bound[v].stride, source->stride, sizeof source->stride);
    }
    e->on_host[v] = !ac_exec_on_host(e) && !ac_weights_on_device(e->weights, value->name);
    return AC_OK;
}

static ac_status
find_copy(ac_exec *e, ac_val v)
{
    const char *name = e->plan->graph->values[v].name;
    ac_text text = {0};
    ac_text_printf(&text, "upload(%s)", name);
    char *made = ac_text_take(&text);
    if (!made) {
        return ac_no_memory(text.length);
    }
    ac_status status = ac_weights_derived(e->weights, made, &name, 1, &e->copies[v]);
    ac_free(made);
    return status;
}

/* Weights that the device cannot read and steps need. */
static ac_status
upload_weight(ac_exec *e, ac_device_lane *lane, ac_val v, bool *any)
{
    ac_device *device = e->plan->device;
    const char *name = e->plan->graph->values[v].name;
    if (!e->copies[v]) {
        AC_TRY(find_copy(e, v));
    }
    ac_derived *copy = e->copies[v];
    AC_TRY(derived_memory(e, copy, ac_tensor_bytes(&e->bound[v]),
                          &e->fresh[AC_MAX(e->plan->n_derived, 1) + v]));
    if (!copy->valid) {
        copy->checksum = ac_weights_checksum(e->weights, &name, 1);
        AC_TRY(device->backend->upload(device->self, lane->lane, copy->data, e->bound[v].data,
                                       copy->bytes));
        copy->valid = *any = true;
    }
    e->bound[v].data = copy->data;
    return AC_OK;
}

static ac_status
bind_weights(ac_exec *e, ac_device_lane *lane, bool *any)
{
    const ac_graph *g = e->plan->graph;
    uint64_t generation = e->weights ? ac_weights_generation(e->weights) : 0;
    if (e->weights_bound && generation == e->generation) {
        return AC_OK;
    }
    e->weights_bound = false;
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].kind == AC_VALUE_WEIGHT) {
            AC_TRY(bind_weight(e, v));
            if (e->on_host[v] && e->resident[v]) {
                AC_TRY(upload_weight(e, lane, v, any));
            }
        }
    }
    e->ran = false;
    e->weights_bound = true;
    e->generation = generation;
    return AC_OK;
}

/* ---- sources that are on the device only while something is derived -------------------------- */

static bool
is_staged(const ac_exec *e, ac_val v)
{
    return e->on_host[v] && !e->resident[v];
}

static ac_val
source_value(const ac_exec *e, const char *name)
{
    return (ac_val)ac_map_get(&e->plan->graph->weights, name);
}

static size_t
staged_bytes(const ac_exec *e, int32_t i)
{
    const ac_plan_derived *want = &e->plan->derived[i];
    size_t bytes = 0;
    for (int32_t k = 0; k < want->n_sources; k++) {
        ac_val v = source_value(e, want->source[k]);
        if (v >= 0 && is_staged(e, v)) {
            bytes += ac_align_up(ac_tensor_bytes(&e->bound[v]), ALIGN);
        }
    }
    return bytes;
}

/* Room for the largest group of sources; groups follow each other in the lane. */
static ac_status
allocate_staging(ac_exec *e)
{
    ac_device *device = e->plan->device;
    size_t most = 0;
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        most = AC_MAX(most, e->derived[i]->valid ? 0 : staged_bytes(e, i));
    }
    return most ? ac_device_alloc(device, most, &e->staging) : AC_OK;
}

static ac_status
stage(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    const ac_device *device = e->plan->device;
    const ac_plan_derived *want = &e->plan->derived[i];
    char *to = e->staging;
    for (int32_t k = 0; k < want->n_sources; k++) {
        ac_val v = source_value(e, want->source[k]);
        if (v < 0 || !is_staged(e, v)) {
            continue;
        }
        const ac_tensor *source = ac_weights_find(e->weights, want->source[k]);
        size_t bytes = ac_tensor_bytes(&e->bound[v]);
        AC_TRY(device->backend->upload(device->self, lane->lane, to, source->data, bytes));
        e->bound[v].data = to;
        to += ac_align_up(bytes, ALIGN);
    }
    return AC_OK;
}

/* ---- derived weights ------------------------------------------------------------------------- */

/* Marks the LOAD steps that make derived value i, up to weights and to other derived values. */
static void
mark_needed(ac_exec *e, int32_t i)
{
    const ac_plan *plan = e->plan;
    const ac_graph *g = plan->graph;
    memset(e->needed, 0, (size_t)AC_MAX(plan->n_steps, 1));
    e->needed[plan->step_of[g->values[plan->derived[i].value].node]] = 1;
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

static ac_status make(ac_exec *e, ac_device_lane *lane, int32_t i);

/* Derived values that the marked steps read. */
static ac_status
make_operands(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    const ac_plan *plan = e->plan;
    for (int32_t s = 0; s < plan->first[AC_RATE_PROMPT]; s++) {
        const ac_step *step = &plan->steps[s];
        for (int32_t k = 0; e->needed[s] && k < step->problem.n_inputs; k++) {
            ac_ref ref = step->input[k];
            if (ref.space == AC_SPACE_DERIVED && !e->derived[ref.index]->valid) {
                AC_TRY(make(e, lane, ref.index));
                mark_needed(e, i);
            }
        }
    }
    return AC_OK;
}

static ac_status
make_value(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    mark_needed(e, i);
    AC_TRY(make_operands(e, lane, i));
    AC_TRY(derived_memory(e, e->derived[i], e->plan->derived[i].bytes, &e->fresh[i]));
    AC_TRY(stage(e, lane, i));
    for (int32_t s = 0; s < e->plan->first[AC_RATE_PROMPT]; s++) {
        if (e->needed[s]) {
            ac_exec_resolve(e, lane, s);
            AC_TRY(ac_exec_launch(e, lane, s));
        }
    }
    return AC_OK;
}

/* The value it is prepared from may have no other reader: then it goes at once. */
static ac_status
make_prepared(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    const ac_step *step = e->plan->derived[i].prepare;
    ac_device *device = e->plan->device;
    ac_ref from = step->input[AC_LINEAR_W];
    int32_t s = (int32_t)(step - e->plan->steps);
    if (from.space == AC_SPACE_DERIVED && !e->derived[from.index]->valid) {
        AC_TRY(make(e, lane, from.index));
    }
    AC_TRY(derived_memory(e, e->derived[i], e->plan->derived[i].bytes, &e->fresh[i]));
    if (from.space == AC_SPACE_WEIGHT) {
        AC_TRY(stage(e, lane, i));
    }
    ac_exec_resolve(e, lane, s);
    AC_TRY(step->kernel->prepare(lane->lane, &e->problems[s], e->derived[i]->data));
    if (from.space == AC_SPACE_DERIVED && e->passing[from.index] && e->fresh[from.index]) {
        AC_TRY(device->backend->sync(device->self, lane->lane));
        release_derived(e, e->derived[from.index]);
        e->fresh[from.index] = false;
    }
    return AC_OK;
}

/* ---- derived weights that are there already -------------------------------------------------- */

/* Whole weights joined by rows, which lie one behind the other: the first one's memory. */
static void *
joined_in_place(const ac_exec *e, ac_val value)
{
    const ac_node *node = ac_producer(e->plan->graph, value);
    char *start = NULL, *end = NULL;
    if (!node || node->op != AC_OP_CONCAT || node->attr.axis.axis != 0) {
        return NULL;
    }
    for (int32_t k = 0; k < node->n_inputs; k++) {
        ac_val v = node->input[k];
        const ac_tensor *t = &e->bound[v];
        if (e->plan->graph->values[v].kind != AC_VALUE_WEIGHT || e->on_host[v] ||
            !ac_tensor_is_contiguous(t) || (end && (char *)t->data != end)) {
            return NULL;
        }
        start = start ? start : t->data;
        end = (char *)t->data + ac_tensor_bytes(t);
    }
    return start;
}

static void *
prepared_in_place(const ac_exec *e, const ac_step *step)
{
    ac_ref from = step->input[AC_LINEAR_W];
    if (!step->kernel->form || strcmp(step->kernel->form, AC_FORM_OHWI) != 0 ||
        from.space != AC_SPACE_WEIGHT || from.offset || e->on_host[from.index]) {
        return NULL;
    }
    const ac_tensor *t = &e->bound[from.index];
    const int64_t *dim = t->shape.dim, *stride = t->stride;
    bool fits = t->shape.rank == 4 && stride[1] == 1 && stride[3] == dim[1] &&
                stride[2] == dim[3] * dim[1] && stride[0] == dim[2] * dim[3] * dim[1];
    return fits ? t->data : NULL;
}

/* Who laid the sources out so keeps them so, or binds them anew. */
static bool
borrow(ac_exec *e, int32_t i)
{
    const ac_plan_derived *want = &e->plan->derived[i];
    if (ac_exec_on_host(e)) {
        return false;
    }
    void *at = want->prepare ? prepared_in_place(e, want->prepare)
                             : joined_in_place(e, want->value);
    if (at) {
        release_derived(e, e->derived[i]);
        e->derived[i]->data = at;
        e->derived[i]->borrowed = true;
    }
    return at != NULL;
}

static ac_status
make(ac_exec *e, ac_device_lane *lane, int32_t i)
{
    ac_derived *d = e->derived[i];
    /* Before the sources are read: what changes while they are shows at the next check. */
    d->checksum = ac_weights_checksum(e->weights, d->source, d->n_sources);
    if (!borrow(e, i)) {
        AC_TRY(e->plan->derived[i].prepare ? make_prepared(e, lane, i) : make_value(e, lane, i));
    }
    d->valid = true;
    return AC_OK;
}

static ac_status
find_derived(ac_exec *e, bool *all_valid)
{
    *all_valid = true;
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        const ac_plan_derived *want = &e->plan->derived[i];
        if (!e->derived[i]) {
            AC_TRY(ac_weights_derived(e->weights, want->key, want->source, want->n_sources,
                                      &e->derived[i]));
        }
        *all_valid = *all_valid && (e->derived[i]->valid || e->passing[i]);
    }
    return AC_OK;
}

static ac_status
make_all(ac_exec *e, ac_device_lane *lane)
{
    AC_TRY(allocate_staging(e));
    for (int32_t i = 0; i < e->plan->n_derived; i++) {
        if (!e->derived[i]->valid && !e->passing[i]) {
            AC_TRY(make(e, lane, i));
        }
    }
    e->ran = false;
    return AC_OK;
}

static void
release_staging(ac_exec *e, ac_device_lane *lane)
{
    ac_device *device = e->plan->device;
    if (e->staging) {
        device->backend->sync(device->self, lane->lane);
        ac_device_free(device, e->staging);
        e->staging = NULL;
    }
}

static ac_status
derive_locked(ac_exec *e, ac_device_lane *lane)
{
    const ac_device *device = e->plan->device;
    bool any = false, all_valid = true;
    AC_TRY(bind_weights(e, lane, &any));
    if (e->weights) {
        AC_TRY(find_derived(e, &all_valid));
    }
    if (!all_valid) {
        ac_status status = make_all(e, lane);
        release_staging(e, lane);
        AC_TRY(status);
    }
    /* Other lanes take what is valid without waiting for this one. */
    return any || !all_valid ? device->backend->sync(device->self, lane->lane) : AC_OK;
}

ac_status
ac_exec_derive(ac_exec *e, ac_device_lane *lane)
{
    if (!e->weights) {
        bool any = false;
        return bind_weights(e, lane, &any);
    }
    ac_weights_make_begin(e->weights);
    memset(e->fresh, 0, ((size_t)AC_MAX(e->plan->n_derived, 1) + (size_t)e->plan->graph->n_values) *
                            sizeof *e->fresh);
    ac_status status = derive_locked(e, lane);
    if (status < 0) {
        release_fresh(e);
    }
    ac_weights_make_end(e->weights);
    return status;
}
