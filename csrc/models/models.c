/* models: the table of classes, and the check of a set of weights against what a class needs. */
#include "models.h"

#include <stdio.h>
#include <string.h>

extern const ac_model_class ac_model_unet_2d_condition, ac_model_autoencoder_kl,
    ac_model_clip_text, ac_model_clip_text_projected;

const ac_model_class *const ac_model_classes[] = {
    &ac_model_unet_2d_condition, &ac_model_autoencoder_kl, &ac_model_clip_text,
    &ac_model_clip_text_projected, NULL};

/* ---- classes --------------------------------------------------------------------------------- */

static const ac_json *
class_name(const ac_json *config)
{
    const ac_json *name = ac_json_get(config, "_class_name");
    if (!name) {
        const ac_json *list = ac_json_get(config, "architectures");
        name = list && list->kind == AC_JSON_ARRAY && list->length ? &list->item[0] : NULL;
    }
    return name && name->kind == AC_JSON_STRING ? name : NULL;
}

ac_status
ac_model_class_find(const ac_json *config, const ac_model_class **out)
{
    char known[400] = "";
    const ac_json *name = class_name(config);
    for (const ac_model_class *const *c = ac_model_classes; *c; c++) {
        if (name && strcmp((*c)->name, name->string) == 0) {
            *out = *c;
            return AC_OK;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", (*c)->name);
    }
    if (!name) {
        return ac_error(AC_E_UNSUPPORTED, "config: found neither \"_class_name\" nor "
                                          "\"architectures\", expected one of %s", known);
    }
    return ac_error(AC_E_UNSUPPORTED, "config: found class \"%.100s\", expected one of %s",
                    name->string, known);
}

/* ---- weights --------------------------------------------------------------------------------- */

void
ac_model_weight_name(const ac_model_class *cls, const char *found, char out[AC_WEIGHT_NAME])
{
    if (!cls->weight_name || !cls->weight_name(found, out, AC_WEIGHT_NAME)) {
        snprintf(out, AC_WEIGHT_NAME, "%s", found);
    }
}

/* A rename that finds its name taken changes nothing: the weight is then listed as unknown. */
static void
rename_all(const ac_model_class *cls, ac_weights *weights)
{
    for (int32_t i = 0; i < ac_weights_count(weights); i++) {
        char from[AC_WEIGHT_NAME], to[AC_WEIGHT_NAME];
        snprintf(from, sizeof from, "%s", ac_weights_name(weights, i));
        ac_model_weight_name(cls, from, to);
        if (strcmp(from, to) != 0) {
            ac_weights_rename(weights, from, to);
        }
    }
}

enum { SHAPE, MISSING, UNKNOWN, KINDS };

typedef struct check {
    const ac_model_class *cls;
    const void *config;
    const ac_weights *weights;
    ac_map expected; /* names of what was compared; they are the graphs' */
    ac_text lines[KINDS];
    int32_t count[KINDS];
} check;

static void
problem(check *c, int kind, const char *format, ...) AC_PRINTF(3, 4);

static void
problem(check *c, int kind, const char *format, ...)
{
    char line[AC_WEIGHT_NAME + 2 * AC_SHAPE_TEXT + 64];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    ac_text_printf(&c->lines[kind], "\n  %s", line);
    c->count[kind]++;
}

/* [n, k] and [n, k, 1, 1] hold the same bytes. */
static bool
same_bytes(const ac_shape *a, const ac_shape *b)
{
    const ac_shape *few = a->rank < b->rank ? a : b, *many = a->rank < b->rank ? b : a;
    ac_shape padded = *few;
    if (few->rank == 2 && many->rank == 4) {
        padded.rank = 4;
        padded.dim[2] = padded.dim[3] = 1;
    }
    return ac_shape_equal(&padded, many);
}

static void
check_one(check *c, const ac_value *expected)
{
    char left[AC_SHAPE_TEXT], right[AC_SHAPE_TEXT];
    const ac_tensor *found = ac_weights_find(c->weights, expected->name);
    ac_shape_text(&expected->shape, right);
    if (!found) {
        problem(c, MISSING, "%s: found nothing, expected %s", expected->name, right);
    } else if (!same_bytes(&found->shape, &expected->shape)) {
        problem(c, SHAPE, "%s: found %s, expected %s", expected->name,
                ac_shape_text(&found->shape, left), right);
    } else if (!ac_dtype_is_float(found->dtype)) {
        problem(c, SHAPE, "%s: found %s, expected a float dtype", expected->name,
                ac_dtype_name(found->dtype));
    }
}

/* Compares the weights of one entry's graph that no earlier graph had. */
static ac_status
check_entry(check *c, const char *entry, ac_graph *g)
{
    ac_build_args args;
    c->cls->smallest(c->config, entry, &args);
    c->cls->build(c->config, &args, g);
    AC_TRY(ac_graph_status(g));
    for (int32_t i = 0; i < g->n_values; i++) {
        const ac_value *value = &g->values[i];
        if (value->kind != AC_VALUE_WEIGHT || ac_map_get(&c->expected, value->name) >= 0) {
            continue;
        }
        AC_TRY(ac_map_put(&c->expected, value->name, i));
        check_one(c, value);
    }
    return AC_OK;
}

static void
check_unknown(check *c)
{
    for (int32_t i = 0; i < ac_weights_count(c->weights); i++) {
        const char *name = ac_weights_name(c->weights, i);
        bool ignored = c->cls->ignores && c->cls->ignores(c->config, name);
        if (ignored || ac_map_get(&c->expected, name) >= 0) {
            continue;
        }
        char text[AC_SHAPE_TEXT];
        const ac_tensor *tensor = ac_weights_find(c->weights, name);
        problem(c, UNKNOWN, "%s: found %s, expected nothing of this name", name,
                tensor ? ac_shape_text(&tensor->shape, text) : "it");
    }
}

static ac_status
report(check *c)
{
    static const char *const kinds[KINDS] = {"of another shape", "missing", "unknown"};
    ac_text text = {0};
    const char *before = "";
    for (int i = 0; i < KINDS; i++) {
        if (c->count[i]) {
            ac_text_printf(&text, "%s%d %s", before, c->count[i], kinds[i]);
            before = ", ";
        }
    }
    bool any = text.data != NULL || text.failed, failed = text.failed;
    for (int i = 0; i < KINDS; i++) {
        failed = failed || c->lines[i].failed;
        if (c->count[i]) {
            ac_text_printf(&text, "%s", c->lines[i].data ? c->lines[i].data : "");
        }
    }
    ac_status status = AC_OK;
    if (failed || text.failed) {
        status = ac_no_memory(0);
    } else if (any) {
        status = ac_error(AC_E_WEIGHTS, "%s: found weights that do not fit: %s", c->cls->name,
                          text.data);
    }
    ac_text_free(&text);
    return status;
}

ac_status
ac_model_check_weights(const ac_model_class *cls, const void *config, ac_weights *weights)
{
    enum { MAX_ENTRIES = 4 };
    rename_all(cls, weights);
    check c = {.cls = cls, .config = config, .weights = weights};
    ac_graph *graphs[MAX_ENTRIES] = {NULL}; /* they own the names in c.expected */
    ac_status status = AC_OK;
    for (int i = 0; !status && cls->entries[i] && i < MAX_ENTRIES; i++) {
        status = ac_graph_new(AC_F32, &graphs[i]);
        status = status ? status : check_entry(&c, cls->entries[i], graphs[i]);
    }
    if (!status) {
        check_unknown(&c);
        status = report(&c);
    }
    for (int i = 0; i < KINDS; i++) {
        ac_text_free(&c.lines[i]);
    }
    ac_map_deinit(&c.expected);
    for (int i = 0; i < MAX_ENTRIES; i++) {
        ac_graph_free(graphs[i]);
    }
    return status;
}
