/* safetensors: checks a file's header.  See safetensors.h for the format.
 *
 * The format's own promises are enforced, so that nothing behind this needs to doubt: tensors
 * cover the bytes after the header exactly once, without overlap and without holes.
 */
#include "safetensors.h"

#include "json.h"

#include <stdlib.h>
#include <string.h>

#define MAX_HEADER ((uint64_t)64 << 20)

/* One tensor's row of the header, for errors. */
typedef struct row {
    const char *path, *name;
    size_t data_bytes; /* of the file, behind the header */
} row;

static ac_status
wrong_row(const row *r, const char *problem)
{
    return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": %s", r->path, r->name, problem);
}

static ac_status
read_header_size(const unsigned char *file, size_t size, const char *path, size_t *out)
{
    if (size < 8) {
        return ac_error(AC_E_FORMAT, "%s: found %zu bytes, expected a safetensors file of at "
                        "least 8; is the download complete?", path, size);
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) {
        length = length << 8 | file[i];
    }
    if (length > MAX_HEADER) {
        return ac_error(AC_E_FORMAT, "%s: found a header of %llu bytes, expected at most %llu; is "
                        "it a safetensors file?", path, (unsigned long long)length,
                        (unsigned long long)MAX_HEADER);
    }
    if (length > size - 8) {
        return ac_error(AC_E_FORMAT, "%s: found %zu bytes after the length, expected a header of "
                        "%llu; is the download complete?", path, size - 8,
                        (unsigned long long)length);
    }
    if (length == 0 || file[8] != '{') {
        return ac_error(AC_E_FORMAT, "%s: found no '{' at the start of the header", path);
    }
    *out = (size_t)length;
    return AC_OK;
}

static ac_status
check_metadata(const ac_json *metadata, const char *path)
{
    bool right = metadata->kind == AC_JSON_OBJECT;
    for (size_t i = 0; right && i < metadata->length; i++) {
        right = metadata->item[i].kind == AC_JSON_STRING;
    }
    return right ? AC_OK
                 : ac_error(AC_E_FORMAT, "%s: __metadata__: expected an object of strings", path);
}

static ac_status
read_dtype(const row *r, const ac_json *info, ac_dtype *out)
{
    const ac_json *tag = ac_json_get(info, "dtype");
    if (!tag || tag->kind != AC_JSON_STRING) {
        return wrong_row(r, "found no \"dtype\" string");
    }
    if (!ac_dtype_from_safetensors(tag->string, out)) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found dtype \"%.40s\", expected F64, "
                        "F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL", r->path, r->name,
                        tag->string);
    }
    return AC_OK;
}

static ac_status
read_shape(const row *r, const ac_json *info, ac_shape *out)
{
    const ac_json *shape = ac_json_get(info, "shape");
    if (!shape || shape->kind != AC_JSON_ARRAY) {
        return wrong_row(r, "found no \"shape\" array");
    }
    if (shape->length > AC_MAX_RANK) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found %zu dimensions, expected at "
                        "most %d", r->path, r->name, shape->length, AC_MAX_RANK);
    }
    *out = (ac_shape){.rank = (int32_t)shape->length};
    for (size_t i = 0; i < shape->length; i++) {
        const ac_json *dim = &shape->item[i];
        if (!dim->is_integer || dim->integer < 0) {
            return wrong_row(r, "expected dimensions that are integers, 0 or more");
        }
        out->dim[i] = dim->integer;
    }
    return AC_OK;
}

static ac_status
read_offsets(const row *r, const ac_json *info, size_t *begin, size_t *end)
{
    const ac_json *offsets = ac_json_get(info, "data_offsets");
    if (!offsets || offsets->kind != AC_JSON_ARRAY || offsets->length != 2) {
        return wrong_row(r, "found no \"data_offsets\" array of two");
    }
    for (int i = 0; i < 2; i++) {
        if (!offsets->item[i].is_integer || offsets->item[i].integer < 0) {
            return wrong_row(r, "expected data_offsets that are integers, 0 or more");
        }
    }
    int64_t from = offsets->item[0].integer, to = offsets->item[1].integer;
    if (from > to || (uint64_t)to > r->data_bytes) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found data_offsets [%lld, %lld], "
                        "expected two in order, up to the file's %zu bytes of data", r->path,
                        r->name, (long long)from, (long long)to, r->data_bytes);
    }
    *begin = (size_t)from;
    *end = (size_t)to;
    return AC_OK;
}

static ac_status
read_row(const row *r, const ac_json *info, ac_safetensor *out)
{
    size_t begin = 0, end = 0;
    if (!*r->name) {
        return ac_error(AC_E_FORMAT, "%s: found a tensor with an empty name", r->path);
    }
    if (info->kind != AC_JSON_OBJECT) {
        return wrong_row(r, "expected an object of dtype, shape and data_offsets");
    }
    AC_TRY(read_dtype(r, info, &out->dtype));
    AC_TRY(read_shape(r, info, &out->shape));
    AC_TRY(read_offsets(r, info, &begin, &end));
    char text[AC_SHAPE_TEXT];
    int64_t count = ac_shape_count(&out->shape), bytes;
    if (count < 0 || !ac_mul_i64(count, (int64_t)ac_dtype_size(out->dtype), &bytes)) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found shape %s, expected dimensions "
                        "whose product fits", r->path, r->name, ac_shape_text(&out->shape, text));
    }
    if ((uint64_t)bytes != end - begin) {
        return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found %zu bytes, expected %lld for %s "
                        "of %s", r->path, r->name, end - begin, (long long)bytes,
                        ac_shape_text(&out->shape, text), ac_dtype_name(out->dtype));
    }
    out->name = r->name;
    out->offset = begin;
    out->bytes = end - begin;
    return AC_OK;
}

static int
by_offset(const void *a, const void *b)
{
    const ac_safetensor *const *x = a, *const *y = b;
    if ((*x)->offset != (*y)->offset) {
        return (*x)->offset < (*y)->offset ? -1 : 1;
    }
    return ((*x)->bytes > (*y)->bytes) - ((*x)->bytes < (*y)->bytes); /* empty ones first */
}

/* Every byte behind the header belongs to one tensor. */
static ac_status
check_cover(const ac_safetensor *const *sorted, int32_t count, size_t data_bytes,
            const char *path)
{
    size_t covered = 0;
    for (int32_t i = 0; i < count; i++) {
        const ac_safetensor *t = sorted[i];
        if (t->offset != covered) {
            return ac_error(AC_E_FORMAT, "%s: tensor \"%.200s\": found data from byte %zu, "
                            "expected from %zu, where the one before ends (%s)", path, t->name,
                            t->offset, covered, t->offset < covered ? "they overlap" : "a hole");
        }
        covered += t->bytes;
    }
    if (covered != data_bytes) {
        return ac_error(AC_E_FORMAT, "%s: found %zu bytes of data, expected %zu as the tensors say",
                        path, data_bytes, covered);
    }
    return AC_OK;
}

static ac_status
check_layout(const ac_safetensors *s, size_t data_bytes, const char *path)
{
    size_t bytes = (size_t)s->count * sizeof(ac_safetensor *);
    const ac_safetensor **sorted = ac_malloc(bytes);
    if (!sorted) {
        return ac_no_memory(bytes);
    }
    for (int32_t i = 0; i < s->count; i++) {
        sorted[i] = &s->tensor[i];
    }
    qsort(sorted, (size_t)s->count, sizeof *sorted, by_offset);
    ac_status status = check_cover(sorted, s->count, data_bytes, path);
    ac_free(sorted);
    return status;
}

ac_status
ac_safetensors_parse(ac_arena *arena, const void *file, size_t size, const char *path,
                     ac_safetensors *out)
{
    size_t header_size = 0;
    const ac_json *header = NULL;
    AC_TRY(read_header_size(file, size, path, &header_size));
    ac_status status = ac_json_parse(arena, (const char *)file + 8, header_size, "header", &header);
    if (status < 0) {
        return status == AC_E_MEMORY ? status : ac_error_prefix(status, "%s", path);
    }
    size_t data_bytes = size - 8 - header_size;
    ac_safetensors s = {0};
    s.tensor = ac_arena_alloc(arena, header->length * sizeof *s.tensor);
    if (!s.tensor) {
        return ac_no_memory(header->length * sizeof *s.tensor);
    }
    for (size_t i = 0; i < header->length; i++) {
        if (strcmp(header->key[i], "__metadata__") == 0) {
            AC_TRY(check_metadata(&header->item[i], path));
            continue;
        }
        row r = {.path = path, .name = header->key[i], .data_bytes = data_bytes};
        AC_TRY(read_row(&r, &header->item[i], &s.tensor[s.count]));
        s.count++;
    }
    AC_TRY(check_layout(&s, data_bytes, path));
    for (int32_t i = 0; i < s.count; i++) {
        s.tensor[i].offset += 8 + header_size;
    }
    *out = s;
    return AC_OK;
}
