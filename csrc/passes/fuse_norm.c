/* fuse_norm: GROUP_NORM takes the concat, the time embedding and the activation around it.
 *
 *     group_norm(add(x, t[n,c]))            -> group_norm(x, shift=t)
 *     activation(group_norm(x))             -> group_norm(x) {act}
 *     concat(a, b) read by group_norm, linear, conv2d only -> each reads a and b itself
 *
 * A UNet's up blocks so have no concat at all: the norm reads two tensors, and so does the 1x1
 * shortcut.  Concats of three or more, and those read by anything else, stay.
 */
#include "edit.h"

/* ADD of one row an image: x [n, ..., c] + t [n or 1, c]. */
static bool
adds_rows(const ac_graph *g, const ac_node *add)
{
    return g->values[add->input[1]].shape.rank == 2 && g->values[add->input[0]].shape.rank > 2;
}

static ac_status
take_shift(ac_graph *g, const ac_uses *uses, int32_t at)
{
    const ac_node *norm = &g->nodes[at];
    int32_t add = ac_sole_producer(g, uses, norm->input[AC_GN_X], AC_OP_ADD);
    if (add == AC_NONE || !adds_rows(g, &g->nodes[add]) ||
        ac_node_operand(norm, AC_GN_X2) != AC_NONE ||
        ac_node_operand(norm, AC_GN_SHIFT) != AC_NONE) {
        return AC_OK;
    }
    g->nodes[add].dead = true;
    AC_TRY(ac_node_set(g, at, AC_GN_X, g->nodes[add].input[0]));
    return ac_node_set(g, at, AC_GN_SHIFT, g->nodes[add].input[1]);
}

static ac_status
take_activation(ac_graph *g, const ac_uses *uses, int32_t at)
{
    ac_act act = g->nodes[at].attr.activation.act;
    int32_t norm = ac_sole_producer(g, uses, g->nodes[at].input[0], AC_OP_GROUP_NORM);
    if (norm == AC_NONE || g->nodes[norm].attr.group_norm.act != AC_ACT_NONE) {
        return AC_OK;
    }
    AC_TRY(ac_node_take_over(g, at, norm));
    g->nodes[at].attr.group_norm.act = act;
    g->nodes[norm].dead = true;
    return AC_OK;
}

/* ---- concat ---------------------------------------------------------------------------------- */

/* Slot of the second source of an op that has one, or AC_NONE. */
static int32_t
second_slot(ac_op op)
{
    switch (op) {
    case AC_OP_GROUP_NORM:
        return AC_GN_X2;
    case AC_OP_LINEAR:
        return AC_LINEAR_X2;
    case AC_OP_CONV2D:
        return AC_CONV_X2;
    default:
        return AC_NONE;
    }
}

/* The concat that the node's first operand is and that it could read in two halves, or NULL. */
static const ac_node *
splittable(const ac_graph *g, const ac_node *node)
{
    int32_t second = second_slot(node->op);
    if (node->dead || second == AC_NONE || ac_node_operand(node, second) != AC_NONE) {
        return NULL;
    }
    const ac_node *concat = ac_producer(g, node->input[0]);
    if (!concat || concat->op != AC_OP_CONCAT || concat->n_inputs != 2) {
        return NULL;
    }
    const ac_value *joined = &g->values[concat->output];
    bool by_channel = concat->attr.axis.axis == joined->shape.rank - 1;
    bool same_dtype = g->values[concat->input[0]].dtype == joined->dtype &&
                      g->values[concat->input[1]].dtype == joined->dtype;
    return by_channel && same_dtype ? concat : NULL;
}

/* Reads that could take two sources are counted first: one that cannot keeps the concat in
 * memory, and then two sources gain nothing. */
static ac_status
split_concats(ac_graph *g)
{
    int32_t *left = ac_graph_uses(g); /* uses of a value that need it in one piece */
    if (!left) {
        return ac_no_memory((size_t)g->n_values * sizeof *left);
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *concat = splittable(g, &g->nodes[i]);
        if (concat) {
            left[concat->output]--;
        }
    }
    ac_status status = AC_OK;
    for (int32_t i = 0; i < g->n_nodes && status == AC_OK; i++) {
        const ac_node *concat = splittable(g, &g->nodes[i]);
        if (concat && left[concat->output] == 0) {
            status = ac_node_set(g, i, second_slot(g->nodes[i].op), concat->input[1]);
            status = status < 0 ? status : ac_node_set(g, i, 0, concat->input[0]);
        }
    }
    ac_free(left);
    return status;
}

static ac_status
run(ac_graph *g)
{
    ac_uses uses;
    AC_TRY(ac_uses_init(g, &uses));
    ac_status status = AC_OK;
    for (int32_t i = 0; i < g->n_nodes && status == AC_OK; i++) {
        if (g->nodes[i].op == AC_OP_GROUP_NORM) {
            status = take_shift(g, &uses, i);
        } else if (g->nodes[i].op == AC_OP_ACTIVATION) {
            status = take_activation(g, &uses, i);
        }
    }
    ac_uses_deinit(&uses);
    return status < 0 ? status : split_concats(g);
}

const ac_pass ac_pass_fuse_norm = {
    .name = "fuse_norm",
    .why = "group norm reads two tensors, adds the time embedding and applies the activation",
    .run = run,
};
