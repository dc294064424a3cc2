/* weights: the set of named tensors, its checksums, and the derived weights.  See weights.h.
 *
 * Entries and derived records live in the arena, one by one, so that pointers to them stay put
 * while the tables of pointers grow.  One mutex guards the tables; deleters and release() are
 * called outside it, because a caller's may wait for Python's lock, whose holder may wait for us.
 * A second one, taken before it, keeps the makers of derived weights and those who invalidate them
 * apart: else what was changed meanwhile would be marked valid when the maker is done.
 * The files are in weights_files.c.
 */
#include "weights.h"

#include "lock.h"

#include <stdatomic.h>
#include <string.h>

typedef struct entry {
    const char *name; /* in the arena */
    ac_tensor tensor;
    void (*deleter)(void *cookie);
    void *cookie;
    bool device;       /* in the device's memory: the host cannot read it */
    bool constant;     /* its bytes never change: one reading of them is enough */
    bool hashed;       /* `hash` holds: for ever when constant, else within one ac_weights_check */
    uint64_t hash;
} entry;

struct ac_weights {
    _Atomic int32_t references;
    _Atomic uint64_t generation;
    pthread_mutex_t making; /* held while derived weights are made, or marked invalid */
    pthread_mutex_t mutex; /* guards what follows */
    ac_arena arena;        /* entries, derived records, names */
    entry **entries;
    int32_t n_entries, cap_entries;
    ac_map by_name;        /* -1: renamed away */
    ac_derived **derived;
    int32_t n_derived, cap_derived;
    ac_map by_key;
    void (*release)(void *self, void *data);
    void *release_self;
    int32_t users;         /* that called set_release and did not leave */
};

static void
lock(const ac_weights *weights)
{
    ac_lock(&((ac_weights *)weights)->mutex);
}

static void
unlock(const ac_weights *weights)
{
    ac_unlock(&((ac_weights *)weights)->mutex);
}

/* ---- life ----------------------------------------------------------------------------------- */

ac_status
ac_weights_new(ac_weights **out)
{
    ac_weights *weights = ac_calloc(1, sizeof *weights);
    if (!weights) {
        return ac_no_memory(sizeof *weights);
    }
    atomic_init(&weights->references, 1);
    pthread_mutex_init(&weights->making, NULL);
    pthread_mutex_init(&weights->mutex, NULL);
    ac_arena_init(&weights->arena);
    *out = weights;
    return AC_OK;
}

ac_weights *
ac_weights_ref(ac_weights *weights)
{
    atomic_fetch_add(&weights->references, 1);
    return weights;
}

void
ac_weights_unref(ac_weights *weights)
{
    if (!weights || atomic_fetch_sub(&weights->references, 1) != 1) {
        return;
    }
    ac_weights_drop_derived(weights);
    for (int32_t i = 0; i < weights->n_entries; i++) {
        entry *e = weights->entries[i];
        if (e->deleter) {
            e->deleter(e->cookie);
        }
    }
    ac_map_deinit(&weights->by_name);
    ac_map_deinit(&weights->by_key);
    ac_free(weights->entries);
    ac_free(weights->derived);
    ac_arena_deinit(&weights->arena);
    pthread_mutex_destroy(&weights->mutex);
    pthread_mutex_destroy(&weights->making);
    ac_free(weights);
}

/* Makes room for one more pointer in a table of pointers. */
static ac_status
reserve(void ***table, int32_t count, int32_t *capacity)
{
    if (count < *capacity) {
        return AC_OK;
    }
    if (*capacity > INT32_MAX / 2) {
        return ac_error(AC_E_INVALID, "weights: found more than %d tensors", *capacity);
    }
    int32_t wanted = *capacity ? *capacity * 2 : 64;
    void **grown = ac_realloc(*table, (size_t)wanted * sizeof **table);
    if (!grown) {
        return ac_no_memory((size_t)wanted * sizeof **table);
    }
    *table = grown;
    *capacity = wanted;
    return AC_OK;
}

/* ---- sources -------------------------------------------------------------------------------- */

/* [o, i, h, w] whose bytes are in the order o, h, w, i. */
static bool
is_channels_last(const ac_tensor *t)
{
    if (t->shape.rank != 4) {
        return false;
    }
    const int64_t *dim = t->shape.dim, *stride = t->stride;
    return stride[1] == 1 && stride[3] == dim[1] && stride[2] == dim[3] * dim[1] &&
           stride[0] == dim[2] * dim[3] * dim[1];
}

static ac_status
check_binding(const char *name, const ac_tensor *tensor, bool device)
{
    char text[AC_SHAPE_TEXT];
    if (!name || !*name) {
        return ac_error(AC_E_INVALID, "weights: found an empty name");
    }
    if ((unsigned)tensor->dtype >= AC_DTYPE_COUNT) {
        return ac_error(AC_E_DTYPE, "%s: found dtype number %d", name, (int)tensor->dtype);
    }
    if (tensor->shape.rank < 0 || tensor->shape.rank > AC_MAX_RANK) {
        return ac_error(AC_E_SHAPE, "%s: found %d dimensions, expected at most %d", name,
                        tensor->shape.rank, AC_MAX_RANK);
    }
    int64_t count = ac_shape_count(&tensor->shape), bytes;
    size_t item = ac_dtype_size(tensor->dtype);
    if (count < 0 || !ac_mul_i64(count, (int64_t)item, &bytes)) {
        return ac_error(AC_E_SHAPE, "%s: found shape %s, expected dimensions whose product fits",
                        name, ac_shape_text(&tensor->shape, text));
    }
    if (count > 0 && !ac_tensor_is_contiguous(tensor) && !(device && is_channels_last(tensor))) {
        return ac_error(AC_E_INVALID, "%s: found a strided tensor, expected a contiguous one",
                        name);
    }
    if (count > 0 && !tensor->data) {
        return ac_error(AC_E_INVALID, "%s: found no data", name);
    }
    if ((uintptr_t)tensor->data % item != 0) {
        return ac_error(AC_E_INVALID, "%s: found %s data at an address that is no multiple of %zu",
                        name, ac_dtype_name(tensor->dtype), item);
    }
    return AC_OK;
}

static entry *
find_locked(const ac_weights *weights, const char *name)
{
    int32_t index = ac_map_get(&weights->by_name, name);
    return index < 0 ? NULL : weights->entries[index];
}

static ac_status
new_entry_locked(ac_weights *weights, const char *name, entry **out)
{
    AC_TRY(reserve((void ***)&weights->entries, weights->n_entries, &weights->cap_entries));
    entry *e = ac_arena_alloc(&weights->arena, sizeof *e);
    char *own_name = ac_arena_strdup(&weights->arena, name);
    if (!e || !own_name) {
        return ac_no_memory(sizeof *e + strlen(name));
    }
    AC_TRY(ac_map_put(&weights->by_name, own_name, weights->n_entries));
    e->name = own_name;
    weights->entries[weights->n_entries++] = e;
    *out = e;
    return AC_OK;
}

static bool
invalidate_locked(ac_weights *weights, const char *name)
{
    bool any = false;
    for (int32_t i = 0; i < weights->n_derived; i++) {
        ac_derived *d = weights->derived[i];
        bool hit = name == NULL;
        for (int32_t s = 0; s < d->n_sources && !hit; s++) {
            hit = strcmp(d->source[s], name) == 0;
        }
        any = any || (hit && d->valid);
        d->valid = d->valid && !hit;
    }
    return any;
}

/* `old` receives the binding to delete afterwards, outside the lock: the replaced one, or the new
 * one when this fails. */
static ac_status
bind_locked(ac_weights *weights, const char *name, const entry *binding, entry *old)
{
    *old = *binding;
    AC_TRY(check_binding(name, &binding->tensor, binding->device));
    entry *e = find_locked(weights, name);
    if (e && binding->constant) {
        return ac_error(AC_E_FORMAT, "tensor \"%s\": found a second time, expected it once", name);
    }
    if (!e) {
        AC_TRY(new_entry_locked(weights, name, &e));
    }
    *old = *e;
    const char *own_name = e->name;
    *e = *binding;
    e->name = own_name;
    invalidate_locked(weights, own_name);
    atomic_fetch_add(&weights->generation, 1);
    return AC_OK;
}

static ac_status
bind(ac_weights *weights, const char *name, const entry *binding)
{
    entry old;
    lock(weights);
    ac_status status = bind_locked(weights, name, binding, &old);
    unlock(weights);
    if (old.deleter) {
        old.deleter(old.cookie);
    }
    return status;
}

ac_status
ac_weights_set(ac_weights *weights, const char *name, const ac_tensor *tensor,
               void (*deleter)(void *cookie), void *cookie)
{
    entry binding = {.tensor = *tensor, .deleter = deleter, .cookie = cookie};
    return bind(weights, name, &binding);
}

ac_status
ac_weights_set_device(ac_weights *weights, const char *name, const ac_tensor *tensor,
                      void (*deleter)(void *cookie), void *cookie)
{
    entry binding = {.tensor = *tensor, .deleter = deleter, .cookie = cookie, .device = true};
    return bind(weights, name, &binding);
}

bool
ac_weights_on_device(const ac_weights *weights, const char *name)
{
    lock(weights);
    const entry *e = find_locked(weights, name);
    bool device = e && e->device;
    unlock(weights);
    return device;
}

ac_status
ac_weights_add_constant(ac_weights *weights, const char *name, const ac_tensor *tensor,
                        void (*deleter)(void *cookie), void *cookie)
{
    entry binding = {
        .tensor = *tensor, .deleter = deleter, .cookie = cookie, .constant = true};
    return bind(weights, name, &binding);
}

const ac_tensor *
ac_weights_find(const ac_weights *weights, const char *name)
{
    lock(weights);
    const entry *e = find_locked(weights, name);
    unlock(weights);
    return e ? &e->tensor : NULL;
}

int32_t
ac_weights_count(const ac_weights *weights)
{
    lock(weights);
    int32_t count = weights->n_entries;
    unlock(weights);
    return count;
}

const char *
ac_weights_name(const ac_weights *weights, int32_t index)
{
    lock(weights);
    const char *name = weights->entries[index]->name;
    unlock(weights);
    return name;
}

static bool
rename_locked(ac_weights *weights, const char *from, const char *to)
{
    int32_t index = ac_map_get(&weights->by_name, from);
    if (index < 0 || !*to || ac_map_get(&weights->by_name, to) >= 0) {
        return false;
    }
    entry *e = weights->entries[index];
    const char *old = e->name;
    char *name = ac_arena_strdup(&weights->arena, to);
    /* The first put leaves room for the second, which thus cannot fail half-way. */
    if (!name || ac_map_put(&weights->by_name, old, -1) < 0) {
        return false;
    }
    ac_map_put(&weights->by_name, name, index);
    e->name = name;
    for (int32_t i = 0; i < weights->n_derived; i++) {
        const char **source = (const char **)weights->derived[i]->source;
        for (int32_t s = 0; s < weights->derived[i]->n_sources; s++) {
            source[s] = strcmp(source[s], old) == 0 ? name : source[s];
        }
    }
    return true;
}

bool
ac_weights_rename(ac_weights *weights, const char *from, const char *to)
{
    lock(weights);
    bool done = rename_locked(weights, from, to);
    unlock(weights);
    return done;
}

uint64_t
ac_weights_generation(const ac_weights *weights)
{
    return atomic_load(&((ac_weights *)weights)->generation);
}

/* ---- checksum ------------------------------------------------------------------------------- */

/* Odd, so that multiplying loses nothing; the bits of the golden ratio. */
#define MIX UINT64_C(0x9e3779b97f4a7c15)
#define LANES 8

/* For a fixed word this maps hashes one to one, and for a fixed hash words: a single changed word
 * always shows.  Without the rotation a flipped top bit would stay on top, and two flipped signs
 * would cancel; 29 moves no sign bit of f16, bf16, f32 or f64 pairs onto another. */
static inline uint64_t
mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * MIX;
    return hash << 29 | hash >> 35;
}

/* Eight independent chains of xor, multiply, rotate (5 cycles) keep the multiplier busy: 8 bytes a
 * cycle, more than memory delivers, so wider vectors would gain nothing. */
static uint64_t
hash_bytes(const void *data, size_t bytes)
{
    const unsigned char *from = data;
    uint64_t lane[LANES], word[LANES];
    for (int i = 0; i < LANES; i++) {
        lane[i] = AC_HASH_SEED;
    }
    size_t left = bytes;
    for (; left >= sizeof word; left -= sizeof word, from += sizeof word) {
        memcpy(word, from, sizeof word);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i++) {
            lane[i] = mix(lane[i], word[i]);
        }
    }
    if (left > 0) {
        memset(word, 0, sizeof word);
        memcpy(word, from, left);
        for (int i = 0; i < LANES; i++) {
            lane[i] = mix(lane[i], word[i]);
        }
    }
    uint64_t hash = mix(AC_HASH_SEED, bytes);
    for (int i = 0; i < LANES; i++) {
        hash = mix(hash, lane[i]);
    }
    return hash ^ hash >> 31;
}

static uint64_t
hash_entry(entry *e)
{
    if (e->device) {
        return (uint64_t)(uintptr_t)e->tensor.data;
    }
    if (!e->hashed) {
        e->hash = hash_bytes(e->tensor.data, ac_tensor_bytes(&e->tensor));
        e->hashed = e->constant;
    }
    return e->hash;
}

static uint64_t
checksum_locked(const ac_weights *weights, const char *const *names, int32_t count,
                bool keep_hashes)
{
    uint64_t sum = AC_HASH_SEED;
    for (int32_t i = 0; i < count; i++) {
        entry *e = find_locked(weights, names[i]);
        sum = mix(sum, e ? hash_entry(e) : 0);
        if (e && keep_hashes) {
            e->hashed = true;
        }
    }
    return sum;
}

uint64_t
ac_weights_checksum(const ac_weights *weights, const char *const *names, int32_t count)
{
    lock(weights);
    uint64_t sum = checksum_locked(weights, names, count, false);
    unlock(weights);
    return sum;
}

/* ---- derived weights ------------------------------------------------------------------------ */

static ac_status
check_same_sources(const ac_derived *d, const char *const *source, int32_t n_sources)
{
    bool same = d->n_sources == n_sources;
    for (int32_t i = 0; i < n_sources && same; i++) {
        same = strcmp(d->source[i], source[i]) == 0;
    }
    return same ? AC_OK
                : ac_error(AC_E_INTERNAL, "%s: found other sources than before", d->key);
}

static ac_status
derived_locked(ac_weights *weights, const char *key, const char *const *source,
               int32_t n_sources, ac_derived **out)
{
    int32_t index = ac_map_get(&weights->by_key, key);
    if (index >= 0) {
        *out = weights->derived[index];
        return check_same_sources(*out, source, n_sources);
    }
    AC_TRY(reserve((void ***)&weights->derived, weights->n_derived, &weights->cap_derived));
    size_t bytes = (size_t)n_sources * sizeof *source;
    ac_derived *d = ac_arena_alloc(&weights->arena, sizeof *d);
    char *own_key = ac_arena_strdup(&weights->arena, key);
    const char **own_source = ac_arena_alloc(&weights->arena, bytes);
    if (!d || !own_key || !own_source) {
        return ac_no_memory(sizeof *d + bytes);
    }
    for (int32_t i = 0; i < n_sources; i++) {
        own_source[i] = ac_arena_strdup(&weights->arena, source[i]);
        if (!own_source[i]) {
            return ac_no_memory(strlen(source[i]));
        }
    }
    *d = (ac_derived){.key = own_key, .n_sources = n_sources, .source = own_source};
    AC_TRY(ac_map_put(&weights->by_key, own_key, weights->n_derived));
    weights->derived[weights->n_derived++] = d;
    *out = d;
    return AC_OK;
}

ac_status
ac_weights_derived(ac_weights *weights, const char *key, const char *const *source,
                   int32_t n_sources, ac_derived **out)
{
    lock(weights);
    ac_status status = derived_locked(weights, key, source, n_sources, out);
    unlock(weights);
    return status;
}

void
ac_weights_make_begin(ac_weights *weights)
{
    ac_lock(&weights->making);
}

void
ac_weights_make_end(ac_weights *weights)
{
    ac_unlock(&weights->making);
}

ac_status
ac_weights_set_release(ac_weights *weights, void (*release)(void *self, void *data), void *self)
{
    lock(weights);
    bool fits = weights->users == 0 ||
                (weights->release == release && weights->release_self == self);
    if (fits) {
        weights->users++;
        weights->release = release;
        weights->release_self = self;
    }
    unlock(weights);
    return fits ? AC_OK : ac_error(AC_E_INVALID, "weights: found a model on another device that "
                                                 "uses them, expected one device; load them anew");
}

int32_t
ac_weights_derived_count(const ac_weights *weights)
{
    lock(weights);
    int32_t count = weights->n_derived;
    unlock(weights);
    return count;
}

const ac_derived *
ac_weights_derived_at(const ac_weights *weights, int32_t index)
{
    lock(weights);
    const ac_derived *d = weights->derived[index];
    unlock(weights);
    return d;
}

void
ac_weights_invalidate(ac_weights *weights, const char *name)
{
    ac_weights_make_begin(weights);
    lock(weights);
    if (invalidate_locked(weights, name)) {
        atomic_fetch_add(&weights->generation, 1);
    }
    unlock(weights);
    ac_weights_make_end(weights);
}

int32_t
ac_weights_check(ac_weights *weights)
{
    int32_t changed = 0;
    ac_weights_make_begin(weights);
    lock(weights);
    for (int32_t i = 0; i < weights->n_derived; i++) {
        ac_derived *d = weights->derived[i];
        if (!d->valid) {
            continue;
        }
        d->valid = checksum_locked(weights, d->source, d->n_sources, true) == d->checksum;
        changed += !d->valid;
    }
    for (int32_t i = 0; i < weights->n_entries; i++) {
        weights->entries[i]->hashed = weights->entries[i]->hashed && weights->entries[i]->constant;
    }
    if (changed) {
        atomic_fetch_add(&weights->generation, 1);
    }
    unlock(weights);
    ac_weights_make_end(weights);
    return changed;
}

void
ac_weights_leave(ac_weights *weights)
{
    lock(weights);
    bool last = --weights->users == 0;
    unlock(weights);
    if (last) {
        ac_weights_drop_derived(weights);
    }
}

void
ac_weights_drop_derived(ac_weights *weights)
{
    /* One at a time, because release() is called outside the lock. */
    for (int32_t i = 0; i < ac_weights_derived_count(weights); i++) {
        lock(weights);
        ac_derived *d = weights->derived[i];
        void *data = d->data, *self = weights->release_self;
        void (*release)(void *, void *) = weights->release;
        bool own = !d->borrowed;
        d->data = NULL;
        d->bytes = 0;
        d->valid = d->borrowed = false;
        atomic_fetch_add(&weights->generation, data != NULL);
        unlock(weights);
        if (data && own && release) {
            release(self, data);
        }
    }
}
