/* base: status codes and error messages, checked sizes, allocation, arenas, strings.
 *
 * Everything else includes this file; it includes nothing of ours.  Fallible functions return
 * ac_status: 0 or a negative code.  The message is made once, where the facts are, in a buffer of
 * the calling thread: "<layer or argument>: found <x>, expected <y>; <hint>".
 */
#ifndef AC_BASE_H
#define AC_BASE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* code, short text, exception class of python/accel (csrc/py/errors.c raises, nothing else does) */
#define AC_STATUS_MAP(X)                                                                           \
    X(INVALID, -1, "invalid argument", "InvalidArgument")                                          \
    X(DTYPE, -2, "wrong dtype", "DTypeError")                                                      \
    X(SHAPE, -3, "wrong shape", "ShapeError")                                                      \
    X(UNSUPPORTED, -4, "not supported", "UnsupportedError")                                        \
    X(FORMAT, -5, "malformed file", "FormatError")                                                 \
    X(WEIGHTS, -6, "weights do not fit the model", "WeightsError")                                 \
    X(IO, -7, "input/output error", "FileError")                                                   \
    X(MEMORY, -8, "out of memory", "OutOfMemory")                                                  \
    X(DEVICE, -9, "device error", "DeviceError")                                                   \
    X(CANCELLED, -10, "cancelled", "Cancelled")                                                    \
    X(INTERNAL, -11, "internal error", "InternalError")                                            \
    X(NUMERIC, -12, "numbers that are not finite", "NumericError")

typedef int ac_status;

enum {
    AC_OK = 0,
#define X(name, code, text, exception) AC_E_##name = code,
    AC_STATUS_MAP(X)
#undef X
};

#if defined(__GNUC__)
#define AC_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define AC_PRINTF(fmt, args)
#endif

#define AC_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define AC_MIN(a, b) ((a) < (b) ? (a) : (b))
#define AC_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Returns upward on failure; the message is already set. */
#define AC_TRY(expr)                                                                               \
    do {                                                                                           \
        ac_status status_ = (expr);                                                                \
        if (status_ < 0) {                                                                         \
            return status_;                                                                        \
        }                                                                                          \
    } while (0)

/* Sets this thread's message and returns `status`, so that `return ac_error(...)` reads well. */
ac_status ac_error(ac_status status, const char *format, ...) AC_PRINTF(2, 3);
ac_status ac_verror(ac_status status, const char *format, va_list args);

/* Puts "<prefix>: " before the message already set; returns `status` unchanged. */
ac_status ac_error_prefix(ac_status status, const char *format, ...) AC_PRINTF(2, 3);

/* The last message of this thread; never NULL; valid until the next ac_error of this thread. */
const char *ac_error_message(void);
const char *ac_status_text(ac_status status);

/* Heap memory.  NULL only when memory is out; the caller returns ac_no_memory(bytes).
 * ac_alloc_fail_at(n) makes the n-th following allocation fail (tests only; 0 switches off). */
void *ac_malloc(size_t bytes);
void *ac_calloc(size_t count, size_t bytes);
void *ac_realloc(void *old, size_t bytes);
void ac_free(void *memory);
/* 64-byte aligned, for tensors.  Free with ac_free_aligned. */
void *ac_malloc_aligned(size_t bytes);
void ac_free_aligned(void *memory);
ac_status ac_no_memory(size_t bytes);
void ac_alloc_fail_at(int64_t nth);
int64_t ac_alloc_live(void); /* allocations not yet freed, for leak tests */

/* Milliseconds since some moment; only forward. */
double ac_now_ms(void);

/* Checked arithmetic: false on overflow, *out untouched. */
static inline bool
ac_mul_size(size_t a, size_t b, size_t *out)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product)) {
        return false;
    }
    *out = product;
    return true;
}

static inline bool
ac_add_size(size_t a, size_t b, size_t *out)
{
    size_t sum;
    if (__builtin_add_overflow(a, b, &sum)) {
        return false;
    }
    *out = sum;
    return true;
}

static inline bool
ac_mul_i64(int64_t a, int64_t b, int64_t *out)
{
    int64_t product;
    if (__builtin_mul_overflow(a, b, &product)) {
        return false;
    }
    *out = product;
    return true;
}

static inline size_t
ac_align_up(size_t value, size_t alignment)
{
    return (value + alignment - 1) / alignment * alignment;
}

/* Arena: many small objects with one life.  Pointers stay valid until ac_arena_deinit. */
typedef struct ac_arena_block ac_arena_block;
typedef struct ac_arena {
    ac_arena_block *blocks; /* newest first */
    size_t total;           /* bytes handed out */
} ac_arena;

void ac_arena_init(ac_arena *arena);
void ac_arena_deinit(ac_arena *arena);
void *ac_arena_alloc(ac_arena *arena, size_t bytes); /* zeroed, 16-aligned; NULL: out of memory */
char *ac_arena_strdup(ac_arena *arena, const char *text);
char *ac_arena_printf(ac_arena *arena, const char *format, ...) AC_PRINTF(2, 3);

/* Growing text, for dumps and lists of errors.  A failed allocation is sticky: text becomes NULL
 * in ac_text_take. */
typedef struct ac_text {
    char *data; /* NUL-terminated, or NULL when empty */
    size_t length, capacity;
    bool failed;
} ac_text;

void ac_text_printf(ac_text *text, const char *format, ...) AC_PRINTF(2, 3);
void ac_text_json_string(ac_text *text, const char *string); /* quoted and escaped */
char *ac_text_take(ac_text *text); /* caller frees with ac_free; NULL: out of memory */
void ac_text_free(ac_text *text);

/* FNV-1a, for hash tables and cache keys; `seed` chains calls, start with AC_HASH_SEED. */
#define AC_HASH_SEED UINT64_C(0xcbf29ce484222325)
uint64_t ac_hash(const void *data, size_t bytes, uint64_t seed);

/* String to index map over borrowed strings, open addressing.  -1: absent. */
typedef struct ac_map {
    struct ac_map_slot {
        const char *key;
        int32_t value;
    } *slots;
    size_t capacity, count;
} ac_map;

ac_status ac_map_put(ac_map *map, const char *key, int32_t value); /* replaces */
int32_t ac_map_get(const ac_map *map, const char *key);
void ac_map_deinit(ac_map *map);

#endif
