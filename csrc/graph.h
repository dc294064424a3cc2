/* graph: what to compute.  Values and nodes by int32 index; no device, no memory.
 *
 *     models/ -> [graph] -> passes/ -> plan
 *
 * A node has one result.  Shapes are concrete: another size is another graph, built in well under
 * a millisecond per hundred nodes.  Everything lives in the graph's arena and goes with it.
 */
#ifndef AC_GRAPH_H
#define AC_GRAPH_H

#include "ops.h"

/* How often a value changes.  A node's rate is the highest of its operands', so what depends only
 * on slow inputs runs once (design 4.1).  LOAD: weights alone; such results are derived weights. */
typedef enum ac_rate {
    AC_RATE_LOAD,
    AC_RATE_PROMPT,
    AC_RATE_SCHEDULE,
    AC_RATE_STEP,
    AC_RATE_COUNT
} ac_rate;

const char *ac_rate_name(ac_rate rate);

typedef enum ac_value_kind { AC_VALUE_INPUT, AC_VALUE_WEIGHT, AC_VALUE_TEMP } ac_value_kind;

typedef struct ac_value {
    const char *name;   /* input: its name; weight: its name in the file; temp: its node's name */
    ac_value_kind kind;
    ac_dtype dtype;
    ac_shape shape;
    ac_rate rate;
    int32_t node;       /* producer, AC_NONE for inputs and weights */
    const char *output; /* name as a graph output, or NULL */
} ac_value;

typedef struct ac_node {
    ac_op op;
    const char *name;   /* "down_blocks.0.resnets.1.conv1": diffusers' module path */
    ac_attr attr;
    int32_t n_inputs;
    ac_val *input;      /* n_inputs values, AC_NONE where an optional operand is absent */
    ac_val output;
    bool dead;          /* dropped by ac_graph_sort */
} ac_node;

struct ac_graph {
    ac_arena arena;
    ac_value *values; /* heap arrays, grown by doubling */
    int32_t n_values, cap_values;
    ac_node *nodes;   /* topological order, except inside a pass */
    int32_t n_nodes, cap_nodes;
    ac_map weights;   /* name -> value: one value a weight, however often it is used */
    ac_dtype dtype;   /* of activations */
    int32_t tf32;     /* AC_TF32_*: what devices that have it may do */
    int32_t stream_exponent; /* the residual stream is kept times 2^this: passes/rescale.c */
    ac_status status; /* sticky; 0 while all is well */
    char *message;    /* of the first error, in the arena */
    char scope[512];  /* prefix of names, "down_blocks.0." */
    int16_t scope_at[32]; /* bytes of scope before each ac_push; a pushed name may hold dots */
    int32_t depth;        /* of scope_at */
    const char *next_name; /* from ac_name; borrowed until the next node */
};

ac_status ac_graph_new(ac_dtype dtype, ac_graph **out);
void ac_graph_free(ac_graph *g); /* NULL is fine */

/* Scopes name what is built between them; ac_push returns nothing and cannot fail visibly (too
 * deep is a sticky error).  Balanced by ac_pop. */
void ac_push(ac_graph *g, const char *format, ...) AC_PRINTF(2, 3);
void ac_pop(ac_graph *g);

ac_val ac_input(ac_graph *g, const char *name, ac_dtype dtype, ac_shape shape, ac_rate rate);
/* Weight `scope + name` of this shape; its dtype is the graph's until model.c knows the
 * weights themselves. */
ac_val ac_weight(ac_graph *g, const char *name, ac_shape shape);
void ac_output(ac_graph *g, ac_val value, const char *name);
/* Name of the next nodes relative to the scope ("to_q"); used by the op builders, NULL: the op. */
void ac_name(ac_graph *g, const char *name);

/* First error, unless one is set already. */
void ac_graph_fail(ac_graph *g, ac_status status, const char *format, ...) AC_PRINTF(3, 4);
/* The sticky status, with its message put into the thread's buffer. */
ac_status ac_graph_status(ac_graph *g);

/* ---- for passes ------------------------------------------------------------------------------ */

/* Appends a node with its shape rule applied; `wanted` as in ac_op_shape or NULL.  The result's
 * dtype is `dtype`.  `name` is copied.  A pass may append in any order and then sort. */
ac_val ac_graph_node(ac_graph *g, ac_op op, const ac_attr *attr, const ac_val *input,
                     int32_t n_inputs, ac_dtype dtype, const ac_shape *wanted, const char *name);
/* Every use of `from`, graph outputs too, becomes a use of `to`. */
void ac_graph_replace(ac_graph *g, ac_val from, ac_val to);
/* Uses of each value by live nodes and graph outputs; array of n_values, caller ac_free's. */
int32_t *ac_graph_uses(const ac_graph *g);
/* Restores topological order (stable), drops dead and unused nodes, recomputes rates.  INTERNAL
 * error on a cycle. */
ac_status ac_graph_sort(ac_graph *g);
/* Every invariant: order, indices, shapes and dtypes by the rules.  For tests and debug builds. */
ac_status ac_graph_verify(const ac_graph *g);

ac_val ac_graph_find_input(const ac_graph *g, const char *name);  /* AC_NONE: absent */
ac_val ac_graph_find_output(const ac_graph *g, const char *name);
/* One line a node, with shapes, rates and attributes. */
void ac_graph_dump(const ac_graph *g, ac_text *text);
/* The same as JSON.  Values have ids; an absent optional operand is null:
 *   {"inputs": [{"id", "name", "rate", "dtype", "shape"}], "weights": [the same, those in use],
 *    "nodes": [{"rate", "op", "node": its name, "output": {"id", "dtype", "shape"}, "attr": {},
 *               "input": [ids]}], "outputs": [{"id", "name"}]} */
void ac_graph_json(const ac_graph *g, ac_text *text);

static inline const ac_node *
ac_producer(const ac_graph *g, ac_val v)
{
    return v == AC_NONE || g->values[v].node == AC_NONE ? NULL : &g->nodes[g->values[v].node];
}

#endif
