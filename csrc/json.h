/* json: a bounded reader.  Any bytes in, a tree or an error out; never recursion without a limit.
 *
 * Limits: depth 64, whole file 64 MiB, numbers as double (and as int64 when exactly so), strings
 * UTF-8 checked and unescaped, duplicate keys refused.  NaN and trailing commas refused; Infinity
 * and -Infinity are numbers: diffusers writes them ("lambda_min_clipped": -Infinity).
 */
#ifndef AC_JSON_H
#define AC_JSON_H

#include "base.h"

typedef enum ac_json_kind {
    AC_JSON_NULL, AC_JSON_BOOL, AC_JSON_NUMBER, AC_JSON_STRING, AC_JSON_ARRAY, AC_JSON_OBJECT
} ac_json_kind;

typedef struct ac_json {
    ac_json_kind kind;
    bool boolean;
    bool is_integer;            /* the number is exactly `integer` */
    int64_t integer;
    double number;
    const char *string;         /* NUL-terminated; length excludes the NUL */
    size_t length;              /* of string, array or object */
    const struct ac_json *item; /* array elements, or object values */
    const char *const *key;     /* object keys, in file order */
} ac_json;

/* Parses `size` bytes; the tree lives in `arena`.  `what` names the text in errors
 * ("unet/config.json: line 3, column 9: ... (in "act_fn")"). */
ac_status ac_json_parse(ac_arena *arena, const char *text, size_t size, const char *what,
                        const ac_json **out);
/* Value of a key, NULL when absent or `object` is no object. */
const ac_json *ac_json_get(const ac_json *object, const char *key);

#endif
