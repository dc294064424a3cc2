/* json: values, every refusal with its message and place, limits, failing allocations. */
#include "../../csrc/json.h"
#include "test.h"

#include <locale.h>

static ac_status
parse_bytes(ac_arena *arena, const char *text, size_t size, const ac_json **out)
{
    /* An own block of exactly this size, so that a sanitizer sees one byte too many. */
    char *copy = malloc(size ? size : 1);
    memcpy(copy, text, size);
    ac_status status = ac_json_parse(arena, copy, size, "some.json", out);
    free(copy);
    return status;
}

static ac_status
parse(ac_arena *arena, const char *text, const ac_json **out)
{
    return parse_bytes(arena, text, strlen(text), out);
}

static void
check_refused(const char *text, const char *message)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    ac_status status = parse(&arena, text, &json);
    if (status != AC_E_FORMAT || json || !strstr(ac_error_message(), message)) {
        TEST_FAIL("%s: found %s (%s), expected \"%s\"", text, ac_status_text(status),
                  status < 0 ? ac_error_message() : "", message);
    }
    ac_arena_deinit(&arena);
}

static double
number_of(const char *text)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    CHECK_OK(parse(&arena, text, &json));
    CHECK_INT(json->kind, AC_JSON_NUMBER);
    double number = json->number;
    ac_arena_deinit(&arena);
    return number;
}

static bool
integer_of(const char *text, int64_t *out)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    CHECK_OK(parse(&arena, text, &json));
    bool is_integer = json->is_integer;
    *out = json->integer;
    ac_arena_deinit(&arena);
    return is_integer;
}

static void
check_string(const char *text, const char *expected)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    CHECK_OK(parse(&arena, text, &json));
    CHECK_INT(json->kind, AC_JSON_STRING);
    CHECK_STRING(json->string, expected);
    CHECK_INT(json->length, strlen(expected));
    ac_arena_deinit(&arena);
}

/* ---- what is read --------------------------------------------------------------------------- */

static void
tree(void)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    CHECK_OK(parse(&arena, " {\"a\": [1, [], {}, null, true, false, \"x\"],\r\n\t"
                           "\"b\":{\"c\":-2.5}} ",
                   &json));
    CHECK_INT(json->kind, AC_JSON_OBJECT);
    CHECK_INT(json->length, 2);
    CHECK_STRING(json->key[0], "a");
    CHECK_STRING(json->key[1], "b");
    const ac_json *a = ac_json_get(json, "a");
    CHECK(a && a->kind == AC_JSON_ARRAY);
    CHECK_INT(a->length, 7);
    CHECK(a->item[0].is_integer && a->item[0].integer == 1);
    CHECK(a->item[1].kind == AC_JSON_ARRAY && a->item[1].length == 0);
    CHECK(a->item[2].kind == AC_JSON_OBJECT && a->item[2].length == 0);
    CHECK_INT(a->item[3].kind, AC_JSON_NULL);
    CHECK(a->item[4].kind == AC_JSON_BOOL && a->item[4].boolean);
    CHECK(a->item[5].kind == AC_JSON_BOOL && !a->item[5].boolean);
    CHECK_STRING(a->item[6].string, "x");
    CHECK_CLOSE(ac_json_get(ac_json_get(json, "b"), "c")->number, -2.5, 0);
    CHECK(ac_json_get(json, "c") == NULL);
    CHECK(ac_json_get(a, "a") == NULL);
    CHECK(ac_json_get(NULL, "a") == NULL);
    ac_arena_deinit(&arena);
}

static void
integers(void)
{
    static const struct {
        const char *text;
        bool is_integer;
        int64_t value;
    } cases[] = {
        {"0", true, 0}, {"-0", true, 0}, {"-7", true, -7}, {"1e3", true, 1000},
        {"1.0", true, 1}, {"1.50e1", true, 15}, {"1200E-2", true, 12}, {"0.0e99", true, 0},
        {"9223372036854775807", true, INT64_MAX}, {"-9223372036854775808", true, INT64_MIN},
        {"9223372036854775808", false, 0}, {"-9223372036854775809", false, 0},
        {"18446744073709551616", false, 0}, {"1e19", false, 0}, {"1e18", true, 1000000000000000000},
        {"9007199254740993", true, 9007199254740993}, {"0.5", false, 0}, {"1e-1", false, 0},
        {"0.99999999999999999999", false, 0}, {"1.00000000000000000001", false, 0},
        {"100000000000000000000e-20", true, 1},
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(cases); i++) {
        int64_t value = 0;
        bool is_integer = integer_of(cases[i].text, &value);
        if (is_integer != cases[i].is_integer || (is_integer && value != cases[i].value)) {
            TEST_FAIL("%s: found %d, %" PRId64, cases[i].text, is_integer, value);
        }
    }
}

static void
numbers(void)
{
    CHECK_CLOSE(number_of("0.00085"), 0.00085, 0);
    CHECK_CLOSE(number_of("1e-05"), 1e-5, 0);
    CHECK_CLOSE(number_of("0.18215"), 0.18215, 0);
    CHECK_CLOSE(number_of("1.7976931348623157e308"), 1.7976931348623157e308, 0);
    CHECK_CLOSE(number_of("4.9e-324"), 4.9e-324, 0);
    CHECK_CLOSE(number_of("1e-999999999999999999999"), 0, 0);
    CHECK_CLOSE(number_of("123456789012345678901234567890"), 123456789012345678901234567890.0, 0);
    CHECK(number_of("Infinity") == INFINITY && number_of("-Infinity") == -INFINITY);
    int64_t unused;
    CHECK(!integer_of("-Infinity", &unused));
    CHECK(signbit(number_of("-0.0")) && signbit(number_of("-0")));
}

static void
numbers_in_any_locale(void)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "de_DE", "fr_FR.UTF-8"};
    for (size_t i = 0; i < AC_ARRAY_LEN(names) && !setlocale(LC_ALL, names[i]); i++) {
    }
    CHECK_CLOSE(number_of("0.5"), 0.5, 0);
    setlocale(LC_ALL, "C");
}

static void
strings(void)
{
    check_string("\"\"", "");
    check_string("\"a b\"", "a b");
    check_string("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t");
    check_string("\"\\u0041\\u00e9\\u20aC\"", "A\xc3\xa9\xe2\x82\xac");
    check_string("\"\\ud83d\\ude00\"", "\xf0\x9f\x98\x80");
    check_string("\"\\uDBFF\\uDFFF\"", "\xf4\x8f\xbf\xbf");
    check_string("\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\x7f\"",
                 "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\x7f");
}

static void
many_children(void)
{
    ac_arena arena;
    ac_text text = {0};
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    ac_text_printf(&text, "{");
    for (int i = 0; i < 5000; i++) {
        ac_text_printf(&text, "%s\"key %d\": [%d, {\"x\": %d}]", i ? "," : "", i * 7919 % 5000, i,
                       -i);
    }
    ac_text_printf(&text, "}");
    CHECK_OK(parse(&arena, text.data, &json));
    CHECK_INT(json->length, 5000);
    for (int i = 0; i < 5000; i++) {
        CHECK_INT(json->item[i].item[0].integer, i);
        CHECK_INT(ac_json_get(&json->item[i].item[1], "x")->integer, -i);
    }
    ac_text_free(&text);
    ac_arena_deinit(&arena);
}

/* ---- what is refused ------------------------------------------------------------------------ */

static void
refused_structure(void)
{
    check_refused("", "some.json: line 1, column 1: found the end of the text, expected a value");
    check_refused(" \n ", "line 2, column 2: found the end of the text");
    check_refused("{\n  \"a\": 1,\n  \"b\" 2}", "line 3, column 7: found '2', expected ':'");
    check_refused("[1, 2", "line 1, column 6: found the end of the text, expected ',' or ']'");
    check_refused("{\"a\": 1", "expected ',' or '}'");
    check_refused("[1,]", "line 1, column 4: found ']', expected a value");
    check_refused("{\"a\":1,}", "line 1, column 8: found '}', expected '\"'");
    check_refused("{1: 2}", "found '1', expected '\"'");
    check_refused("{\"a\"", "expected ':'");
    check_refused("[1 2]", "line 1, column 4: found '2', expected ',' or ']'");
    check_refused("[1}", "found '}', expected ',' or ']'");
    check_refused("1 1", "line 1, column 3: found '1', expected the end of the text");
    check_refused("{} x", "expected the end of the text");
    check_refused("tru", "found 't', expected a value");
    check_refused("nul", "expected a value");
    check_refused("True", "found 'T', expected a value");
    check_refused("'a'", "expected a value");
    check_refused("// a\n1", "expected a value");
    check_refused("\xef\xbb\xbf{}", "found byte 0xef, expected a value");
    check_refused("[\"\xc3\xa9\", x]", "line 1, column 7: found 'x'");
}

static void
refused_numbers(void)
{
    check_refused("NaN", "line 1, column 1: found NaN, expected a number");
    check_refused("{\"a\": {\"b\": 1, \"c\": [0, NaN]}}",
                  "column 25: found NaN, expected a number (in \"c\")");
    check_refused("{\"a\": {\"b\": 1}, \"d\": 1e999}", "too large for a double (in \"d\")");
    check_refused("{\"a\": {\"b\": 1} x}", "column 16: found 'x', expected ',' or '}'");
    check_refused("-NaN", "line 1, column 2: found 'N', expected a digit");
    check_refused("[Infinit]", "found 'I', expected a value");
    check_refused("-Infinit", "line 1, column 2: found 'I', expected a digit");
    check_refused("-Infinityy", "found 'y', expected the end of the text");
    check_refused("inf", "found 'i'");
    check_refused("[0, 1e309]", "line 1, column 5: found a number too large for a double");
    check_refused("-1e999999999999999999999", "too large for a double");
    check_refused("01", "expected no digit after a leading zero");
    check_refused("-01", "expected no digit after a leading zero");
    check_refused("+1", "found '+', expected a value");
    check_refused(".5", "found '.', expected a value");
    check_refused("1.", "expected a digit after the decimal point");
    check_refused("1.e5", "found 'e', expected a digit after the decimal point");
    check_refused("1e", "expected a digit in the exponent");
    check_refused("1e+", "expected a digit in the exponent");
    check_refused("-", "expected a digit");
    check_refused("0x10", "found 'x', expected the end of the text");
    char digits[201];
    memset(digits, '1', 200);
    digits[200] = '\0';
    check_refused(digits, "found a number of more than 128 characters");
}

static void
refused_strings(void)
{
    check_refused("\"abc", "column 5: found the end of the text, expected '\"' at the end");
    check_refused("\"abc\\", "expected an escape");
    check_refused("\"abc\\\"", "expected '\"' at the end");
    check_refused("\"a\nb\"", "line 1, column 3: found byte 0x0a, expected no control character");
    check_refused("\"\\x41\"", "found 'x', expected an escape");
    check_refused("\"\\u12g4\"", "found 'g', expected a hexadecimal digit");
    check_refused("\"\\u12", "expected a hexadecimal digit");
    check_refused("\"\\u0000\"", "column 2: found \\u0000");
    check_refused("{\"a\\u0000\": 1}", "found \\u0000");
    check_refused("\"\\ud83d\"", "column 2: found half of a surrogate pair");
    check_refused("\"\\ud83dx\"", "found half of a surrogate pair");
    check_refused("\"\\ud83d\\n\"", "found half of a surrogate pair");
    check_refused("\"\\ud83d\\u0041\"", "found half of a surrogate pair");
    check_refused("\"\\ude00\\ud83d\"", "found half of a surrogate pair");
}

static void
refused_utf8(void)
{
    static const char *const bad[] = {
        "\x80", "\xc3", "\xc3(", "\xc0\xaf", "\xc1\xbf", "\xe2\x82", "\xe2(\xac", "\xe0\x9f\xbf",
        "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf0\x9f\x98", "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80", "\xff", "\xfe",
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(bad); i++) {
        char text[16];
        snprintf(text, sizeof text, "\"x%s\"", bad[i]);
        check_refused(text, "column 3: found byte 0x");
        snprintf(text, sizeof text, "\"x%s", bad[i]); /* cut short inside the sequence */
        check_refused(text, "column 3: found byte 0x");
    }
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    CHECK_STATUS(parse_bytes(&arena, "\"a\0b\"", 5, &json), AC_E_FORMAT, "found byte 0x00");
    CHECK_STATUS(parse_bytes(&arena, "1\0", 2, &json), AC_E_FORMAT, "expected the end of the text");
    CHECK_STATUS(ac_json_parse(&arena, NULL, 0, "nothing", &json), AC_E_FORMAT, "nothing: line 1");
    ac_arena_deinit(&arena);
}

static void
refused_duplicate_keys(void)
{
    check_refused("{\"a\": 1, \"b\": 2,\n \"a\": 3}",
                  "line 2, column 2: found the key \"a\" a second time");
    check_refused("{\"\": 1, \"\": 2}", "found the key \"\" a second time");
    check_refused("{\"a\": 1, \"\\u0061\": 2}", "found the key \"a\" a second time");
    check_refused("[{\"x\": {\"k\": 1, \"k\": 1}}]", "found the key \"k\" a second time");
}

static void
refused_depth(void)
{
    char text[20001];
    for (size_t depth = 60; depth <= 10000; depth = depth < 70 ? depth + 1 : depth * 10) {
        ac_arena arena;
        const ac_json *json = NULL;
        ac_arena_init(&arena);
        memset(text, '[', depth);
        memset(text + depth, ']', depth);
        ac_status status = parse_bytes(&arena, text, 2 * depth, &json);
        CHECK_INT(status, depth <= 64 ? AC_OK : AC_E_FORMAT);
        CHECK(status == AC_OK || strstr(ac_error_message(), "column 65: found nesting deeper"));
        ac_arena_deinit(&arena);
    }
    memset(text, '[', 10000);
    text[10000] = '\0';
    check_refused(text, "found nesting deeper than 64");
}

static void
refused_sizes(void)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    static const char one[] = "1";
    CHECK_STATUS(ac_json_parse(&arena, one, ((size_t)64 << 20) + 1, "huge", &json), AC_E_FORMAT,
                 "huge: found 67108865 bytes of JSON, expected at most 67108864");
    size_t size = ((size_t)2 << 21) + 2;
    char *text = malloc(size);
    CHECK(text != NULL);
    for (size_t i = 0; i < size; i++) {
        text[i] = i % 2 ? '1' : ',';
    }
    text[0] = '[';
    CHECK_STATUS(ac_json_parse(&arena, text, size, "many", &json), AC_E_FORMAT,
                 "found more than 2097152 values");
    free(text);
    ac_arena_deinit(&arena);
}

/* ---- memory --------------------------------------------------------------------------------- */

static ac_status
parse_scenario(void *context)
{
    ac_arena arena;
    const ac_json *json = NULL;
    ac_arena_init(&arena);
    ac_status status = ac_json_parse(&arena, context, strlen(context), "oom.json", &json);
    ac_arena_deinit(&arena);
    return status;
}

static void
out_of_memory(void)
{
    ac_text text = {0};
    ac_text_printf(&text, "{\"long\": \"");
    for (int i = 0; i < 7000; i++) {
        ac_text_printf(&text, "0123456789");
    }
    ac_text_printf(&text, "\"");
    for (int i = 0; i < 2000; i++) {
        ac_text_printf(&text, ", \"key %d\": [%d, {\"a\": null, \"b\": \"\"}]", i, i);
    }
    ac_text_printf(&text, "}");
    test_oom(parse_scenario, text.data);
    CHECK(test_state.oom_runs > 10);
    ac_text_free(&text);
}

TEST_MAIN(TEST(tree), TEST(integers), TEST(numbers), TEST(numbers_in_any_locale), TEST(strings),
          TEST(many_children), TEST(refused_structure), TEST(refused_numbers),
          TEST(refused_strings), TEST(refused_utf8), TEST(refused_duplicate_keys),
          TEST(refused_depth), TEST(refused_sizes), TEST(out_of_memory))
