/* ops_text: the attributes of ops as text and JSON, for dumps, plans and the tune cache's keys.
 *
 *     ops.h -> [ops_text] -> graph, plan, explain
 */
#include "ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef enum field_kind {
    FIELD_ACT,
    FIELD_FLAG,
    FIELD_I32,
    FIELD_I64,
    FIELD_F32,
    FIELD_PAD
} field_kind;

typedef struct attr_field {
    ac_op op;
    field_kind kind;
    const char *name;
    size_t offset; /* in ac_attr; FIELD_PAD: of four int32_t in a row */
} attr_field;

#define FIELD(OP, kind, name, member) {AC_OP_##OP, FIELD_##kind, name, offsetof(ac_attr, member)}

/* What text and JSON show, an op's fields in order. */
static const attr_field fields[] = {
    FIELD(LINEAR, ACT, "act", linear.act),
    FIELD(LINEAR, FLAG, "gated", linear.gated),
    FIELD(CONV2D, I32, "stride", conv2d.stride),
    FIELD(CONV2D, PAD, "pad", conv2d.pad_top),
    FIELD(CONV2D, ACT, "act", conv2d.act),
    FIELD(UP_CONV2D, ACT, "act", up_conv2d.act),
    FIELD(GROUP_NORM, I32, "groups", group_norm.groups),
    FIELD(GROUP_NORM, F32, "eps", group_norm.eps),
    FIELD(GROUP_NORM, ACT, "act", group_norm.act),
    FIELD(GROUP_NORM, I32, "exponent", group_norm.exponent),
    FIELD(LAYER_NORM, F32, "eps", layer_norm.eps),
    FIELD(ATTENTION, I32, "heads", attention.heads),
    FIELD(ATTENTION, F32, "scale", attention.scale),
    FIELD(ATTENTION, FLAG, "causal", attention.causal),
    FIELD(ACTIVATION, ACT, "act", activation.act),
    FIELD(GATE, ACT, "act", activation.act),
    FIELD(SCALE, F32, "scale", scale.scale),
    FIELD(SCALE, F32, "offset", scale.offset),
    FIELD(CONCAT, I32, "axis", axis.axis),
    FIELD(SLICE, I32, "axis", axis.axis),
    FIELD(SLICE, I64, "start", axis.start),
    FIELD(TIMESTEP, I32, "channels", timestep.channels),
    FIELD(TIMESTEP, FLAG, "flip", timestep.flip_sin_to_cos),
    FIELD(TIMESTEP, F32, "shift", timestep.freq_shift),
    FIELD(EOS_POOL, I64, "eos", eos_pool.eos_id),
    FIELD(FILL, F32, "value", fill.value),
};

/* The shortest decimal that reads back as this float: cache keys need all of it, people less. */
static void
float_text(float value, char out[32])
{
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(out, 32, "%.*g", digits, (double)value);
        if (strtof(out, NULL) == value) {
            return;
        }
    }
}

static void
value_text(const attr_field *f, const void *at, bool json, ac_text *text)
{
    const int32_t *i32 = at;
    char number[32];
    switch (f->kind) {
    case FIELD_ACT:
        ac_text_printf(text, json ? "\"%s\"" : "%s", ac_act_name(*(const ac_act *)at));
        break;
    case FIELD_FLAG:
        ac_text_printf(text, *(const bool *)at ? "true" : "false");
        break;
    case FIELD_I32:
        ac_text_printf(text, "%d", *i32);
        break;
    case FIELD_I64:
        ac_text_printf(text, "%lld", (long long)*(const int64_t *)at);
        break;
    case FIELD_F32:
        float_text(*(const float *)at, number);
        ac_text_printf(text, "%s", json && !isfinite(*(const float *)at) ? "null" : number);
        break;
    case FIELD_PAD:
        ac_text_printf(text, json ? "[%d,%d,%d,%d]" : "%d,%d,%d,%d", i32[0], i32[1], i32[2],
                       i32[3]);
        break;
    }
}

void
ac_op_attr_text(ac_op op, const ac_attr *attr, ac_text *text)
{
    const char *space = "";
    for (size_t i = 0; i < AC_ARRAY_LEN(fields); i++) {
        const attr_field *f = &fields[i];
        const void *at = (const char *)attr + f->offset;
        if (f->op != op || (f->kind == FIELD_FLAG && !*(const bool *)at)) {
            continue;
        }
        ac_text_printf(text, "%s%s", space, f->name);
        space = " ";
        if (f->kind != FIELD_FLAG) {
            ac_text_printf(text, "=");
            value_text(f, at, false, text);
        }
    }
}

void
ac_op_attr_json(ac_op op, const ac_attr *attr, ac_text *text)
{
    const char *comma = "";
    ac_text_printf(text, "{");
    for (size_t i = 0; i < AC_ARRAY_LEN(fields); i++) {
        const attr_field *f = &fields[i];
        if (f->op == op) {
            ac_text_printf(text, "%s\"%s\":", comma, f->name);
            value_text(f, (const char *)attr + f->offset, true, text);
            comma = ",";
        }
    }
    ac_text_printf(text, "}");
}
