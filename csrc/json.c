/* json: the bounded reader.  See json.h for the contract.
 *
 * One pass over the text by recursive descent, at most MAX_DEPTH deep.  The children of an open
 * array or object wait on a stack, because their number is not known; when it closes they move to
 * the arena as one block.  Time is linear in the text (n log n in the keys of one object), memory
 * is bounded by MAX_VALUES.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* strtod_l: strtod reads "0,5" in a German process */
#endif
#include "json.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEPTH 64
#define MAX_BYTES ((size_t)64 << 20)
/* A safetensors header spends 9 values a tensor, a tokenizer's vocabulary one a word. */
#define MAX_VALUES ((size_t)2 << 20)
/* Python writes at most 24 characters for a float; nobody's config has longer numbers. */
#define MAX_NUMBER 128

/* A finished child of an open array or object. */
typedef struct child {
    ac_json value;
    const char *key; /* NULL in arrays */
    size_t key_at;   /* offset of the key's quote in the text */
} child;

typedef struct parser {
    ac_arena *arena;
    const char *text, *what;
    size_t size, at;
    child *stack;
    size_t n_stack, capacity;
    size_t n_values;
    const char *field; /* key of the innermost object value being read, for errors; or NULL */
    locale_t c_locale;
} parser;

/* ---- errors --------------------------------------------------------------------------------- */

/* "<what>: line 3, column 9: <problem> (in "field")"; columns count characters, from 1. */
static ac_status
error_at(const parser *p, size_t at, const char *problem)
{
    size_t line = 1, column = 1;
    for (size_t i = 0; i < at && i < p->size; i++) {
        if (p->text[i] == '\n') {
            line++;
            column = 1;
        } else if (((unsigned char)p->text[i] & 0xc0) != 0x80) {
            column++;
        }
    }
    char field[96] = "";
    if (p->field) {
        snprintf(field, sizeof field, " (in \"%.64s\")", p->field);
    }
    return ac_error(AC_E_FORMAT, "%s: line %zu, column %zu: %s%s", p->what, line, column, problem,
                    field);
}

static ac_status
expected(const parser *p, const char *wanted)
{
    char problem[160];
    unsigned char c = p->at < p->size ? (unsigned char)p->text[p->at] : 0;
    if (p->at >= p->size) {
        snprintf(problem, sizeof problem, "found the end of the text, expected %s", wanted);
    } else if (c > 0x20 && c < 0x7f) {
        snprintf(problem, sizeof problem, "found '%c', expected %s", c, wanted);
    } else {
        snprintf(problem, sizeof problem, "found byte 0x%02x, expected %s", c, wanted);
    }
    return error_at(p, p->at, problem);
}

/* ---- tokens --------------------------------------------------------------------------------- */

static void
skip_space(parser *p)
{
    while (p->at < p->size && p->text[p->at] != '\0' && strchr(" \t\r\n", p->text[p->at])) {
        p->at++;
    }
}

static bool
next_is(const parser *p, char c)
{
    return p->at < p->size && p->text[p->at] == c;
}

static bool
take(parser *p, char c)
{
    bool found = next_is(p, c);
    p->at += found;
    return found;
}

static bool
next_is_digit(const parser *p)
{
    return p->at < p->size && p->text[p->at] >= '0' && p->text[p->at] <= '9';
}

/* Length of the valid UTF-8 sequence at `at`, 0 when it is none (Unicode 15, table 3-7). */
static size_t
utf8_length(const parser *p, size_t at)
{
    const unsigned char *s = (const unsigned char *)p->text + at;
    size_t left = p->size - at;
    if (s[0] < 0x80) {
        return 1;
    }
    size_t length = s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    if (s[0] < 0xc2 || s[0] > 0xf4 || length > left) {
        return 0;
    }
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90);
    bool surrogate = s[0] == 0xed && s[1] > 0x9f;
    bool past_end = s[0] == 0xf4 && s[1] > 0x8f;
    return overlong || surrogate || past_end ? 0 : length;
}

static size_t
utf8_write(char *to, uint32_t code)
{
    if (code < 0x80) {
        to[0] = (char)code;
        return 1;
    }
    size_t length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const unsigned char lead[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = length - 1; i > 0; i--) {
        to[i] = (char)(0x80 | (code & 0x3f));
        code >>= 6;
    }
    to[0] = (char)(lead[length] | code);
    return length;
}

/* The four digits of \uXXXX at p->at. */
static ac_status
take_hex(parser *p, uint32_t *out)
{
    uint32_t code = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        char c = p->at < p->size ? p->text[p->at] : '\0';
        uint32_t digit;
        if (c >= '0' && c <= '9') {
            digit = (uint32_t)(c - '0');
        } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
            digit = (uint32_t)((c | 0x20) - 'a') + 10;
        } else {
            return expected(p, "a hexadecimal digit");
        }
        code = code * 16 + digit;
    }
    *out = code;
    return AC_OK;
}

/* What follows a backslash, as a code point. */
static ac_status
take_escape(parser *p, uint32_t *out)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    size_t start = p->at - 1;
    char c = p->at < p->size ? p->text[p->at] : '\0';
    const char *simple = c ? strchr(names, c) : NULL;
    if (simple) {
        p->at++;
        *out = (uint32_t)values[simple - names];
        return AC_OK;
    }
    if (!take(p, 'u')) {
        return expected(p, "an escape (one of \" \\ / b f n r t u)");
    }
    AC_TRY(take_hex(p, out));
    if (*out == 0) {
        return error_at(p, start, "found \\u0000, expected a string without NUL");
    }
    if (*out >= 0xd800 && *out < 0xdc00) {
        uint32_t low = 0;
        if (take(p, '\\') && take(p, 'u')) {
            AC_TRY(take_hex(p, &low));
        }
        if (low < 0xdc00 || low > 0xdfff) {
            return error_at(p, start, "found half of a surrogate pair, expected both halves");
        }
        *out = 0x10000 + ((*out - 0xd800) << 10) + (low - 0xdc00);
    } else if (*out >= 0xdc00 && *out <= 0xdfff) {
        return error_at(p, start, "found half of a surrogate pair, expected both halves");
    }
    return AC_OK;
}

/* Offset of the quote that ends the string at p->at, or the text's size. */
static size_t
string_end(const parser *p)
{
    size_t at = p->at;
    while (at < p->size && p->text[at] != '"') {
        at += p->text[at] == '\\' ? 2 : 1;
    }
    return AC_MIN(at, p->size);
}

static ac_status
take_string(parser *p, const char **out, size_t *length)
{
    if (!take(p, '"')) {
        return expected(p, "'\"'");
    }
    size_t room = string_end(p) - p->at; /* unescaping never lengthens */
    char *string = ac_arena_alloc(p->arena, room + 1);
    if (!string) {
        return ac_no_memory(room + 1);
    }
    size_t n = 0;
    while (!take(p, '"')) {
        if (p->at >= p->size) {
            return expected(p, "'\"' at the end of the string");
        }
        if ((unsigned char)p->text[p->at] < 0x20) {
            return expected(p, "no control character in a string");
        }
        if (take(p, '\\')) {
            uint32_t code = 0;
            AC_TRY(take_escape(p, &code));
            n += utf8_write(string + n, code);
            continue;
        }
        size_t bytes = utf8_length(p, p->at);
        if (bytes == 0) {
            return expected(p, "UTF-8");
        }
        memcpy(string + n, p->text + p->at, bytes);
        n += bytes;
        p->at += bytes;
    }
    *out = string;
    *length = n;
    return AC_OK;
}

/* ---- numbers -------------------------------------------------------------------------------- */

/* The number's digits as mantissa * 10^(exponent + zeros), to know whether it is an integer. */
typedef struct decimal {
    uint64_t mantissa;
    int32_t exponent;
    int32_t zeros; /* held back, so that 1e3, 1000 and 1.000 stay short */
    bool too_long; /* more digits than 64 bits hold */
} decimal;

static void
take_digits(parser *p, decimal *d, bool fraction)
{
    for (; next_is_digit(p); p->at++) {
        unsigned digit = (unsigned)(p->text[p->at] - '0');
        d->exponent -= fraction;
        d->zeros++;
        if (digit == 0) {
            continue;
        }
        for (; d->zeros > 0; d->zeros--) {
            d->too_long |= __builtin_mul_overflow(d->mantissa, 10u, &d->mantissa);
        }
        d->too_long |= __builtin_add_overflow(d->mantissa, digit, &d->mantissa);
    }
}

/* The grammar of RFC 8259, section 6; leaves p->at behind the number. */
static ac_status
scan_number(parser *p, decimal *d, bool *negative)
{
    *negative = take(p, '-');
    if (!next_is_digit(p)) {
        return expected(p, "a digit");
    }
    if (take(p, '0')) {
        if (next_is_digit(p)) {
            return expected(p, "no digit after a leading zero");
        }
    } else {
        take_digits(p, d, false);
    }
    if (take(p, '.')) {
        if (!next_is_digit(p)) {
            return expected(p, "a digit after the decimal point");
        }
        take_digits(p, d, true);
    }
    if (take(p, 'e') || take(p, 'E')) {
        bool minus = take(p, '-');
        if (!minus) {
            take(p, '+');
        }
        if (!next_is_digit(p)) {
            return expected(p, "a digit in the exponent");
        }
        int32_t exponent = 0;
        for (; next_is_digit(p); p->at++) {
            exponent = AC_MIN(exponent * 10 + (p->text[p->at] - '0'), 100000);
        }
        d->exponent += minus ? -exponent : exponent;
    }
    return AC_OK;
}

static bool
decimal_integer(const decimal *d, bool negative, int64_t *out)
{
    uint64_t value = d->mantissa;
    int32_t tens = value == 0 ? 0 : d->exponent + d->zeros;
    if (d->too_long || tens < 0 || tens > 19) {
        return false;
    }
    for (; tens > 0; tens--) {
        if (__builtin_mul_overflow(value, 10u, &value)) {
            return false;
        }
    }
    if (value > (uint64_t)INT64_MAX + negative) {
        return false;
    }
    *out = (int64_t)(negative ? 0 - value : value);
    return true;
}

static ac_status
take_number(parser *p, ac_json *out)
{
    size_t start = p->at;
    decimal d = {0};
    bool negative;
    AC_TRY(scan_number(p, &d, &negative));
    size_t length = p->at - start;
    if (length > MAX_NUMBER) {
        return error_at(p, start, "found a number of more than 128 characters");
    }
    char digits[MAX_NUMBER + 1];
    memcpy(digits, p->text + start, length);
    digits[length] = '\0';
    out->kind = AC_JSON_NUMBER;
    out->number = strtod_l(digits, NULL, p->c_locale);
    if (isinf(out->number)) {
        return error_at(p, start, "found a number too large for a double");
    }
    out->is_integer = decimal_integer(&d, negative, &out->integer);
    return AC_OK;
}

/* ---- arrays and objects --------------------------------------------------------------------- */

static ac_status
push(parser *p, const child *c)
{
    if (p->n_stack == p->capacity) {
        size_t capacity = p->capacity ? p->capacity * 2 : 64;
        child *stack = ac_realloc(p->stack, capacity * sizeof *stack);
        if (!stack) {
            return ac_no_memory(capacity * sizeof *stack);
        }
        p->stack = stack;
        p->capacity = capacity;
    }
    p->stack[p->n_stack++] = *c;
    return AC_OK;
}

static int
by_key(const void *a, const void *b)
{
    const child *const *x = a, *const *y = b;
    int order = strcmp((*x)->key, (*y)->key);
    return order ? order : (*x)->key_at < (*y)->key_at ? -1 : 1;
}

/* Sorts pointers to the children: no choice of keys makes this slow, as it could a hash table. */
static ac_status
refuse_duplicate_keys(const parser *p, const child *first, size_t count)
{
    if (count < 2) {
        return AC_OK;
    }
    const child **sorted = ac_malloc(count * sizeof *sorted);
    if (!sorted) {
        return ac_no_memory(count * sizeof *sorted);
    }
    for (size_t i = 0; i < count; i++) {
        sorted[i] = &first[i];
    }
    qsort(sorted, count, sizeof *sorted, by_key);
    const child *again = NULL;
    for (size_t i = 1; i < count && !again; i++) {
        again = strcmp(sorted[i - 1]->key, sorted[i]->key) == 0 ? sorted[i] : NULL;
    }
    ac_free(sorted);
    if (!again) {
        return AC_OK;
    }
    char problem[256];
    snprintf(problem, sizeof problem, "found the key \"%.160s\" a second time", again->key);
    return error_at(p, again->key_at, problem);
}

/* Moves the children from `base` on into the arena. */
static ac_status
close_container(parser *p, size_t base, ac_json *out)
{
    size_t count = p->n_stack - base;
    const child *first = p->stack + base;
    out->length = count;
    p->n_stack = base;
    if (count == 0) {
        return AC_OK;
    }
    ac_json *item = ac_arena_alloc(p->arena, count * sizeof *item);
    if (!item) {
        return ac_no_memory(count * sizeof *item);
    }
    for (size_t i = 0; i < count; i++) {
        item[i] = first[i].value;
    }
    out->item = item;
    if (out->kind == AC_JSON_ARRAY) {
        return AC_OK;
    }
    AC_TRY(refuse_duplicate_keys(p, first, count));
    const char **key = ac_arena_alloc(p->arena, count * sizeof *key);
    if (!key) {
        return ac_no_memory(count * sizeof *key);
    }
    for (size_t i = 0; i < count; i++) {
        key[i] = first[i].key;
    }
    out->key = key;
    return AC_OK;
}

static ac_status parse_value(parser *p, int depth, ac_json *out);

static ac_status
parse_container(parser *p, int depth, ac_json *out)
{
    const char *outer = p->field;
    size_t base = p->n_stack;
    char end = out->kind == AC_JSON_ARRAY ? ']' : '}';
    if (depth > MAX_DEPTH) {
        return error_at(p, p->at, "found nesting deeper than 64");
    }
    p->at++; /* the bracket that chose the kind */
    skip_space(p);
    if (take(p, end)) {
        return close_container(p, base, out);
    }
    for (;;) {
        child c = {0};
        skip_space(p);
        if (out->kind == AC_JSON_OBJECT) {
            size_t length;
            c.key_at = p->at;
            AC_TRY(take_string(p, &c.key, &length));
            skip_space(p);
            if (!take(p, ':')) {
                return expected(p, "':'");
            }
            skip_space(p);
            p->field = c.key;
        }
        AC_TRY(parse_value(p, depth, &c.value));
        p->field = outer;
        AC_TRY(push(p, &c));
        skip_space(p);
        if (take(p, end)) {
            return close_container(p, base, out);
        }
        if (!take(p, ',')) {
            return expected(p, end == ']' ? "',' or ']'" : "',' or '}'");
        }
    }
}

static bool
take_word(parser *p, const char *word)
{
    size_t length = strlen(word);
    bool found = p->size - p->at >= length && memcmp(p->text + p->at, word, length) == 0;
    p->at += found ? length : 0;
    return found;
}

/* The value at p->at; `depth` counts the containers around it. */
static ac_status
parse_value(parser *p, int depth, ac_json *out)
{
    if (++p->n_values > MAX_VALUES) {
        return error_at(p, p->at, "found more than 2097152 values");
    }
    if (next_is(p, '{') || next_is(p, '[')) {
        out->kind = next_is(p, '{') ? AC_JSON_OBJECT : AC_JSON_ARRAY;
        return parse_container(p, depth + 1, out);
    }
    if (next_is(p, '"')) {
        out->kind = AC_JSON_STRING;
        return take_string(p, &out->string, &out->length);
    }
    bool minus = take_word(p, "-Infinity"); /* Python's json writes both */
    if (minus || take_word(p, "Infinity")) {
        out->kind = AC_JSON_NUMBER;
        out->number = minus ? -INFINITY : INFINITY;
        return AC_OK;
    }
    if (next_is(p, '-') || next_is_digit(p)) {
        return take_number(p, out);
    }
    if (p->at < p->size && (take_word(p, "true") || take_word(p, "false"))) {
        out->kind = AC_JSON_BOOL;
        out->boolean = p->text[p->at - 2] == 'u'; /* "true" */
        return AC_OK;
    }
    if (p->at < p->size && take_word(p, "null")) {
        out->kind = AC_JSON_NULL;
        return AC_OK;
    }
    if (take_word(p, "NaN")) { /* Python's json writes that, too */
        p->at -= 3;
        return error_at(p, p->at, "found NaN, expected a number");
    }
    return expected(p, "a value");
}

static ac_status
parse_text(parser *p, const ac_json **out)
{
    ac_json *root = ac_arena_alloc(p->arena, sizeof *root);
    if (!root) {
        return ac_no_memory(sizeof *root);
    }
    skip_space(p);
    AC_TRY(parse_value(p, 0, root));
    skip_space(p);
    if (p->at < p->size) {
        return expected(p, "the end of the text");
    }
    *out = root;
    return AC_OK;
}

ac_status
ac_json_parse(ac_arena *arena, const char *text, size_t size, const char *what,
              const ac_json **out)
{
    if (size > MAX_BYTES) {
        return ac_error(AC_E_FORMAT, "%s: found %zu bytes of JSON, expected at most %zu", what,
                        size, MAX_BYTES);
    }
    parser p = {.arena = arena, .text = text, .what = what, .size = size};
    p.c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    if (!p.c_locale) {
        return ac_no_memory(sizeof(locale_t));
    }
    ac_status status = parse_text(&p, out);
    freelocale(p.c_locale);
    ac_free(p.stack);
    return status;
}

const ac_json *
ac_json_get(const ac_json *object, const char *key)
{
    if (!object || object->kind != AC_JSON_OBJECT) {
        return NULL;
    }
    for (size_t i = 0; i < object->length; i++) {
        if (strcmp(object->key[i], key) == 0) {
            return &object->item[i];
        }
    }
    return NULL;
}
