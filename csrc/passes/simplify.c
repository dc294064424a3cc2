/* simplify: drops what does nothing and shortens chains of views.
 *
 * First pass: it makes the graph canonical, so that later patterns match without looking through
 * no-ops.  One sweep in order; a node is looked at after its operands are settled.
 */
#include "edit.h"

static const ac_shape *
shape_of(const ac_graph *g, ac_val v)
{
    return &g->values[v].shape;
}

/* RESHAPE of RESHAPE reads the inner's operand; SLICE of SLICE on one axis adds the starts. */
static void
shorten(ac_graph *g, ac_node *node)
{
    const ac_node *inner = ac_producer(g, node->input[0]);
    if (!inner || inner->op != node->op) {
        return;
    }
    if (node->op == AC_OP_RESHAPE) {
        node->input[0] = inner->input[0];
    } else if (node->op == AC_OP_SLICE && node->attr.axis.axis == inner->attr.axis.axis) {
        node->attr.axis.start += inner->attr.axis.start;
        node->input[0] = inner->input[0];
    }
}

/* Whether the node hands its first operand on unchanged: same shape, dtype and elements. */
static bool
does_nothing(const ac_graph *g, const ac_node *node)
{
    ac_val x = ac_node_operand(node, 0);
    const ac_value *result = &g->values[node->output];
    if (x == AC_NONE || g->values[x].dtype != result->dtype ||
        !ac_shape_equal(shape_of(g, x), &result->shape)) {
        return false;
    }
    switch (node->op) {
    case AC_OP_RESHAPE:
    case AC_OP_SLICE:
    case AC_OP_CAST:
    case AC_OP_UPSAMPLE:
        return true;
    case AC_OP_CONCAT:
        return node->n_inputs == 1;
    case AC_OP_SCALE:
        return node->attr.scale.scale == 1.0f && node->attr.scale.offset == 0.0f;
    case AC_OP_ACTIVATION:
        return node->attr.activation.act == AC_ACT_NONE;
    default:
        return false;
    }
}

static ac_status
simplify_node(ac_graph *g, int32_t at, ac_forward *forward)
{
    ac_node *node = &g->nodes[at];
    ac_forward_operands(forward, node);
    if (node->op == AC_OP_SELECT && shape_of(g, node->input[0])->dim[0] == 1) {
        /* One row: nothing to choose, and what follows no longer changes with the step. */
        ac_val table = node->input[0];
        AC_TRY(ac_node_become(g, at, AC_OP_RESHAPE, NULL, &table, 1));
    }
    if (node->op == AC_OP_RESHAPE || node->op == AC_OP_SLICE) {
        shorten(g, node);
    }
    if (does_nothing(g, node)) {
        ac_forward_set(g, forward, node->output, node->input[0]);
    }
    return AC_OK;
}

static ac_status
run(ac_graph *g)
{
    ac_forward forward;
    AC_TRY(ac_forward_init(g, &forward));
    ac_status status = AC_OK;
    for (int32_t i = 0; i < g->n_nodes && status == AC_OK; i++) {
        status = simplify_node(g, i, &forward);
    }
    ac_forward_deinit(&forward);
    return status;
}

const ac_pass ac_pass_simplify = {
    .name = "simplify",
    .why = "drop no-ops and chains of views",
    .run = run,
};
