/* config: the field tables' reader. */
#include "config.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const ac_choice ac_config_activations[] = {{"silu", AC_ACT_SILU}, {"swish", AC_ACT_SILU},
                                           {"gelu", AC_ACT_GELU}, {"relu", AC_ACT_RELU},
                                           {NULL, 0}};

/* A value as short JSON text, for comparing with `only` and for messages. */
#define VALUE_TEXT 80

static const char *
value_text(const ac_json *value, char text[VALUE_TEXT])
{
    switch (value->kind) {
    case AC_JSON_NULL:
        return "null";
    case AC_JSON_BOOL:
        return value->boolean ? "true" : "false";
    case AC_JSON_NUMBER:
        snprintf(text, VALUE_TEXT, "%.9g", value->number);
        return text;
    case AC_JSON_STRING:
        snprintf(text, VALUE_TEXT, value->length > 60 ? "\"%.60s...\"" : "\"%s\"", value->string);
        return text;
    case AC_JSON_ARRAY:
        snprintf(text, VALUE_TEXT, "a list of %zu", value->length);
        return text;
    default:
        return "an object";
    }
}

static ac_status
wrong(ac_status status, const char *name, const ac_json *found, const char *expected)
{
    char text[VALUE_TEXT];
    return ac_error(status, "%s: found %s, expected %s", name, value_text(found, text), expected);
}

ac_status
ac_config_int(const ac_json *value, const char *name, double low, double high, int32_t *out)
{
    char expected[96];
    snprintf(expected, sizeof expected, "a whole number from %.0f to %.0f", low, high);
    /* The comparison is false for anything that is not finite. */
    bool whole = value->kind == AC_JSON_NUMBER && value->number == floor(value->number);
    if (!whole || !(value->number >= low && value->number <= high)) {
        return wrong(AC_E_INVALID, name, value, expected);
    }
    *out = (int32_t)value->number;
    return AC_OK;
}

static ac_status
read_float(const ac_json *value, const ac_field *field, float *out)
{
    char expected[96];
    snprintf(expected, sizeof expected, "a number from %g to %g", field->low, field->high);
    if (value->kind != AC_JSON_NUMBER ||
        !(value->number >= field->low && value->number <= field->high)) {
        return wrong(AC_E_INVALID, field->name, value, expected);
    }
    *out = (float)value->number;
    return AC_OK;
}

static ac_status
read_bool(const ac_json *value, const char *name, bool *out)
{
    if (value->kind != AC_JSON_BOOL) {
        return wrong(AC_E_INVALID, name, value, "true or false");
    }
    *out = value->boolean;
    return AC_OK;
}

static ac_status
read_choice(const ac_json *value, const char *name, const ac_choice *choices, bool nullable,
            int32_t *out)
{
    char expected[400];
    int used = snprintf(expected, sizeof expected, "one of%s", nullable ? " null" : "");
    for (const ac_choice *c = choices; c->text; c++) {
        if (value->kind == AC_JSON_STRING && strcmp(value->string, c->text) == 0) {
            *out = c->value;
            return AC_OK;
        }
        if ((size_t)used < sizeof expected) {
            used += snprintf(expected + used, sizeof expected - (size_t)used, " \"%s\"", c->text);
        }
    }
    ac_status status = value->kind == AC_JSON_STRING ? AC_E_UNSUPPORTED : AC_E_INVALID;
    return wrong(status, name, value, expected);
}

static ac_status
read_only(const ac_json *value, const ac_field *field)
{
    char text[VALUE_TEXT], expected[200];
    const char *found = value_text(value, text);
    size_t length = strlen(found);
    for (const char *c = field->only; *c;) {
        size_t word = strcspn(c, " ");
        if (word == length && memcmp(c, found, length) == 0) {
            return AC_OK;
        }
        c += word + strspn(c + word, " ");
    }
    snprintf(expected, sizeof expected, "%s (nothing else is supported)", field->only);
    return wrong(AC_E_UNSUPPORTED, field->name, value, expected);
}

/* One value of a per-block field; `name` is "field" or "field[2]". */
static ac_status
read_block_value(const ac_json *value, const ac_field *field, const char *name, int32_t *out)
{
    if (field->kind == AC_FIELD_FLAGS) {
        bool flag = false;
        AC_TRY(read_bool(value, name, &flag));
        *out = flag;
        return AC_OK;
    }
    if (field->kind == AC_FIELD_CHOICES) {
        return read_choice(value, name, field->choices, false, out);
    }
    return ac_config_int(value, name, field->low, field->high, out);
}

static ac_status
read_per_block(const ac_json *value, const ac_field *field, ac_per_block *out)
{
    bool may_be_scalar = field->kind == AC_FIELD_BLOCKS || field->kind == AC_FIELD_FLAGS;
    if (value->kind != AC_JSON_ARRAY && may_be_scalar) {
        out->scalar = true;
        out->count = 1;
        return read_block_value(value, field, field->name, &out->value[0]);
    }
    if (value->kind != AC_JSON_ARRAY || value->length < 1 || value->length > AC_MAX_BLOCKS) {
        char expected[64];
        snprintf(expected, sizeof expected, "a list of 1 to %d values", AC_MAX_BLOCKS);
        return wrong(AC_E_INVALID, field->name, value, expected);
    }
    out->scalar = false;
    out->count = (int32_t)value->length;
    for (int32_t i = 0; i < out->count; i++) {
        char name[96];
        snprintf(name, sizeof name, "%s[%d]", field->name, i);
        AC_TRY(read_block_value(&value->item[i], field, name, &out->value[i]));
    }
    return AC_OK;
}

static ac_status
read_field(const ac_json *value, const ac_field *field, void *config)
{
    void *at = (char *)config + field->offset;
    if (value->kind == AC_JSON_NULL && field->nullable) {
        if (field->kind == AC_FIELD_INT || field->kind == AC_FIELD_CHOICE) {
            *(int32_t *)at = 0;
        }
        return AC_OK;
    }
    switch (field->kind) {
    case AC_FIELD_INT:
        return ac_config_int(value, field->name, field->low, field->high, at);
    case AC_FIELD_FLOAT:
        return read_float(value, field, at);
    case AC_FIELD_BOOL:
        return read_bool(value, field->name, at);
    case AC_FIELD_CHOICE:
        return read_choice(value, field->name, field->choices, field->nullable, at);
    case AC_FIELD_BLOCKS:
    case AC_FIELD_FLAGS:
    case AC_FIELD_LIST:
    case AC_FIELD_CHOICES:
        return read_per_block(value, field, at);
    case AC_FIELD_READ:
        return field->read(value, field->name, at);
    case AC_FIELD_ONLY:
        return read_only(value, field);
    case AC_FIELD_IGNORED:
        break;
    }
    return AC_OK;
}

static ac_status
read_key(const ac_json *value, const char *key, const ac_field *fields, size_t n_fields,
         void *config)
{
    for (size_t i = 0; i < n_fields; i++) {
        if (strcmp(fields[i].name, key) == 0) {
            return read_field(value, &fields[i], config);
        }
    }
    char text[VALUE_TEXT];
    return ac_error(AC_E_UNSUPPORTED, "%.100s: found %s, expected no field of this name", key,
                    value_text(value, text));
}

ac_status
ac_config_read(const ac_json *json, const char *class_name, const ac_field *fields,
               size_t n_fields, void *config)
{
    if (json->kind != AC_JSON_OBJECT) {
        return wrong(AC_E_INVALID, class_name, json, "an object of config fields");
    }
    ac_text problems = {0};
    ac_status first = AC_OK;
    int32_t count = 0;
    for (size_t i = 0; i < json->length; i++) {
        if (json->key[i][0] == '_') {
            continue;
        }
        ac_status status = read_key(&json->item[i], json->key[i], fields, n_fields, config);
        if (status < 0) {
            first = first ? first : status;
            if (count++ < 40) {
                ac_text_printf(&problems, "%s%s", count > 1 ? "\n  " : "", ac_error_message());
            }
        }
    }
    if (first) {
        first = problems.failed ? ac_no_memory(0)
                : count == 1
                    ? ac_error(first, "%s config: %s", class_name, problems.data)
                    : ac_error(first, "%s config: found %d fields that do not fit:\n  %s",
                               class_name, count, problems.data);
    }
    ac_text_free(&problems);
    return first;
}

ac_status
ac_config_per_block(ac_per_block *values, const char *name, int32_t n)
{
    if (values->scalar) {
        for (int32_t i = 1; i < n; i++) {
            values->value[i] = values->value[0];
        }
        values->scalar = false;
        values->count = n;
    }
    return values->count == n ? AC_OK
                              : ac_error(AC_E_INVALID, "%s: found %d values, expected %d, one a "
                                                       "block", name, values->count, n);
}
