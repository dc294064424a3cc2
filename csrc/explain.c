/* explain: a plan as text for people and as JSON for tools. */
#include "plan.h"

#include <stdio.h>

static const char *const spaces[] = {"-", "input", "output", "weight", "derived", "arena", "keep"};

static const char *
base_name(const ac_plan *plan, ac_ref ref)
{
    switch (ref.space) {
    case AC_SPACE_INPUT:
    case AC_SPACE_WEIGHT:
        return plan->graph->values[ref.index].name;
    case AC_SPACE_OUTPUT:
        return plan->graph->values[ref.index].output;
    default:
        return "";
    }
}

static void
operand_text(const ac_plan *plan, const ac_tensor *tensor, ac_ref ref, ac_text *text)
{
    char shape[AC_SHAPE_TEXT];
    if (ref.space == AC_SPACE_NONE) {
        ac_text_printf(text, " -");
        return;
    }
    ac_text_printf(text, " %s%s", spaces[ref.space], ac_shape_text(&tensor->shape, shape));
    if (ref.space == AC_SPACE_ARENA || ref.space == AC_SPACE_KEEP) {
        ac_text_printf(text, "@%zu", ref.offset);
    } else if (ref.space == AC_SPACE_INPUT || ref.space == AC_SPACE_OUTPUT) {
        ac_text_printf(text, "(%s)", base_name(plan, ref));
    }
}

static void
step_text(const ac_plan *plan, int32_t s, ac_text *text)
{
    const ac_step *step = &plan->steps[s];
    const ac_node *node = &plan->graph->nodes[step->node];
    ac_text_printf(text, "%4d %-8s %-28s", s, ac_rate_name(step->rate), step->kernel->name);
    operand_text(plan, &step->problem.output, step->output, text);
    ac_text_printf(text, " <-");
    for (int32_t k = 0; k < AC_MIN(step->problem.n_inputs, 6); k++) {
        operand_text(plan, &step->problem.input[k], step->input[k], text);
    }
    ac_text_printf(text, "%s {", step->problem.n_inputs > 6 ? " ..." : "");
    ac_op_attr_text(step->problem.op, &step->problem.attr, text);
    ac_text_printf(text, "}%s %.3f GFLOP %.2f MB  # %s\n", step->problem.tf32 ? " tf32" : "",
                   step->flops / 1e9, step->bytes / 1e6, node->name);
}

static void
operand_json(const ac_plan *plan, const ac_tensor *tensor, ac_ref ref, ac_text *text)
{
    if (ref.space == AC_SPACE_NONE) {
        ac_text_printf(text, "null");
        return;
    }
    char shape[AC_SHAPE_TEXT];
    ac_text_printf(text, "{\"space\":\"%s\",\"offset\":%zu,\"dtype\":\"%s\",\"shape\":%s",
                   spaces[ref.space], ref.offset, ac_dtype_name(tensor->dtype),
                   ac_shape_text(&tensor->shape, shape));
    ac_text_printf(text, ",\"name\":");
    ac_text_json_string(text, base_name(plan, ref));
    ac_text_printf(text, "}");
}

static void
step_json(const ac_plan *plan, int32_t s, ac_text *text)
{
    const ac_step *step = &plan->steps[s];
    ac_text_printf(text, "%s\n{\"step\":%d,\"rate\":\"%s\",\"op\":\"%s\",\"kernel\":", s ? "," : "",
                   s, ac_rate_name(step->rate), ac_op_name(step->problem.op));
    ac_text_json_string(text, step->kernel->name);
    ac_text_printf(text, ",\"node\":");
    ac_text_json_string(text, plan->graph->nodes[step->node].name);
    ac_text_printf(text, ",\"tf32\":%s,\"flops\":%.0f,\"bytes\":%.0f,\"scratch\":%zu,"
                         "\"scratch_offset\":%zu,\"output\":",
                   step->problem.tf32 ? "true" : "false", step->flops, step->bytes, step->scratch,
                   step->scratch_offset);
    operand_json(plan, &step->problem.output, step->output, text);
    ac_text_printf(text, ",\"attr\":");
    ac_op_attr_json(step->problem.op, &step->problem.attr, text);
    ac_text_printf(text, ",\"input\":[");
    for (int32_t k = 0; k < step->problem.n_inputs; k++) {
        ac_text_printf(text, k ? "," : "");
        operand_json(plan, &step->problem.input[k], step->input[k], text);
    }
    ac_text_printf(text, "]}");
}

typedef struct totals {
    double flops[AC_RATE_COUNT], bytes[AC_RATE_COUNT], derived;
} totals;

static totals
add_up(const ac_plan *plan)
{
    totals t = {0};
    for (int32_t s = 0; s < plan->n_steps; s++) {
        t.flops[plan->steps[s].rate] += plan->steps[s].flops;
        t.bytes[plan->steps[s].rate] += plan->steps[s].bytes;
    }
    for (int32_t i = 0; i < plan->n_derived; i++) {
        t.derived += (double)plan->derived[i].bytes;
    }
    return t;
}

static double
ratio(const ac_plan *plan)
{
    return plan->bound_bytes ? (double)plan->arena_bytes / (double)plan->bound_bytes : 1.0;
}

static void
totals_text(const ac_plan *plan, ac_text *text)
{
    totals t = add_up(plan);
    for (int32_t r = AC_RATE_LOAD; r < AC_RATE_COUNT; r++) {
        ac_text_printf(text, "%-8s %5d steps %12.3f GFLOP %12.2f MB moved\n",
                       ac_rate_name((ac_rate)r), plan->first[r + 1] - plan->first[r],
                       t.flops[r] / 1e9, t.bytes[r] / 1e6);
    }
    ac_text_printf(text, "arena %.2f MB, %.3f x the live-range lower bound of %.2f MB; kept "
                         "between runs %.2f MB; derived weights %d, %.2f MB\n",
                   (double)plan->arena_bytes / 1e6, ratio(plan), (double)plan->bound_bytes / 1e6,
                   (double)plan->keep_bytes / 1e6, plan->n_derived, t.derived / 1e6);
}

static void
totals_json(const ac_plan *plan, ac_text *text)
{
    totals t = add_up(plan);
    ac_text_printf(text, "],\n\"rates\":{");
    for (int32_t r = AC_RATE_LOAD; r < AC_RATE_COUNT; r++) {
        ac_text_printf(text, "%s\"%s\":{\"steps\":%d,\"flops\":%.0f,\"bytes\":%.0f}", r ? "," : "",
                       ac_rate_name((ac_rate)r), plan->first[r + 1] - plan->first[r], t.flops[r],
                       t.bytes[r]);
    }
    ac_text_printf(text, "},\n\"derived\":[");
    for (int32_t i = 0; i < plan->n_derived; i++) {
        ac_text_printf(text, "%s{\"key\":", i ? "," : "");
        ac_text_json_string(text, plan->derived[i].key);
        ac_text_printf(text, ",\"bytes\":%zu}", plan->derived[i].bytes);
    }
    ac_text_printf(text, "],\n\"arena_bytes\":%zu,\"bound_bytes\":%zu,\"arena_ratio\":%.4f,"
                         "\"keep_bytes\":%zu,\"derived_bytes\":%.0f}\n",
                   plan->arena_bytes, plan->bound_bytes, ratio(plan), plan->keep_bytes, t.derived);
}

void
ac_plan_explain(const ac_plan *plan, bool json, ac_text *text)
{
    if (json) {
        ac_text_printf(text, "{\"device\":\"%s\",\"steps\":[", plan->device->backend->name);
    }
    for (int32_t s = 0; s < plan->n_steps; s++) {
        if (json) {
            step_json(plan, s, text);
        } else {
            step_text(plan, s, text);
        }
    }
    if (json) {
        totals_json(plan, text);
    } else {
        totals_text(plan, text);
    }
}
