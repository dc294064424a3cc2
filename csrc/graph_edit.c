/* graph_edit: what passes use to change a graph and to prove it whole: replace, uses, sort, verify,
 * find, and dumps as text and JSON.  graph.c builds, this file edits. */
#include "graph.h"

#include <string.h>

void
ac_graph_replace(ac_graph *g, ac_val from, ac_val to)
{
    if (g->status || from == to) {
        return;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        for (int32_t k = 0; k < g->nodes[i].n_inputs; k++) {
            if (g->nodes[i].input[k] == from) {
                g->nodes[i].input[k] = to;
            }
        }
    }
    if (g->values[from].output) {
        g->values[to].output = g->values[from].output;
        g->values[from].output = NULL;
    }
}

int32_t *
ac_graph_uses(const ac_graph *g)
{
    int32_t *uses = ac_calloc((size_t)AC_MAX(g->n_values, 1), sizeof *uses);
    if (!uses) {
        return NULL;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        for (int32_t k = 0; !node->dead && k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE) {
                uses[node->input[k]]++;
            }
        }
    }
    for (int32_t v = 0; v < g->n_values; v++) {
        uses[v] += g->values[v].output != NULL;
    }
    return uses;
}

ac_val
ac_graph_find_input(const ac_graph *g, const char *name)
{
    for (int32_t v = 0; v < g->n_values; v++) {
        if (g->values[v].kind == AC_VALUE_INPUT && strcmp(g->values[v].name, name) == 0) {
            return v;
        }
    }
    return AC_NONE;
}

ac_val
ac_graph_find_output(const ac_graph *g, const char *name)
{
    for (int32_t v = 0; v < g->n_values; v++) {
        if (g->values[v].output && strcmp(g->values[v].output, name) == 0) {
            return v;
        }
    }
    return AC_NONE;
}

/* ---- sort ------------------------------------------------------------------------------------ */

enum { UNSEEN, OPEN, PLACED };

typedef struct sorter {
    ac_graph *g;
    uint8_t *state;   /* one a node */
    int32_t *order;   /* nodes in their new order */
    int32_t *stack;   /* nodes being visited */
    int32_t *next;    /* per node: the operand to look at next */
    int32_t n_order;
} sorter;

/* Depth first from one node with an explicit stack: operands' producers go first. */
static ac_status
place(sorter *s, int32_t root)
{
    ac_graph *g = s->g;
    int32_t depth = 0;
    s->stack[depth++] = root;
    s->state[root] = OPEN;
    while (depth) {
        int32_t at = s->stack[depth - 1];
        const ac_node *node = &g->nodes[at];
        if (s->next[at] == node->n_inputs) {
            s->state[at] = PLACED;
            s->order[s->n_order++] = at;
            depth--;
            continue;
        }
        ac_val v = node->input[s->next[at]++];
        int32_t from = v == AC_NONE ? AC_NONE : g->values[v].node;
        if (from == AC_NONE || s->state[from] == PLACED) {
            continue;
        }
        if (s->state[from] == OPEN) {
            return ac_error(AC_E_INTERNAL, "%s: the graph has a cycle", g->nodes[from].name);
        }
        s->state[from] = OPEN;
        s->stack[depth++] = from;
    }
    return AC_OK;
}

/* Nodes that an output needs, found from the outputs backwards. */
static void
mark_live(const ac_graph *g, uint8_t *live, int32_t *stack)
{
    int32_t depth = 0;
    for (int32_t v = 0; v < g->n_values; v++) {
        int32_t node = g->values[v].node;
        if (g->values[v].output && node != AC_NONE && !live[node]) {
            live[node] = 1;
            stack[depth++] = node;
        }
    }
    while (depth) {
        const ac_node *node = &g->nodes[stack[--depth]];
        for (int32_t k = 0; k < node->n_inputs; k++) {
            int32_t from = node->input[k] == AC_NONE ? AC_NONE : g->values[node->input[k]].node;
            if (from != AC_NONE && !live[from]) {
                live[from] = 1;
                stack[depth++] = from;
            }
        }
    }
}

/* Puts the nodes into the new order, drops the others and recomputes rates. */
static void
rebuild(sorter *s, ac_node *nodes)
{
    ac_graph *g = s->g;
    for (int32_t i = 0; i < g->n_nodes; i++) {
        g->values[g->nodes[i].output].node = AC_NONE;
    }
    memcpy(nodes, g->nodes, (size_t)g->n_nodes * sizeof *nodes);
    for (int32_t i = 0; i < s->n_order; i++) {
        ac_node *node = &g->nodes[i];
        *node = nodes[s->order[i]];
        ac_value *value = &g->values[node->output];
        value->node = i;
        value->rate = AC_RATE_LOAD;
        for (int32_t k = 0; k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE) {
                value->rate = AC_MAX(value->rate, g->values[node->input[k]].rate);
            }
        }
    }
    g->n_nodes = s->n_order;
}

ac_status
ac_graph_sort(ac_graph *g)
{
    AC_TRY(ac_graph_status(g));
    size_t n = (size_t)AC_MAX(g->n_nodes, 1);
    ac_arena work;
    ac_arena_init(&work);
    sorter s = {.g = g};
    uint8_t *live = ac_arena_alloc(&work, n);
    ac_node *nodes = ac_arena_alloc(&work, n * sizeof *nodes);
    s.state = ac_arena_alloc(&work, n);
    s.order = ac_arena_alloc(&work, n * sizeof *s.order);
    s.stack = ac_arena_alloc(&work, n * sizeof *s.stack);
    s.next = ac_arena_alloc(&work, n * sizeof *s.next);
    ac_status status = AC_OK;
    if (!live || !nodes || !s.state || !s.order || !s.stack || !s.next) {
        status = ac_no_memory(n * sizeof *nodes);
    } else {
        mark_live(g, live, s.stack);
        for (int32_t i = 0; i < g->n_nodes && status == AC_OK; i++) {
            if (live[i] && s.state[i] == UNSEEN) {
                status = place(&s, i);
            }
        }
        if (status == AC_OK) {
            rebuild(&s, nodes);
        }
    }
    ac_arena_deinit(&work);
    return status;
}

/* ---- verify ---------------------------------------------------------------------------------- */

static ac_status
verify_node(const ac_graph *g, int32_t at)
{
    const ac_node *node = &g->nodes[at];
    if (node->output < 0 || node->output >= g->n_values || g->values[node->output].node != at) {
        return ac_error(AC_E_INTERNAL, "%s: its result does not name it as producer", node->name);
    }
    ac_shape *shapes = ac_malloc((size_t)AC_MAX(node->n_inputs, 1) * sizeof *shapes);
    if (!shapes) {
        return ac_no_memory((size_t)node->n_inputs * sizeof *shapes);
    }
    ac_status status = AC_OK;
    ac_rate rate = AC_RATE_LOAD;
    for (int32_t k = 0; k < node->n_inputs && status == AC_OK; k++) {
        ac_val v = node->input[k];
        shapes[k] = v == AC_NONE ? (ac_shape){.rank = -1} : g->values[v].shape;
        if (v < AC_NONE || v >= g->n_values) {
            status = ac_error(AC_E_INTERNAL, "%s: operand %d is no value", node->name, k);
        } else if (v != AC_NONE) {
            const ac_value *value = &g->values[v];
            rate = AC_MAX(rate, value->rate);
            if (value->kind == AC_VALUE_TEMP && (value->node == AC_NONE || value->node >= at)) {
                status = ac_error(AC_E_INTERNAL, "%s: operand %d (%s) is not computed before it",
                                  node->name, k, value->name);
            }
        }
    }
    const ac_value *result = &g->values[node->output];
    ac_shape shape = result->shape;
    if (status == AC_OK) {
        status = ac_op_shape(node->op, &node->attr, shapes, node->n_inputs, &shape);
    }
    if (status == AC_OK && (!ac_shape_equal(&shape, &result->shape) || rate != result->rate)) {
        status = ac_error(AC_E_INTERNAL, "%s: its result's shape or rate is not the rule's",
                          node->name);
    }
    ac_free(shapes);
    return status;
}

ac_status
ac_graph_verify(const ac_graph *g)
{
    if (g->status) {
        return ac_error(g->status, "%s", g->message ? g->message : "out of memory");
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        AC_TRY(verify_node(g, i));
    }
    return AC_OK;
}

/* ---- dumps ----------------------------------------------------------------------------------- */

static void
dump_operand(const ac_graph *g, ac_val v, ac_text *text)
{
    if (v == AC_NONE) {
        ac_text_printf(text, " -");
    } else if (g->values[v].kind == AC_VALUE_TEMP) {
        ac_text_printf(text, " %%%d", v);
    } else {
        ac_text_printf(text, " %s", g->values[v].name);
    }
}

void
ac_graph_dump(const ac_graph *g, ac_text *text)
{
    char shape[AC_SHAPE_TEXT];
    for (int32_t v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        if (value->kind == AC_VALUE_INPUT) {
            ac_text_printf(text, "input %s: %s %s, %s\n", value->name,
                           ac_dtype_name(value->dtype), ac_shape_text(&value->shape, shape),
                           ac_rate_name(value->rate));
        }
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        const ac_value *value = &g->values[node->output];
        ac_text_printf(text, "%%%d = %s", node->output, ac_op_name(node->op));
        for (int32_t k = 0; k < node->n_inputs; k++) {
            dump_operand(g, node->input[k], text);
        }
        ac_text_printf(text, " {");
        ac_op_attr_text(node->op, &node->attr, text);
        ac_text_printf(text, "} : %s %s, %s  # %s%s%s\n", ac_dtype_name(value->dtype),
                       ac_shape_text(&value->shape, shape), ac_rate_name(value->rate), node->name,
                       value->output ? " -> " : "", value->output ? value->output : "");
    }
}

/* "dtype" and "shape" of a value, as the plan's operands have them. */
static void
type_json(const ac_value *value, ac_text *text)
{
    char shape[AC_SHAPE_TEXT];
    ac_text_printf(text, "\"dtype\":\"%s\",\"shape\":%s", ac_dtype_name(value->dtype),
                   ac_shape_text(&value->shape, shape));
}

/* What comes in from outside: inputs, or those weights that are in use. */
static void
sources_json(const ac_graph *g, ac_value_kind kind, const int32_t *uses, ac_text *text)
{
    const char *comma = "";
    for (ac_val v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        if (value->kind != kind || (kind == AC_VALUE_WEIGHT && !uses[v])) {
            continue;
        }
        ac_text_printf(text, "%s\n{\"id\":%d,\"name\":", comma, v);
        ac_text_json_string(text, value->name);
        ac_text_printf(text, ",\"rate\":\"%s\",", ac_rate_name(value->rate));
        type_json(value, text);
        ac_text_printf(text, "}");
        comma = ",";
    }
}

static void
node_json(const ac_graph *g, const ac_node *node, ac_text *text)
{
    const ac_value *value = &g->values[node->output];
    ac_text_printf(text, "{\"rate\":\"%s\",\"op\":\"%s\",\"node\":", ac_rate_name(value->rate),
                   ac_op_name(node->op));
    ac_text_json_string(text, node->name);
    ac_text_printf(text, ",\"output\":{\"id\":%d,", node->output);
    type_json(value, text);
    ac_text_printf(text, "},\"attr\":");
    ac_op_attr_json(node->op, &node->attr, text);
    ac_text_printf(text, ",\"input\":[");
    for (int32_t k = 0; k < node->n_inputs; k++) {
        ac_text_printf(text, k ? "," : "");
        ac_text_printf(text, node->input[k] == AC_NONE ? "null" : "%d", node->input[k]);
    }
    ac_text_printf(text, "]}");
}

void
ac_graph_json(const ac_graph *g, ac_text *text)
{
    int32_t *uses = ac_graph_uses(g);
    if (!uses) {
        text->failed = true;
        return;
    }
    ac_text_printf(text, "{\"inputs\":[");
    sources_json(g, AC_VALUE_INPUT, uses, text);
    ac_text_printf(text, "],\n\"weights\":[");
    sources_json(g, AC_VALUE_WEIGHT, uses, text);
    ac_text_printf(text, "],\n\"nodes\":[");
    for (int32_t i = 0; i < g->n_nodes; i++) {
        ac_text_printf(text, i ? ",\n" : "\n");
        node_json(g, &g->nodes[i], text);
    }
    ac_text_printf(text, "],\n\"outputs\":[");
    const char *comma = "";
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].output) {
            ac_text_printf(text, "%s{\"id\":%d,\"name\":", comma, v);
            ac_text_json_string(text, g->values[v].output);
            ac_text_printf(text, "}");
            comma = ",";
        }
    }
    ac_text_printf(text, "]}");
    ac_free(uses);
}
