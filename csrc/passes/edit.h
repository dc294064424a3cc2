/* edit: what passes share: who uses a value, and in-place changes of one node.
 *
 * Passes rarely redirect uses.  The last node of a chain takes the whole chain over and keeps its
 * result, so nothing that reads the result has to change, and its place in the order stays right.
 */
#ifndef AC_PASSES_EDIT_H
#define AC_PASSES_EDIT_H

#include "passes.h"

/* Uses of the values that existed when it was made. */
typedef struct ac_uses {
    int32_t n;      /* values */
    int32_t *count; /* live nodes and graph outputs that read the value */
    int32_t *user;  /* last node that reads it, or AC_NONE */
} ac_uses;

ac_status ac_uses_init(const ac_graph *g, ac_uses *uses);
void ac_uses_deinit(ac_uses *uses);

/* The only node that reads `v`, or AC_NONE when there are others or `v` is a graph output. */
int32_t ac_sole_user(const ac_graph *g, const ac_uses *uses, ac_val v);
/* The node that computes `v` when it has this op and nothing else reads `v`, or AC_NONE. */
int32_t ac_sole_producer(const ac_graph *g, const ac_uses *uses, ac_val v, ac_op op);

static inline ac_val
ac_node_operand(const ac_node *node, int32_t slot)
{
    return slot < node->n_inputs ? node->input[slot] : AC_NONE;
}

/* Sets operand `slot`, growing the operand list when needed. */
ac_status ac_node_set(ac_graph *g, int32_t at, int32_t slot, ac_val v);
/* Node `at` becomes another op; its result keeps index, shape and dtype.  `input` is copied. */
ac_status ac_node_become(ac_graph *g, int32_t at, ac_op op, const ac_attr *attr,
                         const ac_val *input, int32_t n_inputs);
/* Node `at` becomes a copy of `from`, op, name and operands, and keeps its own result. */
ac_status ac_node_take_over(ac_graph *g, int32_t at, int32_t from);

/* Replacement of many values in one sweep over the nodes in order: `to[v]` is what to read instead
 * of v.  Map the operands of a node before looking at it. */
typedef struct ac_forward {
    ac_val *to;
} ac_forward;

ac_status ac_forward_init(const ac_graph *g, ac_forward *forward);
void ac_forward_deinit(ac_forward *forward);
void ac_forward_operands(const ac_forward *forward, ac_node *node);
/* Reads of `from` become reads of `to`, and so does its name as a graph output.  False, with
 * nothing done, when a graph output would have no value of its own. */
bool ac_forward_set(ac_graph *g, ac_forward *forward, ac_val from, ac_val to);

extern const ac_pass ac_pass_simplify, ac_pass_cse, ac_pass_merge_linears,
    ac_pass_phase_upsample, ac_pass_fuse_norm, ac_pass_fuse_epilogue, ac_pass_rescale;

#endif
