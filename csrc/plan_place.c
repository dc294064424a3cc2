/* plan_place: where every buffer goes.
 *
 * A value that only its own section reads lives in the lane's arena, which all plans share.  One
 * that a faster section reads too is kept by the exec.  Results of LOAD-rate nodes that faster
 * nodes read are derived weights; those between LOAD nodes live only while weights are derived. */
#include "memory.h"
#include "plan_internal.h"

#include <string.h>

static size_t
value_bytes(const ac_graph *g, ac_val v)
{
    return (size_t)ac_shape_count(&g->values[v].shape) * ac_dtype_size(g->values[v].dtype);
}

/* First and last use of every base, and its fastest reader. */
static void
find_lives(ac_planner *p)
{
    const ac_plan *plan = p->plan;
    for (int32_t s = 0; s < plan->n_steps; s++) {
        const ac_node *node = &p->g->nodes[plan->steps[s].node];
        p->places[node->output].first = s;
        p->places[node->output].last = AC_MAX(p->places[node->output].last, s);
        for (int32_t k = 0; k < node->n_inputs; k++) {
            if (node->input[k] == AC_NONE) {
                continue;
            }
            ac_place *base = &p->places[p->places[node->input[k]].base];
            base->last = s;
            base->last_rate = AC_MAX(base->last_rate, plan->steps[s].rate);
        }
    }
}

/* ---- derived weights ------------------------------------------------------------------------- */

/* "concat{axis=0}(a.weight,b.weight)": equal text, equal bytes. */
static void
expression(const ac_graph *g, ac_val v, ac_text *text)
{
    const ac_node *node = ac_producer(g, v);
    if (!node) {
        ac_text_printf(text, "%s", g->values[v].name);
        return;
    }
    char shape[AC_SHAPE_TEXT];
    ac_text_printf(text, "%s{", ac_op_name(node->op));
    ac_op_attr_text(node->op, &node->attr, text);
    ac_text_printf(text, "}:%s%s(", ac_dtype_name(g->values[v].dtype),
                   ac_shape_text(&g->values[v].shape, shape));
    for (int32_t k = 0; k < node->n_inputs; k++) {
        ac_text_printf(text, k ? "," : "");
        if (node->input[k] != AC_NONE) {
            expression(g, node->input[k], text);
        }
    }
    ac_text_printf(text, ")");
}

/* Calls visit for each weight that v is made from; depth is that of LOAD-rate chains, a few. */
static void
each_source(const ac_graph *g, ac_val v, const char **names, int32_t *count)
{
    const ac_node *node = ac_producer(g, v);
    if (!node) {
        if (names) {
            names[*count] = g->values[v].name;
        }
        ++*count;
        return;
    }
    for (int32_t k = 0; k < node->n_inputs; k++) {
        if (node->input[k] != AC_NONE) {
            each_source(g, node->input[k], names, count);
        }
    }
}

static ac_status
add_derived(ac_planner *p, ac_val v, const ac_step *prepare, size_t bytes, int32_t *index)
{
    ac_plan *plan = p->plan;
    ac_text text = {0};
    if (prepare && prepare->kernel->form) {
        ac_text_printf(&text, "%s(", prepare->kernel->form);
    } else if (prepare) {
        ac_text_printf(&text, "%s{", prepare->kernel->name);
        ac_op_attr_text(prepare->problem.op, &prepare->problem.attr, &text);
        ac_text_printf(&text, "}(");
    }
    expression(p->g, v, &text);
    ac_text_printf(&text, prepare ? ")" : "");
    char *key = ac_text_take(&text);
    int32_t count = 0;
    each_source(p->g, v, NULL, &count);
    const char **names = ac_arena_alloc(&plan->memory, (size_t)AC_MAX(count, 1) * sizeof *names);
    char *kept = key ? ac_arena_strdup(&plan->memory, key) : NULL;
    ac_free(key);
    if (!kept || !names) {
        return ac_no_memory(0);
    }
    count = 0;
    each_source(p->g, v, names, &count);
    *index = plan->n_derived++;
    plan->derived[*index] = (ac_plan_derived){.key = kept, .value = v, .prepare = prepare,
                                              .bytes = bytes, .source = names,
                                              .n_sources = count};
    return AC_OK;
}

/* ---- spaces ---------------------------------------------------------------------------------- */

static ac_status
choose_space(ac_planner *p, ac_val v)
{
    const ac_value *value = &p->g->values[v];
    ac_place *place = &p->places[v];
    if (value->kind == AC_VALUE_INPUT) {
        place->ref = (ac_ref){.space = AC_SPACE_INPUT, .index = v};
    } else if (value->kind == AC_VALUE_WEIGHT) {
        place->ref = (ac_ref){.space = AC_SPACE_WEIGHT, .index = v};
    } else if (value->node == AC_NONE || p->plan->step_of[value->node] == AC_NONE) {
        return AC_OK; /* dropped by a pass, or a view */
    } else if (value->output) {
        place->ref = (ac_ref){.space = AC_SPACE_OUTPUT, .index = v};
    } else if (value->rate == AC_RATE_LOAD && place->last_rate > AC_RATE_LOAD) {
        int32_t index;
        AC_TRY(add_derived(p, v, NULL, value_bytes(p->g, v), &index));
        place->ref = (ac_ref){.space = AC_SPACE_DERIVED, .index = index};
    } else if (place->last_rate > value->rate) {
        place->ref = (ac_ref){.space = AC_SPACE_KEEP, .offset = p->plan->keep_bytes};
        p->plan->keep_bytes += ac_align_up(value_bytes(p->g, v), AC_MEMORY_ALIGN);
    } else {
        place->ref = (ac_ref){.space = AC_SPACE_ARENA};
    }
    return AC_OK;
}

static ac_status
place_blocks(ac_planner *p)
{
    ac_plan *plan = p->plan;
    size_t most = (size_t)p->g->n_values + (size_t)plan->n_steps;
    ac_block *blocks = ac_arena_alloc(&p->work, most * sizeof *blocks);
    if (!blocks) {
        return ac_no_memory(most * sizeof *blocks);
    }
    int32_t n = 0;
    for (ac_val v = 0; v < p->g->n_values; v++) {
        const ac_place *place = &p->places[v];
        if (place->base == v && place->ref.space == AC_SPACE_ARENA) {
            blocks[n++] = (ac_block){value_bytes(p->g, v), place->first, place->last, 0};
        }
    }
    for (int32_t s = 0; s < plan->n_steps; s++) {
        if (plan->steps[s].scratch) {
            blocks[n++] = (ac_block){plan->steps[s].scratch, s, s, 0};
        }
    }
    AC_TRY(ac_memory_place(blocks, n, &plan->arena_bytes, &plan->bound_bytes));
    n = 0;
    for (ac_val v = 0; v < p->g->n_values; v++) {
        if (p->places[v].base == v && p->places[v].ref.space == AC_SPACE_ARENA) {
            p->places[v].ref.offset = blocks[n++].offset;
        }
    }
    for (int32_t s = 0; s < plan->n_steps; s++) {
        if (plan->steps[s].scratch) {
            plan->steps[s].scratch_offset = blocks[n++].offset;
        }
    }
    return AC_OK;
}

static ac_ref
ref_of(const ac_planner *p, ac_val v)
{
    if (v == AC_NONE) {
        return (ac_ref){.space = AC_SPACE_NONE};
    }
    const ac_place *place = &p->places[v];
    ac_ref ref = p->places[place->base].ref;
    ref.offset += (size_t)place->offset * ac_dtype_size(p->g->values[v].dtype);
    return ref;
}

/* Weights in a form that the kernel makes itself. */
static ac_status
add_prepared(ac_planner *p, ac_step *step)
{
    step->prepared = AC_NONE;
    if (!step->kernel->prepared_bytes) {
        return AC_OK;
    }
    size_t bytes = step->kernel->prepared_bytes(&step->problem, &p->plan->device->caps);
    ac_val weight = bytes ? p->g->nodes[step->node].input[AC_LINEAR_W] : AC_NONE;
    if (weight == AC_NONE || p->g->values[weight].rate != AC_RATE_LOAD) {
        return AC_OK;
    }
    return add_derived(p, weight, step, bytes, &step->prepared);
}

ac_status
ac_plan_place(ac_planner *p)
{
    ac_plan *plan = p->plan;
    size_t most = (size_t)p->g->n_values + (size_t)plan->n_steps;
    plan->derived = ac_arena_alloc(&plan->memory, most * sizeof *plan->derived);
    if (!plan->derived) {
        return ac_no_memory(most * sizeof *plan->derived);
    }
    find_lives(p);
    for (ac_val v = 0; v < p->g->n_values; v++) {
        if (p->places[v].base == v) {
            AC_TRY(choose_space(p, v));
        }
    }
    for (int32_t s = 0; s < plan->n_steps; s++) {
        AC_TRY(add_prepared(p, &plan->steps[s]));
    }
    AC_TRY(place_blocks(p));
    for (int32_t s = 0; s < plan->n_steps; s++) {
        ac_step *step = &plan->steps[s];
        const ac_node *node = &p->g->nodes[step->node];
        for (int32_t k = 0; k < node->n_inputs; k++) {
            step->input[k] = ref_of(p, node->input[k]);
        }
        step->output = ref_of(p, node->output);
    }
    return AC_OK;
}
