/* base: errors, heap, arenas, text, hash and map.  See base.h for the contracts. */
#include "base.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- errors --------------------------------------------------------------------------------- */

/* The calling thread's message; what is longer than `brief`, a list of weights that do not fit,
 * lies on the heap until the next message or the thread's end. */
static _Thread_local char brief[1024];
static _Thread_local char *longer;

static pthread_key_t longer_key;
static pthread_once_t longer_once = PTHREAD_ONCE_INIT;

static void
make_key(void)
{
    pthread_key_create(&longer_key, free);
}

/* Takes `text` over, NULL for none. */
static void
keep_longer(char *text)
{
    pthread_once(&longer_once, make_key);
    free(longer);
    longer = text;
    pthread_setspecific(longer_key, text);
}

ac_status
ac_verror(ac_status status, const char *format, va_list args)
{
    va_list again;
    va_copy(again, args);
    char text[sizeof brief]; /* args may point into the old message */
    int length = vsnprintf(text, sizeof text, format, args);
    char *whole = length >= (int)sizeof text ? malloc((size_t)length + 1) : NULL;
    if (whole) { /* else cut: an error about memory must not need any */
        vsnprintf(whole, (size_t)length + 1, format, again);
    }
    va_end(again);
    memcpy(brief, text, sizeof brief);
    if (whole || longer) {
        keep_longer(whole);
    }
    return status;
}

ac_status
ac_error(ac_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    ac_verror(status, format, args);
    va_end(args);
    return status;
}

ac_status
ac_error_prefix(ac_status status, const char *format, ...)
{
    char prefix[512];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    return ac_error(status, "%s: %s", prefix, ac_error_message());
}

const char *
ac_error_message(void)
{
    return longer ? longer : brief;
}

const char *
ac_status_text(ac_status status)
{
    switch (status) {
#define X(name, code, text, exception)                                                             \
    case code:                                                                                     \
        return text;
        AC_STATUS_MAP(X)
#undef X
    default:
        return "ok";
    }
}

/* ---- heap ----------------------------------------------------------------------------------- */

static _Atomic int64_t live_allocations;
static _Atomic int64_t fail_countdown; /* tests: 1 fails the next allocation */

static bool
must_fail(void)
{
    if (atomic_load_explicit(&fail_countdown, memory_order_relaxed) == 0) {
        return false;
    }
    return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

static void *
counted(void *memory)
{
    if (memory) {
        atomic_fetch_add_explicit(&live_allocations, 1, memory_order_relaxed);
    }
    return memory;
}

void *
ac_malloc(size_t bytes)
{
    return must_fail() ? NULL : counted(malloc(bytes ? bytes : 1));
}

void *
ac_calloc(size_t count, size_t bytes)
{
    return must_fail() ? NULL : counted(calloc(count ? count : 1, bytes ? bytes : 1));
}

void *
ac_realloc(void *old, size_t bytes)
{
    if (!old) {
        return ac_malloc(bytes);
    }
    return must_fail() ? NULL : realloc(old, bytes ? bytes : 1);
}

void
ac_free(void *memory)
{
    if (memory) {
        atomic_fetch_sub_explicit(&live_allocations, 1, memory_order_relaxed);
        free(memory);
    }
}

void *
ac_malloc_aligned(size_t bytes)
{
    size_t rounded;
    if (!ac_add_size(bytes ? bytes : 1, 63, &rounded) || must_fail()) {
        return NULL;
    }
    return counted(aligned_alloc(64, rounded / 64 * 64));
}

void
ac_free_aligned(void *memory)
{
    ac_free(memory);
}

ac_status
ac_no_memory(size_t bytes)
{
    return ac_error(AC_E_MEMORY, "out of memory: %zu bytes were asked for", bytes);
}

void
ac_alloc_fail_at(int64_t nth)
{
    atomic_store(&fail_countdown, nth);
}

int64_t
ac_alloc_live(void)
{
    return atomic_load(&live_allocations);
}

/* ---- time ----------------------------------------------------------------------------------- */

double
ac_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* ---- arena ---------------------------------------------------------------------------------- */

#define ARENA_BLOCK_BYTES (64 * 1024)

struct ac_arena_block {
    ac_arena_block *next;
    size_t used, size; /* of the bytes that follow this header */
};

/* The header rounded up, so that what follows is 16-aligned. */
#define ARENA_HEADER 32
_Static_assert(sizeof(struct ac_arena_block) <= ARENA_HEADER, "arena header");

void
ac_arena_init(ac_arena *arena)
{
    *arena = (ac_arena){0};
}

void
ac_arena_deinit(ac_arena *arena)
{
    for (ac_arena_block *block = arena->blocks; block;) {
        ac_arena_block *next = block->next;
        ac_free(block);
        block = next;
    }
    *arena = (ac_arena){0};
}

void *
ac_arena_alloc(ac_arena *arena, size_t bytes)
{
    size_t wanted;
    if (!ac_add_size(bytes, 15, &wanted)) {
        return NULL;
    }
    wanted = wanted / 16 * 16;
    ac_arena_block *block = arena->blocks;
    if (!block || block->size - block->used < wanted) {
        size_t size = AC_MAX(wanted, (size_t)ARENA_BLOCK_BYTES - ARENA_HEADER);
        size_t total;
        if (!ac_add_size(size, ARENA_HEADER, &total) || !(block = ac_malloc(total))) {
            return NULL;
        }
        *block = (ac_arena_block){.next = arena->blocks, .used = 0, .size = size};
        arena->blocks = block;
    }
    char *memory = (char *)block + ARENA_HEADER + block->used;
    block->used += wanted;
    arena->total += wanted;
    return memset(memory, 0, wanted);
}

char *
ac_arena_strdup(ac_arena *arena, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = ac_arena_alloc(arena, bytes);
    return copy ? memcpy(copy, text, bytes) : NULL;
}

char *
ac_arena_printf(ac_arena *arena, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *out = length < 0 ? NULL : ac_arena_alloc(arena, (size_t)length + 1);
    if (out) {
        vsnprintf(out, (size_t)length + 1, format, again);
    }
    va_end(again);
    return out;
}

/* ---- text ----------------------------------------------------------------------------------- */

static bool
text_reserve(ac_text *text, size_t more)
{
    size_t wanted = text->length + more + 1;
    if (text->failed) {
        return false;
    }
    if (wanted > text->capacity) {
        size_t capacity = AC_MAX(wanted, AC_MAX(text->capacity * 2, (size_t)256));
        char *data = ac_realloc(text->data, capacity);
        if (!data) {
            text->failed = true;
            return false;
        }
        text->data = data;
        text->capacity = capacity;
    }
    return true;
}

void
ac_text_printf(ac_text *text, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (length >= 0 && text_reserve(text, (size_t)length)) {
        vsnprintf(text->data + text->length, (size_t)length + 1, format, again);
        text->length += (size_t)length;
    }
    va_end(again);
}

void
ac_text_json_string(ac_text *text, const char *string)
{
    ac_text_printf(text, "\"");
    for (const char *c = string; *c; c++) {
        if (*c == '"' || *c == '\\') {
            ac_text_printf(text, "\\%c", *c);
        } else if ((unsigned char)*c < 0x20) {
            ac_text_printf(text, "\\u%04x", (unsigned)(unsigned char)*c);
        } else {
            ac_text_printf(text, "%c", *c);
        }
    }
    ac_text_printf(text, "\"");
}

char *
ac_text_take(ac_text *text)
{
    bool ready = text_reserve(text, 0);
    char *data = ready ? text->data : NULL;
    if (!ready) {
        ac_free(text->data);
    } else {
        data[text->length] = '\0';
    }
    *text = (ac_text){0};
    return data;
}

void
ac_text_free(ac_text *text)
{
    ac_free(text->data);
    *text = (ac_text){0};
}

/* ---- hash and map --------------------------------------------------------------------------- */

uint64_t
ac_hash(const void *data, size_t bytes, uint64_t seed)
{
    const unsigned char *c = data;
    for (size_t i = 0; i < bytes; i++) {
        seed = (seed ^ c[i]) * UINT64_C(0x100000001b3);
    }
    return seed;
}

/* The slot that holds `key`, or the free one where it belongs.  Never full: see ac_map_put. */
static struct ac_map_slot *
map_slot(const ac_map *map, const char *key)
{
    size_t at = ac_hash(key, strlen(key), AC_HASH_SEED) & (map->capacity - 1);
    while (map->slots[at].key && strcmp(map->slots[at].key, key) != 0) {
        at = (at + 1) & (map->capacity - 1);
    }
    return &map->slots[at];
}

static ac_status
map_grow(ac_map *map)
{
    ac_map bigger = {.capacity = map->capacity ? map->capacity * 2 : 64, .count = map->count};
    bigger.slots = ac_calloc(bigger.capacity, sizeof *bigger.slots);
    if (!bigger.slots) {
        return ac_no_memory(bigger.capacity * sizeof *bigger.slots);
    }
    for (size_t i = 0; i < map->capacity; i++) {
        if (map->slots[i].key) {
            *map_slot(&bigger, map->slots[i].key) = map->slots[i];
        }
    }
    ac_free(map->slots);
    *map = bigger;
    return AC_OK;
}

ac_status
ac_map_put(ac_map *map, const char *key, int32_t value)
{
    if (map->count * 2 >= map->capacity) {
        AC_TRY(map_grow(map));
    }
    struct ac_map_slot *slot = map_slot(map, key);
    map->count += slot->key == NULL;
    *slot = (struct ac_map_slot){.key = key, .value = value};
    return AC_OK;
}

int32_t
ac_map_get(const ac_map *map, const char *key)
{
    if (!map->capacity) {
        return -1;
    }
    const struct ac_map_slot *slot = map_slot(map, key);
    return slot->key ? slot->value : -1;
}

void
ac_map_deinit(ac_map *map)
{
    ac_free(map->slots);
    *map = (ac_map){0};
}
