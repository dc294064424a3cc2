/* exec_edges: inputs and outputs where the device does not see the caller's memory, or records.
 *
 * A slot is the exec's own device memory for one input or output.  A run goes through the slot
 * where the caller's tensor is in host memory, and where launches are recorded, which needs
 * addresses that stay.  All else is used where it lies. */
#include "exec_internal.h"

#include <string.h>

#define ALIGN ((size_t)256)

/* An input with gaps may be read only by kernels that take any strides. */
static void
find_readers(ac_exec *e)
{
    const ac_plan *plan = e->plan;
    const ac_graph *g = plan->graph;
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        for (int32_t k = 0; k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE && node->op != AC_OP_TO_NHWC) {
                e->edges[node->input[k]].any_strides = false;
            }
        }
    }
    for (int32_t s = plan->first[AC_RATE_STEP]; s < plan->n_steps; s++) {
        const ac_step *step = &plan->steps[s];
        for (int32_t k = 0; k < step->problem.n_inputs; k++) {
            if (step->input[k].space == AC_SPACE_INPUT || step->input[k].space == AC_SPACE_OUTPUT) {
                e->edges[step->input[k].index].step = true;
            }
        }
        if (step->output.space == AC_SPACE_OUTPUT) {
            e->edges[step->output.index].step = true;
        }
    }
}

ac_status
ac_exec_find_edges(ac_exec *e)
{
    const ac_graph *g = e->plan->graph;
    for (ac_val v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        ac_edge *edge = &e->edges[v];
        edge->is_edge = value->kind == AC_VALUE_INPUT || value->output;
        edge->any_strides = value->kind == AC_VALUE_INPUT;
        edge->output = value->output != NULL;
        if (edge->is_edge) {
            e->edge_at[e->n_edges++] = v;
            size_t bytes = (size_t)ac_shape_count(&value->shape) * ac_dtype_size(value->dtype);
            edge->slot = e->slot_bytes;
            if (!ac_add_size(e->slot_bytes, ac_align_up(bytes, ALIGN), &e->slot_bytes)) {
                return ac_no_memory(bytes);
            }
        }
    }
    find_readers(e);
    return AC_OK;
}

/* One element after the other in some order of the dimensions: the bytes can be copied as they
 * are, strides and all. */
static bool
is_dense(const ac_tensor *t)
{
    int64_t expected = 1;
    bool used[AC_MAX_RANK] = {false};
    for (int32_t n = 0; n < t->shape.rank; n++) {
        int32_t next = -1;
        for (int32_t d = 0; d < t->shape.rank; d++) {
            if (!used[d] && (t->shape.dim[d] == 1 || t->stride[d] == expected)) {
                next = d;
                break;
            }
        }
        if (next < 0) {
            return false;
        }
        used[next] = true;
        expected *= t->shape.dim[next];
    }
    return true;
}

static bool
wants_slot(const ac_exec *e, ac_val v, const ac_run *run)
{
    const ac_edge *edge = &e->edges[v];
    bool fixed = run->fixed && (edge->output || e->plan->graph->values[v].rate == AC_RATE_STEP);
    return edge->host || (e->can_record && !fixed && edge->step && is_dense(&edge->caller));
}

ac_status
ac_exec_place_edges(ac_exec *e, const ac_run *run)
{
    for (int32_t i = 0; i < e->n_edges; i++) {
        ac_val v = e->edge_at[i];
        ac_edge *edge = &e->edges[v];
        edge->slotted = wants_slot(e, v, run);
        e->bound[v] = edge->caller;
        if (!edge->slotted) {
            continue;
        }
        if (!e->slots) {
            AC_TRY(ac_device_alloc(e->plan->device, e->slot_bytes, &e->slots));
        }
        if (!is_dense(&edge->caller)) { /* packed on the way, see upload */
            ac_shape_strides(&e->bound[v].shape, e->bound[v].stride);
        }
        e->bound[v].data = (char *)e->slots + edge->slot;
    }
    return AC_OK;
}

/* Contiguous copy of a tensor in host memory, any strides. */
static void
pack(const ac_tensor *from, char *to)
{
    size_t item = ac_dtype_size(from->dtype);
    int64_t count = ac_tensor_count(from), at[AC_MAX_RANK] = {0};
    for (int64_t i = 0; i < count; i++) {
        int64_t offset = 0;
        for (int32_t d = 0; d < from->shape.rank; d++) {
            offset += at[d] * from->stride[d];
        }
        memcpy(to + (size_t)i * item, (const char *)from->data + offset * (int64_t)item, item);
        for (int32_t d = from->shape.rank - 1; d >= 0 && ++at[d] == from->shape.dim[d]; d--) {
            at[d] = 0;
        }
    }
}

static ac_status
upload(const ac_device *device, ac_device_lane *lane, const ac_tensor *from, void *to)
{
    size_t bytes = ac_tensor_bytes(from);
    if (is_dense(from)) {
        return device->backend->upload(device->self, lane->lane, to, from->data, bytes);
    }
    char *packed = ac_malloc(bytes);
    if (!packed) {
        return ac_no_memory(bytes);
    }
    pack(from, packed);
    ac_status status = device->backend->upload(device->self, lane->lane, to, packed, bytes);
    if (status == AC_OK) {
        status = device->backend->sync(device->self, lane->lane);
    }
    ac_free(packed);
    return status;
}

ac_status
ac_exec_copy_in(ac_exec *e, ac_device_lane *lane, ac_rate start)
{
    const ac_device *device = e->plan->device;
    for (int32_t i = 0; i < e->n_edges; i++) {
        ac_val v = e->edge_at[i];
        const ac_edge *edge = &e->edges[v];
        if (!edge->slotted || edge->output ||
            (e->plan->graph->values[v].rate < start && !edge->step)) {
            continue;
        }
        if (edge->host) {
            AC_TRY(upload(device, lane, &edge->caller, e->bound[v].data));
        } else {
            AC_TRY(device->backend->copy(device->self, lane->lane, e->bound[v].data,
                                         edge->caller.data, ac_tensor_bytes(&edge->caller)));
        }
    }
    return AC_OK;
}

ac_status
ac_exec_copy_out(ac_exec *e, ac_device_lane *lane)
{
    const ac_device *device = e->plan->device;
    for (int32_t i = 0; i < e->n_edges; i++) {
        ac_val v = e->edge_at[i];
        const ac_edge *edge = &e->edges[v];
        if (edge->slotted && edge->output) {
            AC_TRY((edge->host ? device->backend->download : device->backend->copy)(
                device->self, lane->lane, edge->caller.data, e->bound[v].data,
                ac_tensor_bytes(&edge->caller)));
        }
    }
    return AC_OK;
}

bool
ac_exec_has_host_output(const ac_exec *e)
{
    for (int32_t i = 0; i < e->n_edges; i++) {
        const ac_edge *edge = &e->edges[e->edge_at[i]];
        if (edge->output && edge->host) {
            return true;
        }
    }
    return false;
}
