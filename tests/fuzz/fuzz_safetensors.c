/* fuzz_safetensors: a header (after 'H' or 'S', its length put right), or a file (after 'F').
 *
 * What is accepted lies inside the file, covers it once, and loads from a real file too.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create */
#endif
#include "../../csrc/safetensors.h"
#include "../../csrc/weights.h"
#include "fuzz.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define ROW(name, dtype, shape, offsets)                                                           \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

const char *const fuzz_seeds[] = {
    "H{" ROW("a", "F16", "[2,3]", "[0,12]") "}",
    "H{\"__metadata__\":{\"format\":\"pt\"}," ROW("conv_in.weight", "F32", "[1,2,3,3]", "[0,72]")
    "," ROW("conv_in.bias", "F32", "[1]", "[72,76]") "," ROW("n", "I64", "[]", "[76,84]") "}   ",
    "H{" ROW("b", "U8", "[4]", "[4,8]") "," ROW("a", "F32", "[1]", "[0,4]") ","
    ROW("c", "BF16", "[0,9]", "[8,8]") "," ROW("d", "BOOL", "[1,1,1,1,1,1]", "[8,9]") "}",
    "S{" ROW("a", "F16", "[2,3]", "[0,12]") "," ROW("b", "U8", "[0]", "[12,12]") ","
    "\"__metadata__\":{\"18\":\"\"}}", "H{}",
    NULL,
};
const char *const fuzz_words[] = {
    "\"F32\"", "\"F16\"", "\"F8_E4M3\"", "\"I64\"", "\"BOOL\"", "[]", "[0]",
    "[4294967296,4294967296]",
    "[9223372036854775807]", "[-1]", "[0,0]", "[0,4]", "[4,8]", "[8,4]", "[1e18,2]", "[0.5]",
    "\"__metadata__\":{\"a\":\"b\"},", "\"\":", "\"x\":", ROW("y", "U8", "[1]", "[0,1]") ",",
    "null", "{}", "Infinity", "[1,1,1,1,1,1,1]", NULL,
};

static void
check_parsed(const ac_safetensors *s, const uint8_t *file, size_t size)
{
    size_t total = 0;
    unsigned sum = 0;
    for (int32_t i = 0; i < s->count; i++) {
        const ac_safetensor *t = &s->tensor[i];
        FUZZ_CHECK(t->name[0] && t->offset >= 8 && t->offset <= size);
        FUZZ_CHECK(t->bytes <= size - t->offset);
        FUZZ_CHECK((size_t)ac_shape_count(&t->shape) * ac_dtype_size(t->dtype) == t->bytes);
        total += t->bytes;
        for (int32_t j = 0; j < i; j++) {
            const ac_safetensor *u = &s->tensor[j];
            FUZZ_CHECK(t->offset >= u->offset + u->bytes || u->offset >= t->offset + t->bytes);
        }
        for (size_t b = 0; b < t->bytes; b++) {
            sum += file[t->offset + b];
        }
    }
    size_t header = 0;
    for (int i = 7; i >= 0; i--) {
        header = header << 8 | file[i];
    }
    FUZZ_CHECK(8 + header + total == size && sum < 256 * size);
}

/* The same bytes as a file, through the mapping. */
static void
check_file(const uint8_t *file, size_t size, int32_t count)
{
    char path[64];
    ac_weights *weights = NULL;
    int descriptor = memfd_create("fuzz", 0);
    if (descriptor < 0 || write(descriptor, file, size) != (ssize_t)size ||
        ac_weights_new(&weights) < 0) {
        close(descriptor);
        return;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    ac_status status = ac_weights_add_file(weights, path);
    close(descriptor);
    FUZZ_CHECK(status == AC_E_MEMORY ||
               (status == AC_OK && ac_weights_count(weights) == count));
    for (int32_t i = 0; i < ac_weights_count(weights); i++) {
        const char *name = ac_weights_name(weights, i);
        const ac_tensor *t = ac_weights_find(weights, name);
        FUZZ_CHECK((uintptr_t)t->data % ac_dtype_size(t->dtype) == 0);
        ac_weights_checksum(weights, &name, 1);
    }
    ac_weights_unref(weights);
}

static ac_status
check_bytes(const uint8_t *file, size_t size)
{
    ac_arena arena;
    ac_safetensors s = {0};
    ac_arena_init(&arena);
    ac_status status = ac_safetensors_parse(&arena, file, size, "fuzz", &s);
    if (status == AC_OK) {
        check_parsed(&s, file, size);
        check_file(file, size, s.count);
    } else {
        FUZZ_CHECK(status == AC_E_MEMORY ||
                   (status == AC_E_FORMAT && strncmp(ac_error_message(), "fuzz: ", 6) == 0));
    }
    ac_arena_deinit(&arena);
    return status;
}

/* The length before, and behind the header as many bytes as the largest number in it that a small
 * file can have: mutations of the offsets then often fit.  `cut` takes the last third away. */
static ac_status
check_header(const uint8_t *header, size_t length, bool cut)
{
    size_t data = 0, number = 0;
    for (size_t i = 0; i < length; i++) {
        bool digit = header[i] >= '0' && header[i] <= '9';
        bool in_name = i > 0 && header[i - 1] >= 'A'; /* of "F16" */
        number = digit && !in_name && number < 4096 ? number * 10 + (size_t)(header[i] - '0') : 0;
        data = number < 4096 ? AC_MAX(data, number) : data;
    }
    data -= cut ? data / 3 : 0;
    uint8_t *file = calloc(1, 8 + length + data);
    FUZZ_CHECK(file != NULL);
    for (size_t i = 0; i < 8; i++) {
        file[i] = (uint8_t)((uint64_t)length >> 8 * i);
    }
    memcpy(file + 8, header, length);
    ac_status status = check_bytes(file, 8 + length + data);
    free(file);
    return status;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return -1;
    }
    ac_status status = data[0] == 'H' || data[0] == 'S'
                           ? check_header(data + 1, size - 1, data[0] == 'S')
                           : check_bytes(data + 1, size - 1);
    return status == AC_OK ? 0 : -1;
}
