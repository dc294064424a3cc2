/* weights_files: safetensors files and diffusers' folders into a set of weights.  See weights.h.
 *
 * Files are mapped, never read: the set borrows the mapping, which counts the tensors that use it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "json.h"
#include "safetensors.h"
#include "weights.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- mappings ------------------------------------------------------------------------------- */

typedef struct mapping {
    _Atomic int32_t references; /* the loader and each bound tensor */
    void *data;                 /* NULL when size is 0: such a mapping does not exist */
    size_t size;
} mapping;

static void
mapping_unref(void *cookie)
{
    mapping *m = cookie;
    if (atomic_fetch_sub(&m->references, 1) != 1) {
        return;
    }
    if (m->data) {
        munmap(m->data, m->size);
    }
    ac_free(m);
}

static ac_status
io_error(const char *path, const char *doing)
{
    return ac_error(AC_E_IO, "%s: cannot %s: %s", path, doing, strerror(errno));
}

static ac_status
map_descriptor(int descriptor, const char *path, mapping *m)
{
    struct stat info;
    if (fstat(descriptor, &info) < 0) {
        return io_error(path, "be examined");
    }
    if (!S_ISREG(info.st_mode)) {
        return ac_error(AC_E_IO, "%s: found a %s, expected a file", path,
                        S_ISDIR(info.st_mode) ? "directory" : "device or pipe");
    }
    m->size = (size_t)info.st_size;
    if (m->size == 0) {
        return ac_error(AC_E_FORMAT, "%s: found an empty file", path);
    }
    void *data = mmap(NULL, m->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
        return io_error(path, "be mapped");
    }
    m->data = data;
    return AC_OK;
}

/* *out has one reference, the caller's. */
static ac_status
map_file(const char *path, mapping **out)
{
    /* O_NONBLOCK: opening a pipe would wait for a writer. */
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return io_error(path, "be opened");
    }
    mapping *m = ac_calloc(1, sizeof *m);
    ac_status status = m ? map_descriptor(descriptor, path, m) : ac_no_memory(sizeof *m);
    close(descriptor);
    if (status < 0) {
        ac_free(m);
        return status;
    }
    atomic_init(&m->references, 1);
    *out = m;
    return AC_OK;
}

/* ---- one file ------------------------------------------------------------------------------- */

static ac_status
add_tensor(ac_weights *weights, mapping *m, const ac_safetensor *t)
{
    char *data = (char *)m->data + t->offset;
    bool aligned = (uintptr_t)data % ac_dtype_size(t->dtype) == 0;
    if (aligned || t->bytes == 0) {
        ac_tensor tensor = ac_tensor_of(t->bytes ? data : NULL, t->dtype, t->shape);
        atomic_fetch_add(&m->references, 1);
        return ac_weights_add_constant(weights, t->name, &tensor, mapping_unref, m);
    }
    void *copy = ac_malloc_aligned(t->bytes);
    if (!copy) {
        return ac_no_memory(t->bytes);
    }
    memcpy(copy, data, t->bytes);
    ac_tensor tensor = ac_tensor_of(copy, t->dtype, t->shape);
    return ac_weights_add_constant(weights, t->name, &tensor, ac_free_aligned, copy);
}

static ac_status
add_mapping(ac_weights *weights, mapping *m, const char *path, ac_arena *arena)
{
    ac_safetensors s;
    AC_TRY(ac_safetensors_parse(arena, m->data, m->size, path, &s));
    for (int32_t i = 0; i < s.count; i++) {
        ac_status status = add_tensor(weights, m, &s.tensor[i]);
        if (status < 0) {
            return status == AC_E_MEMORY ? status : ac_error_prefix(status, "%s", path);
        }
    }
    return AC_OK;
}

ac_status
ac_weights_add_file(ac_weights *weights, const char *path)
{
    mapping *m = NULL;
    ac_arena arena;
    AC_TRY(map_file(path, &m));
    ac_arena_init(&arena);
    ac_status status = add_mapping(weights, m, path, &arena);
    ac_arena_deinit(&arena);
    mapping_unref(m);
    return status;
}

/* ---- folders -------------------------------------------------------------------------------- */

typedef struct folder {
    const char *path, *stem;
    ac_arena arena; /* of this call: paths, the index */
} folder;

/* "<folder>/<name>", NULL when out of memory. */
static char *
path_of(folder *f, const char *name)
{
    return ac_arena_printf(&f->arena, "%s/%s", f->path, name);
}

static bool
is_file(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

static bool
ends_with(const char *text, const char *end)
{
    size_t length = strlen(text), wanted = strlen(end);
    return length >= wanted && strcmp(text + length - wanted, end) == 0;
}

/* A shard's name comes from a file: it must not lead out of the folder. */
static ac_status
check_shard_name(const char *index_path, const char *tensor, const ac_json *shard)
{
    if (shard->kind != AC_JSON_STRING) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": expected the name of a file",
                        index_path, tensor);
    }
    const char *name = shard->string;
    if (strpbrk(name, "/\\") || name[0] == '.' || !ends_with(name, ".safetensors")) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found the shard \"%.200s\", expected "
                        "the name of a .safetensors file in the same folder", index_path, tensor,
                        name);
    }
    return AC_OK;
}

static int
by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct shards of the map, sorted, so that files are read in the order of their numbers. */
static ac_status
list_shards(folder *f, const char *index_path, const ac_json *map, const char ***out,
            size_t *count)
{
    const char **shard = ac_arena_alloc(&f->arena, map->length * sizeof *shard);
    if (!shard) {
        return ac_no_memory(map->length * sizeof *shard);
    }
    for (size_t i = 0; i < map->length; i++) {
        AC_TRY(check_shard_name(index_path, map->key[i], &map->item[i]));
        shard[i] = map->item[i].string;
    }
    qsort(shard, map->length, sizeof *shard, by_text);
    *count = 0;
    for (size_t i = 0; i < map->length; i++) {
        if (*count == 0 || strcmp(shard[*count - 1], shard[i]) != 0) {
            shard[(*count)++] = shard[i];
        }
    }
    *out = shard;
    return AC_OK;
}

/* Index into the sorted shards. */
static size_t
shard_index(const char **shard, size_t count, const char *name)
{
    const char **at = bsearch(&name, shard, count, sizeof *shard, by_text);
    return (size_t)(at - shard);
}

/* What the index promises for each shard is among the entries [first[s], first[s + 1]). */
static ac_status
check_shards(const ac_weights *weights, const char *index_path, const ac_json *map,
             const char **shard, size_t count, const int32_t *first)
{
    ac_map found = {0};
    ac_status status = AC_OK;
    for (int32_t i = first[0]; i < first[count] && status == AC_OK; i++) {
        status = ac_map_put(&found, ac_weights_name(weights, i), i);
    }
    for (size_t i = 0; i < map->length && status == AC_OK; i++) {
        size_t s = shard_index(shard, count, map->item[i].string);
        int32_t entry = ac_map_get(&found, map->key[i]);
        if (entry < first[s] || entry >= first[s + 1]) {
            status = ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": not found in \"%s\", where the "
                              "index says it is", index_path, map->key[i], shard[s]);
        }
    }
    ac_map_deinit(&found);
    return status;
}

static ac_status
add_shards(ac_weights *weights, folder *f, const char *index_path, const ac_json *map)
{
    const char **shard = NULL;
    size_t count = 0;
    AC_TRY(list_shards(f, index_path, map, &shard, &count));
    int32_t *first = ac_arena_alloc(&f->arena, (count + 1) * sizeof *first);
    if (!first) {
        return ac_no_memory((count + 1) * sizeof *first);
    }
    for (size_t s = 0; s < count; s++) {
        first[s] = ac_weights_count(weights);
        char *path = path_of(f, shard[s]);
        if (!path) {
            return ac_no_memory(strlen(shard[s]));
        }
        AC_TRY(ac_weights_add_file(weights, path));
    }
    first[count] = ac_weights_count(weights);
    return check_shards(weights, index_path, map, shard, count, first);
}

static ac_status
add_index(ac_weights *weights, folder *f, const char *index_path)
{
    mapping *m = NULL;
    const ac_json *index = NULL;
    AC_TRY(map_file(index_path, &m));
    ac_status status = ac_json_parse(&f->arena, m->data, m->size, index_path, &index);
    mapping_unref(m);
    AC_TRY(status);
    const ac_json *map = ac_json_get(index, "weight_map");
    if (!map || map->kind != AC_JSON_OBJECT || map->length == 0) {
        return ac_error(AC_E_FORMAT, "%s: expected an object \"weight_map\" of tensors and files",
                        index_path);
    }
    return add_shards(weights, f, index_path, map);
}

/* Says what the folder has instead: pickles, other variants, nothing. */
static ac_status
nothing_found(folder *f, const char *wanted, const char *variant)
{
    DIR *directory = opendir(f->path);
    if (!directory) {
        return io_error(f->path, "be opened as a folder");
    }
    char tensors[160] = "", pickle[160] = "";
    for (struct dirent *e = readdir(directory); e; e = readdir(directory)) {
        /* The first by name, so that the message does not depend on the file system. */
        char *kept = ends_with(e->d_name, ".safetensors") ? tensors
                     : ends_with(e->d_name, ".bin")       ? pickle
                                                          : NULL;
        if (kept && strlen(e->d_name) < sizeof tensors &&
            (!*kept || strcmp(e->d_name, kept) < 0)) {
            strcpy(kept, e->d_name);
        }
    }
    closedir(directory);
    if (*pickle && !*tensors) {
        return ac_error(AC_E_UNSUPPORTED, "%s: found the pickle %s, expected %s; a pickle can run "
                        "any program when it is read, so only safetensors files are: convert it "
                        "with save_pretrained(..., safe_serialization=True)", f->path, pickle,
                        wanted);
    }
    return ac_error(AC_E_IO, "%s: found %s%s, expected %s or its index%s", f->path,
                    *tensors ? "" : "no weights", tensors, wanted,
                    !*tensors ? ""
                    : variant ? "; try another variant"
                              : "; does it want variant=?");
}

static ac_status
find_and_add(ac_weights *weights, folder *f, const char *variant)
{
    const char *dot = variant ? "." : "", *v = variant ? variant : "";
    char *wanted = ac_arena_printf(&f->arena, "%s%s%s.safetensors", f->stem, dot, v);
    /* diffusers' name of a variant's index, today's and the one before 0.28 */
    char *index = ac_arena_printf(&f->arena, "%s.safetensors.index%s%s.json", f->stem, dot, v);
    char *old_index = ac_arena_printf(&f->arena, "%s%s%s.safetensors.index.json", f->stem, dot, v);
    char *path = wanted ? path_of(f, wanted) : NULL;
    char *index_path = index ? path_of(f, index) : NULL;
    char *old_index_path = old_index ? path_of(f, old_index) : NULL;
    if (!path || !index_path || !old_index_path) {
        return ac_no_memory(strlen(f->path) + strlen(f->stem));
    }
    if (is_file(path)) {
        return ac_weights_add_file(weights, path);
    }
    if (is_file(index_path)) {
        return add_index(weights, f, index_path);
    }
    if (is_file(old_index_path)) {
        return add_index(weights, f, old_index_path);
    }
    return nothing_found(f, wanted, variant);
}

ac_status
ac_weights_add_folder(ac_weights *weights, const char *path, const char *stem,
                      const char *variant)
{
    folder f = {.path = path, .stem = stem};
    if (variant && strpbrk(variant, "/\\")) {
        return ac_error(AC_E_INVALID, "variant: found \"%s\", expected a word such as \"fp16\"",
                        variant);
    }
    ac_arena_init(&f.arena);
    ac_status status = find_and_add(weights, &f, variant && *variant ? variant : NULL);
    ac_arena_deinit(&f.arena);
    return status;
}
