/* profile_text: what profile.c measured, as tables for people and as JSON for tools. */
#include "profile.h"

#include <string.h>

#define WORST 20 /* steps listed in text */

/* Steps added up: those of a section, of one op in it, or of one kernel in it. */
typedef struct row {
    ac_rate rate;
    const char *name;
    int32_t steps;
    double ms, flops, bytes, bound; /* bound in ms, 0: unknown */
} row;

typedef struct table {
    row *rows;
    int32_t n;
} table;

static double
bound_ms(const ac_step *step, const ac_profile_args *args)
{
    if (!(args->flops > 0.0) || !(args->bandwidth > 0.0)) {
        return 0.0;
    }
    double flops = step->problem.tf32 && args->tf32_flops > 0.0 ? args->tf32_flops : args->flops;
    return 1e3 * AC_MAX(step->flops / flops, step->bytes / args->bandwidth);
}

static void
add(table *t, ac_rate rate, const char *name, const row *more)
{
    int32_t i = 0;
    while (i < t->n && (t->rows[i].rate != rate || strcmp(t->rows[i].name, name) != 0)) {
        i++;
    }
    if (i == t->n) {
        t->rows[t->n++] = (row){.rate = rate, .name = name};
    }
    row *to = &t->rows[i];
    to->steps++;
    to->ms += more->ms;
    to->flops += more->flops;
    to->bytes += more->bytes;
    to->bound += more->bound;
}

/* By time, the longest first; a few dozen rows, so insertion does. */
static void
sort(table *t)
{
    for (int32_t i = 1; i < t->n; i++) {
        row moving = t->rows[i];
        int32_t k = i;
        for (; k > 0 && t->rows[k - 1].ms < moving.ms; k--) {
            t->rows[k] = t->rows[k - 1];
        }
        t->rows[k] = moving;
    }
}

static row
row_of(const ac_plan *plan, int32_t s, const ac_profile_args *args, const ac_profile_times *times)
{
    const ac_step *step = &plan->steps[s];
    return (row){.rate = step->rate, .name = plan->graph->nodes[step->node].name, .steps = s,
                 .ms = times->step[s], .flops = step->flops, .bytes = step->bytes,
                 .bound = bound_ms(step, args)};
}

/* ---- text ------------------------------------------------------------------------------------ */

static void
fractions(const row *r, ac_text *text)
{
    if (r->bound > 0.0 && r->ms > 0.0) {
        ac_text_printf(text, " %9.3f %6.1f %% %9.3f", r->bound, 100.0 * r->bound / r->ms,
                       r->ms - r->bound);
    }
}

static void
table_text(const table *t, const char *title, bool bounds, double all, ac_text *text)
{
    ac_text_printf(text, "\n%-8s %-30s %5s %10s %6s %11s %11s%s\n", "rate", title, "steps", "ms",
                   "share", "GFLOP", "MB", bounds ? "  bound ms of bound   lost ms" : "");
    for (int32_t i = 0; i < t->n; i++) {
        const row *r = &t->rows[i];
        ac_text_printf(text, "%-8s %-30s %5d %10.3f %5.1f%% %11.2f %11.1f", ac_rate_name(r->rate),
                       r->name, r->steps, r->ms, all > 0.0 ? 100.0 * r->ms / all : 0.0,
                       r->flops / 1e9, r->bytes / 1e6);
        fractions(r, text);
        ac_text_printf(text, "\n");
    }
}

static void
head_text(const ac_plan *plan, const char *model, const ac_profile_args *args, ac_text *text)
{
    const ac_device *device = plan->device;
    ac_text_printf(text, "profile of %s on %s:%d, the best of %d runs, random inputs; ", model,
                   device->backend->name, device->index, args->repeats);
    if (args->flops > 0.0 && args->bandwidth > 0.0) {
        ac_text_printf(text, "bound = max(FLOP / %.0f TFLOP/s, bytes / %.2f TB/s)",
                       args->flops / 1e12, args->bandwidth / 1e12);
        if (plan->graph->tf32 && args->tf32_flops > 0.0) {
            ac_text_printf(text, ", in TF32 %.0f TFLOP/s", args->tf32_flops / 1e12);
        }
        ac_text_printf(text, "\n");
    } else {
        ac_text_printf(text, "no fractions of a bound: this device's peaks are not known, "
                             "peaks=(FLOP/s, bytes/s) gives them\n");
    }
}

static void
sections_text(const table *sections, const ac_profile_times *times, ac_text *text)
{
    for (int32_t i = 0; i < sections->n; i++) {
        const row *r = &sections->rows[i];
        ac_text_printf(text, "%-8s section: %.3f ms in one go, %.3f ms summed over %d steps\n",
                       r->name, times->section[r->rate], r->ms, r->steps);
    }
    if (times->sampler[1] > 0.0) {
        ac_text_printf(text, "sampler, in each row of the loop: %.3f ms before the step section, "
                             "%.3f ms after it\n", times->sampler[0], times->sampler[1]);
    }
    if (times->tail > 0.0) {
        ac_text_printf(text, "tail, which the loop launches instead of the last two steps and the "
                             "sampler: %.3f ms\n", times->tail);
    }
}

static void
worst_text(const ac_plan *plan, const ac_profile_args *args, const ac_profile_times *times,
           table *steps, ac_text *text)
{
    char shape[AC_SHAPE_TEXT];
    for (int32_t i = 0; i < steps->n; i++) { /* sorted by what is lost, or by time */
        steps->rows[i].ms -= steps->rows[i].bound;
    }
    sort(steps);
    ac_text_printf(text, "\nthe steps that %s\n", args->flops > 0.0 ? "lose most" : "take longest");
    for (int32_t i = 0; i < AC_MIN(steps->n, WORST); i++) {
        int32_t s = steps->rows[i].steps;
        row r = row_of(plan, s, args, times);
        const ac_step *step = &plan->steps[s];
        ac_text_printf(text, "%4d %-30s %9.3f ms", s, step->kernel->name, r.ms);
        fractions(&r, text);
        ac_text_printf(text, "  %s  # %s\n", ac_shape_text(&step->problem.output.shape, shape),
                       r.name);
    }
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static void
row_json(const row *r, const char *what, ac_text *text)
{
    ac_text_printf(text, "{\"rate\":\"%s\",\"%s\":", ac_rate_name(r->rate), what);
    ac_text_json_string(text, r->name);
    ac_text_printf(text, ",\"ms\":%.6f,\"flops\":%.0f,\"bytes\":%.0f,\"bound_ms\":", r->ms,
                   r->flops, r->bytes);
    ac_text_printf(text, r->bound > 0.0 ? "%.6f" : "null", r->bound);
}

static void
table_json(const table *t, const char *title, const char *what, ac_text *text)
{
    ac_text_printf(text, ",\n\"%s\":[", title);
    for (int32_t i = 0; i < t->n; i++) {
        ac_text_printf(text, "%s\n", i ? "," : "");
        row_json(&t->rows[i], what, text);
        ac_text_printf(text, ",\"steps\":%d}", t->rows[i].steps);
    }
    ac_text_printf(text, "]");
}

static void
steps_json(const ac_plan *plan, const ac_profile_args *args, const ac_profile_times *times,
           ac_text *text)
{
    char shape[AC_SHAPE_TEXT];
    ac_text_printf(text, ",\n\"steps\":[");
    for (int32_t s = plan->first[AC_RATE_PROMPT]; s < plan->n_steps; s++) {
        row r = row_of(plan, s, args, times);
        const ac_step *step = &plan->steps[s];
        ac_text_printf(text, "%s\n", s > plan->first[AC_RATE_PROMPT] ? "," : "");
        row_json(&r, "node", text);
        ac_text_printf(text, ",\"step\":%d,\"op\":\"%s\",\"shape\":%s,\"kernel\":", s,
                       ac_op_name(step->problem.op),
                       ac_shape_text(&step->problem.output.shape, shape));
        ac_text_json_string(text, step->kernel->name);
        ac_text_printf(text, "}");
    }
    ac_text_printf(text, "]");
}

static void
head_json(const ac_plan *plan, const char *model, const ac_profile_args *args,
          const table *sections, const ac_profile_times *times, ac_text *text)
{
    const ac_device *device = plan->device;
    bool known = args->flops > 0.0 && args->bandwidth > 0.0;
    ac_text_printf(text, "{\"model\":\"%s\",\"device\":\"%s:%d\",\"repeats\":%d,\"peak_flops\":",
                   model, device->backend->name, device->index, args->repeats);
    ac_text_printf(text, known ? "%.0f" : "null", args->flops);
    ac_text_printf(text, ",\"peak_bandwidth\":");
    ac_text_printf(text, known ? "%.0f" : "null", args->bandwidth);
    ac_text_printf(text, ",\n\"sections\":[");
    for (int32_t i = 0; i < sections->n; i++) {
        ac_text_printf(text, "%s\n", i ? "," : "");
        row_json(&sections->rows[i], "section", text);
        ac_text_printf(text, ",\"steps\":%d,\"whole_ms\":%.6f}", sections->rows[i].steps,
                       times->section[sections->rows[i].rate]);
    }
    ac_text_printf(text, "],\n\"sampler\":");
    if (times->sampler[1] > 0.0) {
        ac_text_printf(text, "{\"before_ms\":%.6f,\"after_ms\":%.6f,\"tail_ms\":",
                       times->sampler[0], times->sampler[1]);
        ac_text_printf(text, times->tail > 0.0 ? "%.6f}" : "null}", times->tail);
    } else {
        ac_text_printf(text, "null");
    }
}

/* ---- all of it ------------------------------------------------------------------------------- */

void
ac_profile_report(const ac_plan *plan, const char *model, const ac_profile_args *args,
                  const ac_profile_times *times, bool json, ac_text *text)
{
    ac_arena work;
    table t[4]; /* sections, classes, kernels, steps */
    bool bounds = args->flops > 0.0 && args->bandwidth > 0.0;
    double all = 0.0;
    ac_arena_init(&work);
    for (int i = 0; i < 4; i++) {
        size_t bytes = (size_t)AC_MAX(plan->n_steps, 1) * sizeof(row);
        t[i] = (table){.rows = ac_arena_alloc(&work, bytes)};
        if (!t[i].rows) {
            text->failed = true;
            ac_arena_deinit(&work);
            return;
        }
    }
    for (int32_t s = plan->first[AC_RATE_PROMPT]; s < plan->n_steps; s++) {
        const ac_step *step = &plan->steps[s];
        row r = row_of(plan, s, args, times);
        all += r.ms;
        add(&t[0], step->rate, ac_rate_name(step->rate), &r);
        add(&t[1], step->rate, ac_op_name(step->problem.op), &r);
        add(&t[2], step->rate, step->kernel->name, &r);
        t[3].rows[t[3].n++] = r;
    }
    sort(&t[1]);
    sort(&t[2]);
    if (json) {
        head_json(plan, model, args, &t[0], times, text);
        table_json(&t[1], "classes", "class", text);
        table_json(&t[2], "kernels", "kernel", text);
        steps_json(plan, args, times, text);
        ac_text_printf(text, "}\n");
    } else {
        head_text(plan, model, args, text);
        sections_text(&t[0], times, text);
        table_text(&t[1], "class", bounds, all, text);
        table_text(&t[2], "kernel", bounds, all, text);
        worst_text(plan, args, times, &t[3], text);
    }
    ac_arena_deinit(&work);
}
