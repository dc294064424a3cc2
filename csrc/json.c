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
    locale_t c_locale;
} parser;

/* ---- errors --------------------------------------------------------------------------------- */

/* "<what>: line 3, column 9: <problem>"; columns count characters, from 1. */
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
    return ac_error(AC_E_FORMAT, "%s: line %zu, column %zu: %s", p->what, line, column, problem);
}

static ac_status
expected(const parser *p, const char *wanted)
{
    ac_text text = {0};
    if (p->at >= p->size) {
        ac_text_printf(&text, "found the end of the text, expected %s", wanted);
    } else {
        unsigned char c = (unsigned char)p->text[p->at];
        ac_text_printf(&text, c > 0x20 && c < 0x7f ? "found '%c', expected %s"
                                                   : "found byte 0x%02x, expected %s", c, wanted);
    }
    char *problem = ac_text_take(&text);
    ac_status status = error_at(p, p->at, problem ? problem : wanted);
    ac_free(problem);
    return status;
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
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3
                    : s[0] < 0xf5                                                     ? 4
                                                                                      : 0;
    if (length == 0 || length > left) {
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
            uint32_t code;
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

/* The digits of a number as mantissa * 10^exponent, to know exactly whether it is an integer. */
typedef struct decimal {
    uint64_t mantissa;
    int64_t exponent;
    bool inexact; /* more digits than 64 bits hold */
} decimal;

/* One run of digits; zeros are held back in the exponent, so that 1000 and 1.50 stay short. */
static void
take_digits(parser *p, decimal *d, bool fraction)
{
    for (; next_is_digit(p); p->at++) {
        uint64_t digit = (uint64_t)(p->text[p->at] - '0');
        d->exponent += !fraction;
        if (digit == 0) {
            continue;
        }
        /* Make the last place of the mantissa this digit's place. */
        int64_t shift = fraction ? d->exponent + 1 : d->exponent;
        (void)shift;
    }
}
