/* graph: storage of values and nodes, scopes, the sort that passes rely on, verify and dump. */
#include "graph.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

static const char *const rates[AC_RATE_COUNT] = {"load", "prompt", "schedule", "step"};

const char *
ac_rate_name(ac_rate rate)
{
    return rates[rate];
}

ac_status
ac_graph_new(ac_dtype dtype, ac_graph **out)
{
    ac_graph *g = ac_calloc(1, sizeof *g);
    if (!g) {
        return ac_no_memory(sizeof *g);
    }
    ac_arena_init(&g->arena);
    g->dtype = dtype;
    *out = g;
    return AC_OK;
}

void
ac_graph_free(ac_graph *g)
{
    if (!g) {
        return;
    }
    ac_arena_deinit(&g->arena);
    ac_map_deinit(&g->weights);
    ac_free(g->values);
    ac_free(g->nodes);
    ac_free(g);
}

/* ---- sticky errors --------------------------------------------------------------------------- */

/* Keeps the message that is in the thread's buffer. */
static void
keep_error(ac_graph *g, ac_status status)
{
    if (!g->status) {
        g->status = status;
        g->message = ac_arena_strdup(&g->arena, ac_error_message());
    }
}

void
ac_graph_fail(ac_graph *g, ac_status status, const char *format, ...)
{
    if (g->status) {
        return;
    }
    va_list args;
    va_start(args, format);
    ac_verror(status, format, args);
    va_end(args);
    if (g->scope[0]) {
        ac_error_prefix(status, "%.*s", (int)strlen(g->scope) - 1, g->scope);
    }
    keep_error(g, status);
}

ac_status
ac_graph_status(ac_graph *g)
{
    return g->status ? ac_error(g->status, "%s", g->message ? g->message : "out of memory") : AC_OK;
}

static ac_val
out_of_memory(ac_graph *g, size_t bytes)
{
    keep_error(g, ac_no_memory(bytes));
    return AC_NONE;
}

/* ---- names ----------------------------------------------------------------------------------- */

void
ac_push(ac_graph *g, const char *format, ...)
{
    size_t used = strlen(g->scope), room = sizeof g->scope - used;
    va_list args;
    va_start(args, format);
    int length = vsnprintf(g->scope + used, room, format, args);
    va_end(args);
    if (length < 0 || (size_t)length + 2 > room || g->depth >= (int32_t)AC_ARRAY_LEN(g->scope_at)) {
        g->scope[used] = '\0';
        ac_graph_fail(g, AC_E_INTERNAL, "scope: found a name longer than %zu bytes or %zu levels",
                      sizeof g->scope, AC_ARRAY_LEN(g->scope_at));
    } else {
        memcpy(g->scope + used + length, ".", 2);
    }
    if (g->depth < (int32_t)AC_ARRAY_LEN(g->scope_at)) {
        g->scope_at[g->depth] = (int16_t)used;
    }
    g->depth++;
}

void
ac_pop(ac_graph *g)
{
    assert(g->depth > 0);
    g->depth--;
    if (g->depth < (int32_t)AC_ARRAY_LEN(g->scope_at)) {
        g->scope[g->scope_at[g->depth]] = '\0';
    }
}

void
ac_name(ac_graph *g, const char *name)
{
    g->next_name = name;
}

/* "<scope><next name or op>", and forgets the next name. */
static const char *
take_name(ac_graph *g, ac_op op)
{
    const char *last = g->next_name ? g->next_name : ac_op_name(op);
    g->next_name = NULL;
    return ac_arena_printf(&g->arena, "%s%s", g->scope, last);
}

/* ---- values and nodes ------------------------------------------------------------------------ */

static ac_val
add_value(ac_graph *g, ac_value value)
{
    if (g->n_values == g->cap_values) {
        int32_t capacity = AC_MAX(2 * g->cap_values, 256);
        ac_value *grown = ac_realloc(g->values, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return out_of_memory(g, (size_t)capacity * sizeof *grown);
        }
        g->values = grown;
        g->cap_values = capacity;
    }
    g->values[g->n_values] = value;
    return g->n_values++;
}

ac_val
ac_input(ac_graph *g, const char *name, ac_dtype dtype, ac_shape shape, ac_rate rate)
{
    if (g->status) {
        return AC_NONE;
    }
    if (ac_shape_count(&shape) < 1) {
        char text[AC_SHAPE_TEXT];
        ac_graph_fail(g, AC_E_SHAPE, "%s: found %s, expected no empty dimension", name,
                      ac_shape_text(&shape, text));
        return AC_NONE;
    }
    char *copy = ac_arena_strdup(&g->arena, name);
    if (!copy) {
        return out_of_memory(g, strlen(name));
    }
    return add_value(g, (ac_value){.name = copy, .kind = AC_VALUE_INPUT, .dtype = dtype,
                                   .shape = shape, .rate = rate, .node = AC_NONE});
}

ac_val
ac_weight(ac_graph *g, const char *name, ac_shape shape)
{
    if (g->status) {
        return AC_NONE;
    }
    char *full = ac_arena_printf(&g->arena, "%s%s", g->scope, name);
    if (!full) {
        return out_of_memory(g, strlen(name));
    }
    ac_val known = ac_map_get(&g->weights, full);
    if (known != AC_NONE) {
        if (!ac_shape_equal(&g->values[known].shape, &shape)) {
            ac_graph_fail(g, AC_E_INTERNAL, "%s: the model uses it with two shapes", full);
        }
        return known;
    }
    ac_val value = add_value(g, (ac_value){.name = full, .kind = AC_VALUE_WEIGHT,
                                           .dtype = g->dtype, .shape = shape,
                                           .rate = AC_RATE_LOAD, .node = AC_NONE});
    if (value != AC_NONE && ac_map_put(&g->weights, full, value) < 0) {
        keep_error(g, AC_E_MEMORY);
        return AC_NONE;
    }
    return value;
}

void
ac_output(ac_graph *g, ac_val value, const char *name)
{
    if (g->status || value == AC_NONE) {
        return;
    }
    g->values[value].output = ac_arena_strdup(&g->arena, name);
    if (!g->values[value].output) {
        out_of_memory(g, strlen(name));
    }
}

static ac_rate
node_rate(const ac_graph *g, const ac_node *node)
{
    ac_rate rate = AC_RATE_LOAD;
    for (int32_t i = 0; i < node->n_inputs; i++) {
        if (node->input[i] != AC_NONE) {
            rate = AC_MAX(rate, g->values[node->input[i]].rate);
        }
    }
    return rate;
}

/* Most nodes have few operands; a merged GEMM's concat of weights may have hundreds. */
#define FEW_INPUTS 8

static ac_status
infer_shape(const ac_graph *g, const ac_node *node, ac_shape *out)
{
    ac_shape few[FEW_INPUTS] = {0}, *shapes = few;
    if (node->n_inputs > FEW_INPUTS) {
        shapes = ac_malloc((size_t)node->n_inputs * sizeof *shapes);
        if (!shapes) {
            return ac_no_memory((size_t)node->n_inputs * sizeof *shapes);
        }
    }
    for (int32_t i = 0; i < node->n_inputs; i++) {
        shapes[i] = node->input[i] == AC_NONE ? (ac_shape){.rank = -1}
                                              : g->values[node->input[i]].shape;
    }
    ac_status status = ac_op_shape(node->op, &node->attr, shapes, node->n_inputs, out);
    if (shapes != few) {
        ac_free(shapes);
    }
    return status;
}

static ac_status
reserve_node(ac_graph *g)
{
    if (g->n_nodes < g->cap_nodes) {
        return AC_OK;
    }
    int32_t capacity = AC_MAX(2 * g->cap_nodes, 256);
    ac_node *grown = ac_realloc(g->nodes, (size_t)capacity * sizeof *grown);
    if (!grown) {
        return ac_no_memory((size_t)capacity * sizeof *grown);
    }
    g->nodes = grown;
    g->cap_nodes = capacity;
    return AC_OK;
}

/* Appends the node; `name` is the arena's. */
static ac_val
add_node(ac_graph *g, ac_op op, const ac_attr *attr, const ac_val *input, int32_t n_inputs,
         ac_dtype dtype, const ac_shape *wanted, const char *name)
{
    while (n_inputs > 0 && input[n_inputs - 1] == AC_NONE) {
        n_inputs--; /* absent operands at the end need no slot */
    }
    ac_node node = {.op = op, .name = name, .n_inputs = n_inputs};
    node.attr = attr ? *attr : (ac_attr){0};
    node.input = ac_arena_alloc(&g->arena, (size_t)AC_MAX(n_inputs, 1) * sizeof *input);
    if (!name || !node.input) {
        return out_of_memory(g, (size_t)n_inputs * sizeof *input);
    }
    if (n_inputs) {
        memcpy(node.input, input, (size_t)n_inputs * sizeof *input);
    }
    ac_shape shape = wanted ? *wanted : (ac_shape){0};
    ac_status status = infer_shape(g, &node, &shape);
    if (status < 0) {
        keep_error(g, ac_error_prefix(status, "%s", name));
        return AC_NONE;
    }
    if ((status = reserve_node(g)) < 0) {
        keep_error(g, status);
        return AC_NONE;
    }
    node.output = add_value(g, (ac_value){.name = name, .kind = AC_VALUE_TEMP, .dtype = dtype,
                                          .shape = shape, .rate = node_rate(g, &node),
                                          .node = g->n_nodes});
    if (node.output != AC_NONE) {
        g->nodes[g->n_nodes++] = node;
    }
    return node.output;
}

ac_val
ac_graph_node(ac_graph *g, ac_op op, const ac_attr *attr, const ac_val *input, int32_t n_inputs,
              ac_dtype dtype, const ac_shape *wanted, const char *name)
{
    if (g->status) {
        return AC_NONE;
    }
    return add_node(g, op, attr, input, n_inputs, dtype, wanted, ac_arena_strdup(&g->arena, name));
}

/* ---- builder functions of ops.h -------------------------------------------------------------- */

/* Sticky: nothing happens after an error, or when a required operand is what an error left. */
static ac_val
build(ac_graph *g, ac_op op, const ac_attr *attr, const ac_val *input, int32_t n_inputs,
      ac_dtype dtype, const ac_shape *wanted)
{
    if (g->status) {
        return AC_NONE;
    }
    return add_node(g, op, attr, input, n_inputs, dtype, wanted, take_name(g, op));
}

static ac_dtype
dtype_of(const ac_graph *g, ac_val value)
{
    return value == AC_NONE ? g->dtype : g->values[value].dtype;
}

ac_val
ac_linear(ac_graph *g, ac_val x, ac_val w, ac_val b)
{
    return build(g, AC_OP_LINEAR, NULL, (ac_val[]){x, w, b}, 3, g->dtype, NULL);
}

ac_val
ac_conv2d(ac_graph *g, ac_val x, ac_val w, ac_val b, ac_conv2d_attr attr)
{
    return build(g, AC_OP_CONV2D, &(ac_attr){.conv2d = attr}, (ac_val[]){x, w, b}, 3, g->dtype,
                 NULL);
}

ac_val
ac_group_norm(ac_graph *g, ac_val x, ac_val gamma, ac_val beta, int32_t groups, float eps)
{
    ac_attr attr = {.group_norm = {.groups = groups, .eps = eps}};
    return build(g, AC_OP_GROUP_NORM, &attr, (ac_val[]){x, gamma, beta}, 3, g->dtype, NULL);
}

ac_val
ac_layer_norm(ac_graph *g, ac_val x, ac_val gamma, ac_val beta, float eps)
{
    ac_attr attr = {.layer_norm = {.eps = eps}};
    return build(g, AC_OP_LAYER_NORM, &attr, (ac_val[]){x, gamma, beta}, 3, g->dtype, NULL);
}

ac_val
ac_attention(ac_graph *g, ac_val q, ac_val k, ac_val v, ac_val mask, ac_attention_attr attr)
{
    return build(g, AC_OP_ATTENTION, &(ac_attr){.attention = attr}, (ac_val[]){q, k, v, mask}, 4,
                 g->dtype, NULL);
}

ac_val
ac_activation(ac_graph *g, ac_val x, ac_act act)
{
    if (act == AC_ACT_NONE) {
        return x;
    }
    ac_attr attr = {.activation = {.act = act}};
    return build(g, AC_OP_ACTIVATION, &attr, &x, 1, g->dtype, NULL);
}

ac_val
ac_gate(ac_graph *g, ac_val x, ac_act act)
{
    ac_attr attr = {.activation = {.act = act}};
    return build(g, AC_OP_GATE, &attr, &x, 1, g->dtype, NULL);
}

ac_val
ac_add(ac_graph *g, ac_val a, ac_val b)
{
    return build(g, AC_OP_ADD, NULL, (ac_val[]){a, b}, 2, g->dtype, NULL);
}

ac_val
ac_scale(ac_graph *g, ac_val x, float scale, float offset)
{
    ac_attr attr = {.scale = {.scale = scale, .offset = offset}};
    return build(g, AC_OP_SCALE, &attr, &x, 1, g->dtype, NULL);
}

ac_val
ac_concat(ac_graph *g, const ac_val *x, int32_t count, int32_t axis)
{
    ac_attr attr = {.axis = {.axis = axis}};
    return build(g, AC_OP_CONCAT, &attr, x, count, dtype_of(g, x[0]), NULL);
}

ac_val
ac_slice(ac_graph *g, ac_val x, int32_t axis, int64_t start, int64_t length)
{
    if (g->status || x == AC_NONE) {
        return AC_NONE;
    }
    ac_shape wanted = g->values[x].shape;
    if (axis >= 0 && axis < wanted.rank) {
        wanted.dim[axis] = length;
    }
    ac_attr attr = {.axis = {.axis = axis, .start = start}};
    return build(g, AC_OP_SLICE, &attr, &x, 1, dtype_of(g, x), &wanted);
}

ac_val
ac_reshape(ac_graph *g, ac_val x, ac_shape shape)
{
    return build(g, AC_OP_RESHAPE, NULL, &x, 1, dtype_of(g, x), &shape);
}

ac_val
ac_upsample(ac_graph *g, ac_val x, int64_t height, int64_t width)
{
    if (g->status || x == AC_NONE) {
        return AC_NONE;
    }
    ac_shape wanted = g->values[x].shape;
    wanted.dim[1] = height;
    wanted.dim[2] = width;
    return build(g, AC_OP_UPSAMPLE, NULL, &x, 1, g->dtype, &wanted);
}

ac_val
ac_timestep(ac_graph *g, ac_val t, ac_timestep_attr attr)
{
    return build(g, AC_OP_TIMESTEP, &(ac_attr){.timestep = attr}, &t, 1, g->dtype, NULL);
}

ac_val
ac_embed(ac_graph *g, ac_val ids, ac_val table)
{
    return build(g, AC_OP_EMBED, NULL, (ac_val[]){ids, table}, 2, g->dtype, NULL);
}

ac_val
ac_select(ac_graph *g, ac_val table, ac_val index)
{
    return build(g, AC_OP_SELECT, NULL, (ac_val[]){table, index}, 2, dtype_of(g, table), NULL);
}

ac_val
ac_eos_pool(ac_graph *g, ac_val x, ac_val ids, int64_t eos_id)
{
    ac_attr attr = {.eos_pool = {.eos_id = eos_id}};
    return build(g, AC_OP_EOS_POOL, &attr, (ac_val[]){x, ids}, 2, g->dtype, NULL);
}

ac_val
ac_to_nhwc(ac_graph *g, ac_val x)
{
    return build(g, AC_OP_TO_NHWC, NULL, &x, 1, g->dtype, NULL);
}

ac_val
ac_to_nchw(ac_graph *g, ac_val x, ac_dtype dtype)
{
    return build(g, AC_OP_TO_NCHW, NULL, &x, 1, dtype, NULL);
}

ac_val
ac_cast(ac_graph *g, ac_val x, ac_dtype dtype)
{
    return x != AC_NONE && dtype_of(g, x) == dtype
               ? x
               : build(g, AC_OP_CAST, NULL, &x, 1, dtype, NULL);
}

ac_val
ac_fill(ac_graph *g, ac_shape shape, float value)
{
    ac_attr attr = {.fill = {.value = value}};
    return build(g, AC_OP_FILL, &attr, NULL, 0, g->dtype, &shape);
}
