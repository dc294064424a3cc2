/* plan_views: SLICE and RESHAPE move nothing; here they become an offset and strides of the buffer
 * they look into.  Where that cannot be, a copy is put before planning. */
#include "plan_internal.h"

#include <string.h>

bool
ac_reshape_strides(const ac_shape *from, const int64_t *stride, const ac_shape *shape,
                   int64_t *out)
{
    /* Walk both shapes from the inside in groups of equal products; a group of `from` must be
     * evenly spaced, then the group of `shape` has strides inside it. */
    int i = from->rank - 1, j = shape->rank - 1;
    memset(out, 0, sizeof(int64_t) * AC_MAX_RANK);
    while (j >= 0) {
        if (shape->dim[j] == 1) {
            out[j] = j + 1 < shape->rank ? out[j + 1] * shape->dim[j + 1] : 1;
            j--;
            continue;
        }
        while (i >= 0 && from->dim[i] == 1) {
            i--;
        }
        if (i < 0) {
            return false;
        }
        int64_t step = stride[i], left = from->dim[i], right = shape->dim[j];
        out[j--] = step;
        i--;
        while (left != right) {
            if (left < right) {
                while (i >= 0 && from->dim[i] == 1) {
                    i--;
                }
                if (i < 0 || stride[i] != step * left) {
                    return false;
                }
                left *= from->dim[i--];
            } else {
                if (j < 0) {
                    return false;
                }
                out[j] = step * right;
                right *= shape->dim[j--];
            }
        }
    }
    return true;
}

/* Places of a view from those of its operand.  False when a reshape has no strides. */
static bool
view_of(const ac_graph *g, ac_place *places, const ac_node *node)
{
    const ac_place *from = &places[node->input[0]];
    ac_place *to = &places[node->output];
    const ac_shape *shape = &g->values[node->output].shape;
    *to = (ac_place){.base = from->base, .offset = from->offset, .last = -1};
    if (node->op == AC_OP_SLICE) {
        memcpy(to->stride, from->stride, sizeof to->stride);
        to->offset += node->attr.axis.start * from->stride[node->attr.axis.axis];
        return true;
    }
    return ac_reshape_strides(&g->values[node->input[0]].shape, from->stride, shape, to->stride);
}

static void
whole(const ac_graph *g, ac_place *places, ac_val v)
{
    places[v] = (ac_place){.base = v, .last = -1};
    ac_shape_strides(&g->values[v].shape, places[v].stride);
}

ac_status
ac_plan_views(ac_planner *p)
{
    const ac_graph *g = p->g;
    p->places = ac_arena_alloc(&p->work, (size_t)g->n_values * sizeof *p->places);
    if (!p->places) {
        return ac_no_memory((size_t)g->n_values * sizeof *p->places);
    }
    for (ac_val v = 0; v < g->n_values; v++) {
        whole(g, p->places, v);
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        if (ac_op_is_view(node->op) && !view_of(g, p->places, node)) {
            return ac_error(AC_E_INTERNAL, "%s: a reshape without strides is left", node->name);
        }
    }
    return AC_OK;
}

static ac_val
copy_of(ac_graph *g, ac_val v)
{
    return ac_graph_node(g, AC_OP_CAST, NULL, &v, 1, g->values[v].dtype, NULL, g->values[v].name);
}

/* An output that is an input, a weight or a view has no buffer of its own; one that a faster
 * section reads would be gone when the caller brings another. */
static ac_status
copy_outputs(ac_graph *g)
{
    int32_t n = g->n_values;
    for (ac_val v = 0; v < n; v++) {
        const char *output = g->values[v].output;
        if (!output) {
            continue;
        }
        const ac_node *node = ac_producer(g, v);
        bool copy = !node || ac_op_is_view(node->op);
        for (int32_t i = 0; i < g->n_nodes && !copy; i++) {
            const ac_node *reader = &g->nodes[i];
            for (int32_t k = 0; k < reader->n_inputs && !copy; k++) {
                copy = reader->input[k] == v && g->values[reader->output].rate > g->values[v].rate;
            }
        }
        if (copy) {
            ac_val fresh = copy_of(g, v);
            if (fresh == AC_NONE) {
                return ac_graph_status(g);
            }
            g->values[v].output = NULL;
            g->values[fresh].output = output;
        }
    }
    return AC_OK;
}

/* A reshape of a strided view that has no strides reads a packed copy instead. */
static ac_status
copy_for_reshapes(ac_planner *p)
{
    ac_graph *g = p->g;
    int32_t n_nodes = g->n_nodes, n_values = g->n_values;
    ac_place *places = ac_arena_alloc(&p->work, (size_t)n_values * sizeof *places);
    if (!places) {
        return ac_no_memory((size_t)n_values * sizeof *places);
    }
    for (ac_val v = 0; v < n_values; v++) {
        whole(g, places, v);
    }
    for (int32_t i = 0; i < n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        if (ac_op_is_view(node->op) && !view_of(g, places, node)) {
            ac_val from = node->input[0], to = node->output;
            ac_val copy = copy_of(g, from);
            if (copy == AC_NONE) {
                return ac_graph_status(g);
            }
            g->nodes[i].input[0] = copy; /* nodes may have moved: index, not pointer */
            whole(g, places, to);
        }
    }
    return AC_OK;
}

ac_status
ac_plan_copies(ac_planner *p)
{
    AC_TRY(copy_for_reshapes(p));
    AC_TRY(copy_outputs(p->g));
    return ac_graph_sort(p->g);
}
