/* rescale: keeps the residual stream of a model times 2^e, e = stream_exponent below 0.
 *
 *     group_norm(x, eps)                 -> group_norm(2^e x, 2^2e eps)            the same result
 *     conv(act(group_norm(x)), w, b)     -> conv(2^e act(group_norm(x)), w, 2^e b)
 *     conv(2^e x, w, b) + 2^e residual   -> 2^e times what it was
 *
 * What only group norms read may have any scale: they divide it out again.  So f16 holds
 * activations past 65504, which SDXL's VAE has.  A power of two changes exponents only: in exact
 * arithmetic nothing changes, in f16 only what becomes denormal.  Weights stay as they are (times
 * 2^e they would go denormal); the scale enters with what the norm before a convolution writes, so
 * no GEMM needs an attribute.  Biases become derived weights, a few KB.
 *
 * A value is scaled when everything that reads it is a group norm or hands the scale on: found by
 * taking all values as scaled and striking out, until nothing changes, those for which that is
 * not so.  Last of the passes: the more is fused, the fewer places need a SCALE of their own (the
 * model's input, and the attention's result).
 */
#include "edit.h"

#include <math.h>
#include <string.h>

typedef struct rescaler {
    ac_graph *g;
    ac_uses uses;
    int32_t n;     /* values when it began */
    bool *scaled;  /* per value */
    ac_val *times; /* per value: what a SCALE made of it, or AC_NONE */
} rescaler;

static bool
is_gemm(ac_op op)
{
    return op == AC_OP_LINEAR || op == AC_OP_CONV2D || op == AC_OP_UP_CONV2D;
}

static bool
hands_on(ac_op op)
{
    return op == AC_OP_RESHAPE || op == AC_OP_UPSAMPLE || op == AC_OP_ADD;
}

/* Slots of the three GEMMs agree. */
_Static_assert((int)AC_LINEAR_B == (int)AC_CONV_B &&
                   (int)AC_LINEAR_RESIDUAL == (int)AC_CONV_RESIDUAL,
               "operand slots");

static bool
is_linear_gemm(const ac_graph *g, const ac_node *node)
{
    ac_val b = ac_node_operand(node, AC_LINEAR_B);
    if (ac_node_operand(node, AC_LINEAR_X2) != AC_NONE ||
        (b != AC_NONE && g->values[b].rate != AC_RATE_LOAD)) {
        return false;
    }
    switch (node->op) {
    case AC_OP_LINEAR:
        return node->attr.linear.act == AC_ACT_NONE && !node->attr.linear.gated;
    case AC_OP_CONV2D:
        return node->attr.conv2d.act == AC_ACT_NONE;
    default:
        return node->attr.up_conv2d.act == AC_ACT_NONE;
    }
}

/* Whether the result could be scaled, whatever reads it. */
static bool
can_be_scaled(const ac_graph *g, const ac_node *node)
{
    const ac_value *result = &g->values[node->output];
    return !node->dead && !result->output && result->rate > AC_RATE_LOAD &&
           ac_dtype_is_float(result->dtype) &&
           (is_gemm(node->op) ? is_linear_gemm(g, node) : hands_on(node->op));
}

/* Whether the operands of a node let its result be scaled. */
static bool
operands_allow(const rescaler *r, const ac_node *node)
{
    if (is_gemm(node->op)) {
        ac_val residual = ac_node_operand(node, AC_LINEAR_RESIDUAL);
        return residual == AC_NONE || r->scaled[residual];
    }
    for (int32_t k = 0; k < node->n_inputs; k++) {
        if (node->input[k] == AC_NONE || !r->scaled[node->input[k]]) {
            return false;
        }
    }
    return true;
}

/* Whether operand `slot` of a node may be scaled. */
static bool
takes_scaled(const rescaler *r, const ac_node *node, int32_t slot)
{
    if (node->op == AC_OP_GROUP_NORM) {
        ac_val x2 = ac_node_operand(node, AC_GN_X2);
        bool both = x2 == AC_NONE || (r->scaled[node->input[AC_GN_X]] && r->scaled[x2]);
        return (slot == AC_GN_X || slot == AC_GN_X2) && both &&
               ac_node_operand(node, AC_GN_SHIFT) == AC_NONE;
    }
    if (is_gemm(node->op)) {
        return (slot == AC_LINEAR_X || slot == AC_LINEAR_RESIDUAL) && r->scaled[node->output];
    }
    return hands_on(node->op) && r->scaled[node->output];
}

/* Strikes out around one node; true when something changed. */
static bool
strike(rescaler *r, const ac_node *node)
{
    bool changed = false;
    if (r->scaled[node->output] && !operands_allow(r, node)) {
        r->scaled[node->output] = false;
        changed = true;
    }
    for (int32_t k = 0; k < node->n_inputs; k++) {
        ac_val v = node->input[k];
        if (v != AC_NONE && r->scaled[v] && !takes_scaled(r, node, k)) {
            r->scaled[v] = false;
            changed = true;
        }
    }
    return changed;
}

static void
find_scaled(rescaler *r)
{
    const ac_graph *g = r->g;
    memset(r->scaled, 0, (size_t)r->n * sizeof *r->scaled);
    for (int32_t i = 0; i < g->n_nodes; i++) {
        r->scaled[g->nodes[i].output] = can_be_scaled(g, &g->nodes[i]);
    }
    for (bool changed = true; changed;) { /* back, what results are read by; forth, operands */
        changed = false;
        for (int32_t i = g->n_nodes - 1; i >= 0; i--) {
            changed |= strike(r, &g->nodes[i]);
        }
        for (int32_t i = 0; i < g->n_nodes; i++) {
            changed |= strike(r, &g->nodes[i]);
        }
    }
}

/* `v` times 2^e by a node of its own: at LOAD rate a derived weight. */
static ac_val
times(rescaler *r, ac_val v)
{
    ac_graph *g = r->g;
    if (r->times[v] == AC_NONE) {
        ac_attr attr = {.scale = {.scale = ldexpf(1.0f, g->stream_exponent)}};
        r->times[v] = ac_graph_node(g, AC_OP_SCALE, &attr, &v, 1, g->values[v].dtype, NULL,
                                    g->values[v].name);
    }
    return r->times[v];
}

static ac_status
scale_gemm(rescaler *r, int32_t at)
{
    ac_graph *g = r->g;
    ac_val x = g->nodes[at].input[0], b = ac_node_operand(&g->nodes[at], AC_LINEAR_B);
    if (b != AC_NONE) {
        b = times(r, b);
        AC_TRY(ac_graph_status(g));
        g->nodes[at].input[AC_LINEAR_B] = b;
    }
    if (r->scaled[x]) {
        return AC_OK;
    }
    int32_t norm = ac_sole_producer(g, &r->uses, x, AC_OP_GROUP_NORM);
    if (norm != AC_NONE && g->values[x].dtype == g->values[g->nodes[at].output].dtype) {
        g->nodes[norm].attr.group_norm.exponent += g->stream_exponent;
        return AC_OK;
    }
    x = times(r, x);
    AC_TRY(ac_graph_status(g));
    g->nodes[at].input[0] = x;
    return AC_OK;
}

static ac_status
rescale(rescaler *r)
{
    ac_graph *g = r->g;
    find_scaled(r);
    for (int32_t i = 0, n = g->n_nodes; i < n; i++) {
        ac_node *node = &g->nodes[i];
        if (node->op == AC_OP_GROUP_NORM && r->scaled[node->input[AC_GN_X]]) {
            float *eps = &node->attr.group_norm.eps;
            *eps = ldexpf(*eps, 2 * g->stream_exponent);
        } else if (is_gemm(node->op) && r->scaled[node->output]) {
            AC_TRY(scale_gemm(r, i));
        }
    }
    return AC_OK;
}

static ac_status
run(ac_graph *g)
{
    if (g->stream_exponent == 0) {
        return AC_OK;
    }
    ac_arena work;
    ac_arena_init(&work);
    rescaler r = {.g = g, .n = g->n_values};
    size_t n = (size_t)AC_MAX(r.n, 1);
    ac_status status = ac_uses_init(g, &r.uses);
    r.scaled = ac_arena_alloc(&work, n * sizeof *r.scaled);
    r.times = ac_arena_alloc(&work, n * sizeof *r.times);
    if (status == AC_OK && (!r.scaled || !r.times)) {
        status = ac_no_memory(n * sizeof *r.times);
    }
    if (status == AC_OK) {
        memset(r.times, 0xff, n * sizeof *r.times); /* AC_NONE */
        status = rescale(&r);
    }
    ac_uses_deinit(&r.uses);
    ac_arena_deinit(&work);
    return status;
}

const ac_pass ac_pass_rescale = {
    .name = "rescale",
    .why = "the residual stream times a power of two, so that f16 holds it",
    .run = run,
};
