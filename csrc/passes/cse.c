/* cse: nodes with the same op, attributes and operands become one.
 *
 * Models are written like diffusers, where every resnet applies silu to the same time embedding.
 * Here that is one node, and the projections after it share an input.  All ops are pure, so equal
 * nodes have equal results.
 */
#include "edit.h"

#include <string.h>

/* Attributes field by field: bytes of the union that an op does not use are unspecified. */
static bool
same_attr(ac_op op, const ac_attr *a, const ac_attr *b)
{
    switch (op) {
    case AC_OP_LINEAR:
        return a->linear.act == b->linear.act && a->linear.gated == b->linear.gated;
    case AC_OP_CONV2D:
        return a->conv2d.stride == b->conv2d.stride && a->conv2d.pad_top == b->conv2d.pad_top &&
               a->conv2d.pad_left == b->conv2d.pad_left &&
               a->conv2d.pad_bottom == b->conv2d.pad_bottom &&
               a->conv2d.pad_right == b->conv2d.pad_right && a->conv2d.act == b->conv2d.act;
    case AC_OP_UP_CONV2D:
        return a->up_conv2d.act == b->up_conv2d.act;
    case AC_OP_GROUP_NORM:
        return a->group_norm.groups == b->group_norm.groups &&
               a->group_norm.eps == b->group_norm.eps &&
               a->group_norm.act == b->group_norm.act &&
               a->group_norm.exponent == b->group_norm.exponent;
    case AC_OP_LAYER_NORM:
        return a->layer_norm.eps == b->layer_norm.eps;
    case AC_OP_ATTENTION:
        return a->attention.heads == b->attention.heads &&
               a->attention.scale == b->attention.scale &&
               a->attention.causal == b->attention.causal;
    case AC_OP_ACTIVATION:
    case AC_OP_GATE:
        return a->activation.act == b->activation.act;
    case AC_OP_SCALE:
        return a->scale.scale == b->scale.scale && a->scale.offset == b->scale.offset;
    case AC_OP_CONCAT:
        return a->axis.axis == b->axis.axis;
    case AC_OP_SLICE:
        return a->axis.axis == b->axis.axis && a->axis.start == b->axis.start;
    case AC_OP_TIMESTEP:
        return a->timestep.channels == b->timestep.channels &&
               a->timestep.flip_sin_to_cos == b->timestep.flip_sin_to_cos &&
               a->timestep.freq_shift == b->timestep.freq_shift;
    case AC_OP_EOS_POOL:
        return a->eos_pool.eos_id == b->eos_pool.eos_id;
    case AC_OP_FILL:
        return memcmp(&a->fill.value, &b->fill.value, sizeof a->fill.value) == 0; /* -0 is not 0 */
    default: /* no attributes */
        return true;
    }
}

static bool
same_node(const ac_graph *g, const ac_node *a, const ac_node *b)
{
    const ac_value *x = &g->values[a->output], *y = &g->values[b->output];
    return a->op == b->op && a->n_inputs == b->n_inputs && x->dtype == y->dtype &&
           memcmp(a->input, b->input, (size_t)a->n_inputs * sizeof *a->input) == 0 &&
           ac_shape_equal(&x->shape, &y->shape) && same_attr(a->op, &a->attr, &b->attr);
}

/* Slot of an equal node seen before, or the free slot for this one. */
static size_t
find_slot(const ac_graph *g, const int32_t *table, size_t capacity, const ac_node *node)
{
    uint64_t hash = ac_hash(&node->op, sizeof node->op, AC_HASH_SEED);
    hash = ac_hash(node->input, (size_t)node->n_inputs * sizeof *node->input, hash);
    size_t at = (size_t)(hash ^ hash >> 32) & (capacity - 1);
    while (table[at] && !same_node(g, &g->nodes[table[at] - 1], node)) {
        at = (at + 1) & (capacity - 1);
    }
    return at;
}

static ac_status
run(ac_graph *g)
{
    size_t capacity = 64;
    while (capacity < 2 * (size_t)g->n_nodes) {
        capacity *= 2;
    }
    ac_forward forward;
    AC_TRY(ac_forward_init(g, &forward));
    int32_t *table = ac_calloc(capacity, sizeof *table); /* node + 1; 0: free */
    if (!table) {
        ac_forward_deinit(&forward);
        return ac_no_memory(capacity * sizeof *table);
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        ac_node *node = &g->nodes[i];
        ac_forward_operands(&forward, node);
        size_t at = find_slot(g, table, capacity, node);
        if (!table[at]) {
            table[at] = i + 1;
        } else {
            ac_forward_set(g, &forward, node->output, g->nodes[table[at] - 1].output);
        }
    }
    ac_free(table);
    ac_forward_deinit(&forward);
    return AC_OK;
}

const ac_pass ac_pass_cse = {
    .name = "cse",
    .why = "equal nodes become one",
    .run = run,
};
