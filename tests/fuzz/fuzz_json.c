/* fuzz_json: any bytes; what is read is whole, and written out again it reads as the same. */
#include "../../csrc/json.h"
#include "fuzz.h"

#include <math.h>
#include <string.h>

const char *const fuzz_seeds[] = {
    "{\"a\": [1, -2.5e3, true, false, null], \"b\": {\"c\": \"x\\u00e9\\n\\ud83d\\ude00\"}}",
    "[[[[]]], {}, \"\", 0, -0, 1e-7, 123456789012345678901, 0.1, \"\xc3\xa9\xf0\x9f\x98\x80\"]",
    "{\"_class_name\": \"UNet2DConditionModel\", \"lambda_min_clipped\": -Infinity,\n"
    " \"block_out_channels\": [320, 640, 1280, 1280], \"act_fn\": \"silu\"}",
    NULL,
};
const char *const fuzz_words[] = {
    "\"\\u0000\"", "\\ud800", "\\udc00", "\xed\xa0\x80", "\xf4\x90\x80\x80", "1e309", "-1e-400",
    "9223372036854775808", "-9223372036854775808", "Infinity", "-Infinity", "NaN", "\"\\",
    "{\"a\":",
    "[[[[[[[[[[[[[[[[", "]]]]]]]]", "{\"a\":1,\"a\":2}", "00", "1.", ".5", "1e+", "\"\"", "null",
    "0.99999999999999999999999999", "100000000000000000000e-20", NULL,
};

static void
write_value(ac_text *text, const ac_json *value)
{
    switch (value->kind) {
    case AC_JSON_NULL:
        ac_text_printf(text, "null");
        break;
    case AC_JSON_BOOL:
        ac_text_printf(text, value->boolean ? "true" : "false");
        break;
    case AC_JSON_NUMBER:
        if (value->is_integer && !signbit(value->number)) {
            FUZZ_CHECK((double)value->integer == value->number);
            ac_text_printf(text, "%lld", (long long)value->integer);
        } else if (isinf(value->number)) {
            ac_text_printf(text, value->number < 0 ? "-Infinity" : "Infinity");
        } else {
            FUZZ_CHECK(isfinite(value->number));
            ac_text_printf(text, "%.17g", value->number);
        }
        break;
    case AC_JSON_STRING:
        FUZZ_CHECK(strlen(value->string) == value->length);
        ac_text_json_string(text, value->string);
        break;
    default:
        ac_text_printf(text, value->kind == AC_JSON_ARRAY ? "[" : "{");
        for (size_t i = 0; i < value->length; i++) {
            ac_text_printf(text, i ? "," : "");
            if (value->kind == AC_JSON_OBJECT) {
                FUZZ_CHECK(ac_json_get(value, value->key[i]) == &value->item[i]);
                ac_text_json_string(text, value->key[i]);
                ac_text_printf(text, ":");
            }
            write_value(text, &value->item[i]);
        }
        ac_text_printf(text, value->kind == AC_JSON_ARRAY ? "]" : "}");
    }
}

static bool
same(const ac_json *a, const ac_json *b)
{
    if (a->kind != b->kind || a->length != b->length || a->boolean != b->boolean ||
        a->number != b->number) {
        return false;
    }
    if (a->kind == AC_JSON_STRING) {
        return strcmp(a->string, b->string) == 0;
    }
    for (size_t i = 0; i < a->length; i++) {
        if ((a->key && strcmp(a->key[i], b->key[i]) != 0) || !same(&a->item[i], &b->item[i])) {
            return false;
        }
    }
    return true;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    ac_arena arena;
    const ac_json *json = NULL, *again = NULL;
    ac_arena_init(&arena);
    ac_status status = ac_json_parse(&arena, (const char *)data, size, "fuzz", &json);
    if (status == AC_OK) {
        ac_text text = {0};
        write_value(&text, json);
        char *written = ac_text_take(&text);
        if (written) {
            status = ac_json_parse(&arena, written, strlen(written), "again", &again);
            FUZZ_CHECK(status == AC_E_MEMORY || (status == AC_OK && same(json, again)));
        }
        ac_free(written);
    } else {
        FUZZ_CHECK(status == AC_E_MEMORY ||
                   (status == AC_E_FORMAT && strncmp(ac_error_message(), "fuzz: ", 6) == 0));
    }
    ac_arena_deinit(&arena);
    return status == AC_OK ? 0 : -1;
}
