/* fuse_epilogue: LINEAR, CONV2D and UP_CONV2D take the elementwise op after them.
 *
 *     activation(gemm)         -> gemm {act}
 *     gate(linear)             -> linear {act, gated}
 *     add(gemm, r)             -> gemm with residual r; act comes before residual
 *     add(reshape(gemm), r)    -> reshape(gemm with residual reshape(r))
 *
 * Only where nothing else reads what is in between, and only within one rate: a GEMM that runs once
 * a prompt must not become one a step because a step's tensor is added to it.
 */
#include "edit.h"

#include <string.h>

static bool
is_gemm(ac_op op)
{
    return op == AC_OP_LINEAR || op == AC_OP_CONV2D || op == AC_OP_UP_CONV2D;
}

static ac_act *
act_of(ac_node *node)
{
    switch (node->op) {
    case AC_OP_LINEAR:
        return &node->attr.linear.act;
    case AC_OP_CONV2D:
        return &node->attr.conv2d.act;
    default:
        return &node->attr.up_conv2d.act;
    }
}

/* All three have their residual in the same slot. */
_Static_assert((int)AC_LINEAR_RESIDUAL == (int)AC_CONV_RESIDUAL, "residual slots");

/* The GEMM that computes `v` for its one reader `at`, at the same rate and without a residual or a
 * gate yet; or AC_NONE. */
static int32_t
open_gemm(const ac_graph *g, const ac_uses *uses, ac_val v, int32_t at)
{
    const ac_node *node = ac_producer(g, v);
    if (!node || !is_gemm(node->op) || ac_sole_user(g, uses, v) != at) {
        return AC_NONE;
    }
    const ac_value *result = &g->values[g->nodes[at].output];
    bool open = ac_node_operand(node, AC_LINEAR_RESIDUAL) == AC_NONE &&
                !(node->op == AC_OP_LINEAR && node->attr.linear.gated) &&
                g->values[v].rate == result->rate && g->values[v].dtype == result->dtype;
    return open ? g->values[v].node : AC_NONE;
}

static ac_status
take_activation(ac_graph *g, const ac_uses *uses, int32_t at)
{
    bool gate = g->nodes[at].op == AC_OP_GATE;
    ac_act act = g->nodes[at].attr.activation.act;
    int32_t gemm = open_gemm(g, uses, g->nodes[at].input[0], at);
    if (gemm == AC_NONE || *act_of(&g->nodes[gemm]) != AC_ACT_NONE ||
        (gate && g->nodes[gemm].op != AC_OP_LINEAR)) {
        return AC_OK;
    }
    AC_TRY(ac_node_take_over(g, at, gemm));
    *act_of(&g->nodes[at]) = act;
    if (gate) {
        g->nodes[at].attr.linear.gated = true;
    }
    return AC_OK;
}

/* ---- residual -------------------------------------------------------------------------------- */

/* Whether a reshape of `v` moves nothing: its rows have no gaps. */
static bool
is_packed(const ac_graph *g, ac_val v)
{
    const ac_node *node = ac_producer(g, v);
    while (node && node->op == AC_OP_RESHAPE) {
        node = ac_producer(g, node->input[0]);
    }
    return !node || node->op != AC_OP_SLICE;
}

typedef struct summand {
    int32_t gemm;  /* node, or AC_NONE */
    bool reshaped; /* there is a reshape between it and the ADD */
} summand;

static summand
find_summand(const ac_graph *g, const ac_uses *uses, int32_t at, int32_t slot)
{
    ac_val v = g->nodes[at].input[slot], other = g->nodes[at].input[1 - slot];
    summand s = {.gemm = open_gemm(g, uses, v, at)};
    int32_t reshape = ac_sole_producer(g, uses, v, AC_OP_RESHAPE);
    if (s.gemm == AC_NONE && reshape != AC_NONE && is_packed(g, other) &&
        g->values[v].rate == g->values[g->nodes[at].output].rate) {
        s.gemm = open_gemm(g, uses, g->nodes[reshape].input[0], reshape);
        s.reshaped = true;
    }
    return s;
}

static ac_status
take_residual(ac_graph *g, const ac_uses *uses, int32_t at)
{
    const ac_node add = g->nodes[at];
    const ac_shape *shape = &g->values[add.output].shape;
    if (!ac_shape_equal(&g->values[add.input[1]].shape, shape) ||
        g->values[add.input[0]].dtype != g->values[add.input[1]].dtype) {
        return AC_OK;
    }
    /* Of two GEMMs the later: the other's result is there by then, and lives the shorter. */
    summand a = find_summand(g, uses, at, 0), b = find_summand(g, uses, at, 1);
    int32_t slot = b.gemm > a.gemm;
    summand chosen = slot ? b : a;
    ac_val other = add.input[1 - slot];
    if (chosen.gemm == AC_NONE) {
        return AC_OK;
    }
    if (!chosen.reshaped) {
        AC_TRY(ac_node_take_over(g, at, chosen.gemm));
        return ac_node_set(g, at, AC_LINEAR_RESIDUAL, other);
    }
    /* Nothing but this chain reads the GEMM, so `other` cannot depend on it: no cycle. */
    ac_val y = g->nodes[chosen.gemm].output;
    ac_val residual = ac_graph_node(g, AC_OP_RESHAPE, NULL, &other, 1, g->values[other].dtype,
                                    &g->values[y].shape, add.name);
    AC_TRY(ac_graph_status(g));
    AC_TRY(ac_node_set(g, chosen.gemm, AC_LINEAR_RESIDUAL, residual));
    return ac_node_become(g, at, AC_OP_RESHAPE, NULL, &y, 1);
}

static ac_status
run(ac_graph *g)
{
    ac_uses uses;
    AC_TRY(ac_uses_init(g, &uses));
    ac_status status = AC_OK;
    for (int32_t i = 0, n = g->n_nodes; i < n && status == AC_OK; i++) {
        switch (g->nodes[i].op) {
        case AC_OP_ACTIVATION:
        case AC_OP_GATE:
            status = take_activation(g, &uses, i);
            break;
        case AC_OP_ADD:
            status = take_residual(g, &uses, i);
            break;
        default:
            break;
        }
    }
    ac_uses_deinit(&uses);
    return status;
}

const ac_pass ac_pass_fuse_epilogue = {
    .name = "fuse_epilogue",
    .why = "linears and convolutions take activation, gate and residual",
    .run = run,
};
