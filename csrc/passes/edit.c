/* edit: use counts, in-place node changes and forwarding of values.  See edit.h. */
#include "edit.h"

#include <assert.h>
#include <string.h>

ac_status
ac_uses_init(const ac_graph *g, ac_uses *uses)
{
    size_t bytes = (size_t)AC_MAX(g->n_values, 1) * sizeof *uses->user;
    *uses = (ac_uses){.n = g->n_values};
    uses->count = ac_graph_uses(g);
    uses->user = ac_malloc(bytes);
    if (!uses->count || !uses->user) {
        ac_uses_deinit(uses);
        return ac_no_memory(bytes);
    }
    for (int32_t v = 0; v < g->n_values; v++) {
        uses->user[v] = AC_NONE;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        for (int32_t k = 0; !node->dead && k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE) {
                uses->user[node->input[k]] = i;
            }
        }
    }
    return AC_OK;
}

void
ac_uses_deinit(ac_uses *uses)
{
    ac_free(uses->count);
    ac_free(uses->user);
    *uses = (ac_uses){0};
}

int32_t
ac_sole_user(const ac_graph *g, const ac_uses *uses, ac_val v)
{
    bool sole = v != AC_NONE && v < uses->n && uses->count[v] == 1 && !g->values[v].output;
    return sole ? uses->user[v] : AC_NONE;
}

int32_t
ac_sole_producer(const ac_graph *g, const ac_uses *uses, ac_val v, ac_op op)
{
    const ac_node *node = ac_producer(g, v);
    bool sole = node && node->op == op && ac_sole_user(g, uses, v) != AC_NONE;
    return sole ? g->values[v].node : AC_NONE;
}

ac_status
ac_node_set(ac_graph *g, int32_t at, int32_t slot, ac_val v)
{
    ac_node *node = &g->nodes[at];
    if (slot >= node->n_inputs) {
        size_t bytes = (size_t)(slot + 1) * sizeof *node->input;
        ac_val *grown = ac_arena_alloc(&g->arena, bytes);
        if (!grown) {
            return ac_no_memory(bytes);
        }
        for (int32_t k = 0; k <= slot; k++) {
            grown[k] = ac_node_operand(node, k);
        }
        node->input = grown;
        node->n_inputs = slot + 1;
    }
    node->input[slot] = v;
    return AC_OK;
}

ac_status
ac_node_become(ac_graph *g, int32_t at, ac_op op, const ac_attr *attr, const ac_val *input,
               int32_t n_inputs)
{
    size_t bytes = (size_t)AC_MAX(n_inputs, 1) * sizeof *input;
    ac_val *copy = ac_arena_alloc(&g->arena, bytes);
    if (!copy) {
        return ac_no_memory(bytes);
    }
    memcpy(copy, input, (size_t)n_inputs * sizeof *input);
    ac_node *node = &g->nodes[at];
    node->op = op;
    node->attr = attr ? *attr : (ac_attr){0};
    node->input = copy;
    node->n_inputs = n_inputs;
    return AC_OK;
}

ac_status
ac_node_take_over(ac_graph *g, int32_t at, int32_t from)
{
    assert(at != from);
    const ac_node source = g->nodes[from];
    AC_TRY(ac_node_become(g, at, source.op, &source.attr, source.input, source.n_inputs));
    g->nodes[at].name = source.name;
    g->values[g->nodes[at].output].name = source.name;
    return AC_OK;
}

ac_status
ac_forward_init(const ac_graph *g, ac_forward *forward)
{
    size_t bytes = (size_t)AC_MAX(g->n_values, 1) * sizeof *forward->to;
    forward->to = ac_malloc(bytes);
    if (!forward->to) {
        return ac_no_memory(bytes);
    }
    for (ac_val v = 0; v < g->n_values; v++) {
        forward->to[v] = v;
    }
    return AC_OK;
}

void
ac_forward_deinit(ac_forward *forward)
{
    ac_free(forward->to);
}

void
ac_forward_operands(const ac_forward *forward, ac_node *node)
{
    for (int32_t k = 0; k < node->n_inputs; k++) {
        if (node->input[k] != AC_NONE) {
            node->input[k] = forward->to[node->input[k]];
        }
    }
}

bool
ac_forward_set(ac_graph *g, ac_forward *forward, ac_val from, ac_val to)
{
    ac_value *old = &g->values[from], *new = &g->values[to];
    if (old->output) {
        if (new->kind != AC_VALUE_TEMP || new->output) {
            return false;
        }
        new->output = old->output;
        old->output = NULL;
    }
    forward->to[from] = to;
    return true;
}
