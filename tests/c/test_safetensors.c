/* safetensors and folders: files that are right, every lie a header can tell, shards, variants. */
#include "../../csrc/safetensors.h"
#include "../../csrc/weights.h"
#include "test.h"

#include <sys/stat.h>
#include <unistd.h>

/* ---- files in a folder of this run ---------------------------------------------------------- */

static char folder[64];

static const char *
path_of(const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void
write_file(const char *name, const void *bytes, size_t size)
{
    FILE *file = fopen(path_of(name), "wb");
    CHECK(file != NULL);
    CHECK_INT(fwrite(bytes, 1, size, file), size);
    CHECK_INT(fclose(file), 0);
}

static void
write_text(const char *name, const char *text)
{
    write_file(name, text, strlen(text));
}

/* Each test starts with an empty folder. */
static void
clean_folder(void)
{
    char command[160];
    if (!folder[0]) {
        strcpy(folder, "/tmp/accel-test-XXXXXX");
        CHECK(mkdtemp(folder) != NULL);
    }
    snprintf(command, sizeof command, "rm -rf '%s' && mkdir '%s'", folder, folder);
    CHECK_INT(system(command), 0);
}

/* A file of this header and `data` bytes 0, 1, 2 ... after it; returns its size. */
static size_t
image(char *to, size_t room, const char *header, size_t data)
{
    size_t length = strlen(header), size = 8 + length + data;
    CHECK(size <= room);
    for (size_t i = 0; i < 8; i++) {
        to[i] = (char)((uint64_t)length >> 8 * i);
    }
    memcpy(to + 8, header, length);
    for (size_t i = 0; i < data; i++) {
        to[8 + length + i] = (char)i;
    }
    return size;
}

static void
write_tensors(const char *name, const char *header, size_t data)
{
    char bytes[4096];
    write_file(name, bytes, image(bytes, sizeof bytes, header, data));
}

static ac_weights *
new_set(void)
{
    ac_weights *weights = NULL;
    CHECK_OK(ac_weights_new(&weights));
    return weights;
}

/* ---- what is read --------------------------------------------------------------------------- */

static void
one_file(void)
{
    clean_folder();
    /* Names out of the order of their data, an empty tensor, a scalar, padding, metadata. */
    write_tensors("m.safetensors",
                  "{\"__metadata__\":{\"format\":\"pt\"},"
                  "\"b\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[8,24]},"
                  "\"a\":{\"shape\":[4],\"data_offsets\":[0,8],\"dtype\":\"F16\"},"
                  "\"none\":{\"dtype\":\"I64\",\"shape\":[0,3],\"data_offsets\":[8,8]},"
                  "\"one\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[24,25]}}  ", 25);
    ac_weights *w = new_set();
    CHECK_OK(ac_weights_add_file(w, path_of("m.safetensors")));
    CHECK_INT(ac_weights_count(w), 4);
    CHECK_STRING(ac_weights_name(w, 0), "b");
    CHECK_STRING(ac_weights_name(w, 1), "a");
    const ac_tensor *a = ac_weights_find(w, "a"), *b = ac_weights_find(w, "b");
    CHECK(a->dtype == AC_F16 && a->shape.rank == 1 && a->shape.dim[0] == 4);
    CHECK(b->dtype == AC_F32 && b->shape.rank == 2 && b->shape.dim[1] == 2);
    for (int i = 0; i < 8; i++) {
        CHECK_INT(((unsigned char *)a->data)[i], i);
    }
    for (int i = 0; i < 16; i++) {
        CHECK_INT(((unsigned char *)b->data)[i], 8 + i);
    }
    const ac_tensor *one = ac_weights_find(w, "one"), *none = ac_weights_find(w, "none");
    CHECK(one->shape.rank == 0 && *(unsigned char *)one->data == 24);
    CHECK(none->shape.rank == 2 && ac_tensor_count(none) == 0);
    /* The mapping stays, although the file goes and most of its tensors do. */
    CHECK_INT(remove(path_of("m.safetensors")), 0);
    ac_tensor other = ac_tensor_of(&other, AC_U8, AC_SHAPE(1));
    CHECK_OK(ac_weights_set(w, "a", &other, NULL, NULL));
    CHECK_OK(ac_weights_set(w, "none", &other, NULL, NULL));
    CHECK_INT(((unsigned char *)ac_weights_find(w, "b")->data)[15], 23);
    ac_weights_unref(w);
}

static void
every_alignment(void)
{
    static const struct {
        const char *tag;
        size_t size;
    } types[] = {{"F16", 2}, {"BF16", 2}, {"F32", 4}, {"I32", 4}, {"F64", 8}, {"I64", 8}};
    clean_folder();
    for (size_t t = 0; t < AC_ARRAY_LEN(types); t++) {
        for (size_t pad = 0; pad < 8; pad++) {
            char header[256];
            snprintf(header, sizeof header,
                     "{\"x\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%zu]}}%.*s",
                     types[t].tag, 3 * types[t].size, (int)pad, "        ");
            write_tensors("m.safetensors", header, 3 * types[t].size);
            ac_weights *w = new_set();
            CHECK_OK(ac_weights_add_file(w, path_of("m.safetensors")));
            const ac_tensor *x = ac_weights_find(w, "x");
            CHECK_INT((uintptr_t)x->data % types[t].size, 0);
            for (size_t i = 0; i < 3 * types[t].size; i++) {
                CHECK_INT(((unsigned char *)x->data)[i], i);
            }
            ac_weights_unref(w);
        }
    }
}

static void
constant_bytes_are_summed_once(void)
{
    ac_weights *w = new_set();
    const char *const names[] = {"x"};
    unsigned char bytes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    ac_tensor t = ac_tensor_of(bytes, AC_U8, AC_SHAPE(8));
    CHECK_OK(ac_weights_add_constant(w, "x", &t, NULL, NULL));
    uint64_t sum = ac_weights_checksum(w, names, 1);
    bytes[3] = 99; /* against the promise, to see that nothing is read */
    CHECK(sum == ac_weights_checksum(w, names, 1));
    CHECK_OK(ac_weights_set(w, "x", &t, NULL, NULL));
    CHECK(sum != ac_weights_checksum(w, names, 1));
    bytes[3] = 3;
    CHECK(sum == ac_weights_checksum(w, names, 1));
    ac_weights_unref(w);
}

/* ---- headers that lie ----------------------------------------------------------------------- */

static void
check_refused_bytes(const void *bytes, size_t size, const char *message)
{
    ac_arena arena;
    ac_safetensors s = {0};
    char *copy = malloc(size ? size : 1); /* of exactly this size, for the sanitizer */
    memcpy(copy, bytes, size);
    ac_arena_init(&arena);
    ac_status status = ac_safetensors_parse(&arena, copy, size, "m.safetensors", &s);
    free(copy);
    ac_arena_deinit(&arena);
    if (status != AC_E_FORMAT || strncmp(ac_error_message(), "m.safetensors: ", 15) != 0 ||
        !strstr(ac_error_message(), message)) {
        TEST_FAIL("found %s (%s), expected \"%s\"", ac_status_text(status), ac_error_message(),
                  message);
    }
}

static void
check_refused(const char *header, size_t data, const char *message)
{
    char bytes[4096];
    check_refused_bytes(bytes, image(bytes, sizeof bytes, header, data), message);
}

/* A header with one tensor "x" of these three fields. */
static void
check_refused_row(const char *dtype, const char *shape, const char *offsets, size_t data,
                  const char *message)
{
    char header[512];
    snprintf(header, sizeof header, "{\"x\":{\"dtype\":%s,\"shape\":%s,\"data_offsets\":%s}}",
             dtype, shape, offsets);
    check_refused(header, data, message);
}

static void
refused_lengths(void)
{
    char bytes[4096];
    check_refused_bytes("", 0, "found 0 bytes, expected a safetensors file of at least 8");
    check_refused_bytes("\0\0\0\0\0\0\0", 7, "found 7 bytes");
    check_refused_bytes("\0\0\0\0\0\0\0\0", 8, "found no '{' at the start of the header");
    check_refused_bytes("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10,
                        "found a header of 18446744073709551615 bytes, expected at most 67108864");
    check_refused_bytes("\x01\0\0\x04\0\0\0\0{}", 10, "found a header of 67108865 bytes");
    check_refused_bytes("\x03\0\0\0\0\0\0\0{}", 10,
                        "found 2 bytes after the length, expected a header of 3");
    check_refused_bytes("\0\0\0\x04\0\0\0\0{}", 10, "expected a header of 67108864");
    check_refused("", 3, "found no '{'");
    check_refused(" {}", 0, "found no '{'");
    check_refused("[]", 0, "found no '{'");
    check_refused("PK", 0, "found no '{'");
    check_refused("{", 0, "header: line 1, column 2: found the end of the text");
    check_refused("{}x", 0, "header: line 1, column 3: found 'x'");
    check_refused("{\"x\":1,\"x\":2}", 0, "header: line 1, column 8: found the key \"x\" a second");
    size_t size = image(bytes, sizeof bytes,
                        "{\"x\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", 16);
    for (size_t cut = 0; cut < size; cut++) { /* truncated anywhere */
        check_refused_bytes(bytes, cut, "m.safetensors: ");
    }
}

static void
refused_rows(void)
{
#define GOOD "\"F32\"", "[4]"
    check_refused("{\"\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4,
                  "found a tensor with an empty name");
    check_refused("{\"x\":[]}", 0, "tensor \"x\": expected an object of dtype, shape and");
    check_refused("{\"x\":{}}", 0, "tensor \"x\": found no \"dtype\" string");
    check_refused_row("3", "[4]", "[0,16]", 16, "tensor \"x\": found no \"dtype\" string");
    check_refused_row("\"F8_E4M3\"", "[4]", "[0,4]", 4,
                      "tensor \"x\": found dtype \"F8_E4M3\", expected F64, F32");
    check_refused_row("\"f32\"", "[4]", "[0,16]", 16, "found dtype \"f32\"");
    check_refused_row("\"F32\"", "4", "[0,16]", 16, "tensor \"x\": found no \"shape\" array");
    check_refused_row("\"F32\"", "[1,1,1,1,1,1,4]", "[0,16]", 16,
                      "tensor \"x\": found 7 dimensions, expected at most 6");
    check_refused_row("\"F32\"", "[-4]", "[0,16]", 16, "dimensions that are integers, 0 or more");
    check_refused_row("\"F32\"", "[4.5]", "[0,18]", 18, "dimensions that are integers");
    check_refused_row("\"F32\"", "[\"4\"]", "[0,16]", 16, "dimensions that are integers");
    check_refused_row("\"F32\"", "[1e30]", "[0,16]", 16, "dimensions that are integers");
    check_refused_row("\"F32\"", "[Infinity]", "[0,16]", 16, "dimensions that are integers");
    check_refused_row("\"F32\"", "[4294967296,4294967296]", "[0,0]", 0,
                      "found shape [4294967296, 4294967296], expected dimensions whose product");
    check_refused_row("\"F32\"", "[9223372036854775807]", "[0,0]", 0, "whose product fits");
    check_refused_row("\"F32\"", "[4611686018427387905]", "[0,4]", 4, "whose product fits");
    check_refused_row(GOOD, "null", 16, "found no \"data_offsets\" array of two");
    check_refused_row(GOOD, "[0]", 16, "found no \"data_offsets\" array of two");
    check_refused_row(GOOD, "[0,16,16]", 16, "found no \"data_offsets\" array of two");
    check_refused_row(GOOD, "[0,\"16\"]", 16, "data_offsets that are integers");
    check_refused_row(GOOD, "[-16,0]", 16, "data_offsets that are integers, 0 or more");
    check_refused_row(GOOD, "[16,0]", 16, "found data_offsets [16, 0], expected two in order");
    check_refused_row(GOOD, "[0,17]", 16, "up to the file's 16 bytes of data");
    check_refused_row(GOOD, "[0,9223372036854775807]", 16, "up to the file's 16 bytes");
    check_refused_row(GOOD, "[0,9223372036854775808]", 16, "data_offsets that are integers");
    check_refused_row(GOOD, "[0,12]", 12, "found 12 bytes, expected 16 for [4] of float32");
    check_refused_row(GOOD, "[0,20]", 20, "found 20 bytes, expected 16 for [4] of float32");
    check_refused_row("\"F16\"", "[4]", "[0,16]", 16, "expected 8 for [4] of float16");
    check_refused("{\"__metadata__\":3}", 0, "__metadata__: expected an object of strings");
    check_refused("{\"__metadata__\":{\"a\":1}}", 0, "__metadata__: expected an object of strings");
#undef GOOD
}

static void
refused_layouts(void)
{
#define TWO(a, b)                                                                                  \
    "{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" a "},"                              \
    "\"y\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" b "}}"
    check_refused(TWO("[0,4]", "[2,6]"), 6,
                  "tensor \"y\": found data from byte 2, expected from 4");
    check_refused(TWO("[0,4]", "[2,6]"), 6, "they overlap");
    check_refused(TWO("[0,4]", "[0,4]"), 4, "they overlap");
    check_refused(TWO("[5,9]", "[0,4]"), 9,
                  "tensor \"x\": found data from byte 5, expected from 4");
    check_refused(TWO("[5,9]", "[0,4]"), 9, "a hole");
    check_refused(TWO("[1,5]", "[5,9]"), 9,
                  "tensor \"x\": found data from byte 1, expected from 0");
    check_refused(TWO("[0,4]", "[4,8]"), 9, "found 9 bytes of data, expected 8 as the tensors say");
    check_refused("{}", 1, "found 1 bytes of data, expected 0");
#undef TWO
}

static void
refused_files(void)
{
    clean_folder();
    ac_weights *w = new_set();
    CHECK_STATUS(ac_weights_add_file(w, path_of("absent")), AC_E_IO, "No such file");
    CHECK_STATUS(ac_weights_add_file(w, path_of("absent")), AC_E_IO, "/absent: cannot be opened");
    CHECK_STATUS(ac_weights_add_file(w, folder), AC_E_IO, "found a directory, expected a file");
    CHECK_STATUS(ac_weights_add_file(w, ""), AC_E_IO, "cannot be opened");
    write_text("empty", "");
    CHECK_STATUS(ac_weights_add_file(w, path_of("empty")), AC_E_FORMAT, "found an empty file");
    CHECK_INT(mkfifo(path_of("pipe"), 0600), 0);
    CHECK_STATUS(ac_weights_add_file(w, path_of("pipe")), AC_E_IO, "found a device or pipe");
    write_tensors("one", "{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1);
    CHECK_OK(ac_weights_add_file(w, path_of("one")));
    CHECK_STATUS(ac_weights_add_file(w, path_of("one")), AC_E_FORMAT,
                 "/one: tensor \"x\": found a second time");
    CHECK_INT(ac_weights_count(w), 1);
    ac_weights_unref(w);
}

/* ---- folders -------------------------------------------------------------------------------- */

#define TENSOR(name) "\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}"

static void
variants(void)
{
    clean_folder();
    ac_weights *w = new_set();
    CHECK_STATUS(ac_weights_add_folder(w, path_of("absent"), "model", NULL), AC_E_IO,
                 "absent: cannot be opened as a folder");
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", NULL), AC_E_IO,
                 ": found no weights, expected model.safetensors or its index");
    write_text("model.bin", "PK");
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", NULL), AC_E_UNSUPPORTED,
                 ": found the pickle model.bin, expected model.safetensors; a pickle can run");
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", "fp16"), AC_E_UNSUPPORTED,
                 "expected model.fp16.safetensors");
    write_tensors("model.fp16.safetensors", "{" TENSOR("half") "}", 2);
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", NULL), AC_E_IO,
                 "found model.fp16.safetensors, expected model.safetensors or its index; does it "
                 "want variant=?");
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", "bf16"), AC_E_IO, "try another variant");
    CHECK_STATUS(ac_weights_add_folder(w, folder, "model", "../x"), AC_E_INVALID,
                 "variant: found \"../x\"");
    CHECK_INT(ac_weights_count(w), 0);
    CHECK_OK(ac_weights_add_folder(w, folder, "model", "fp16"));
    CHECK_STRING(ac_weights_name(w, 0), "half");
    write_tensors("model.safetensors", "{" TENSOR("full") "}", 2);
    CHECK_OK(ac_weights_add_folder(w, folder, "model", NULL));
    CHECK_STRING(ac_weights_name(w, 1), "full");
    ac_weights_unref(w);
    w = new_set();
    CHECK_OK(ac_weights_add_folder(w, folder, "model", "")); /* as without one */
    CHECK_STRING(ac_weights_name(w, 0), "full");
    ac_weights_unref(w);
}

static void
write_shards(const char *index)
{
    clean_folder();
    write_tensors("m-00001-of-00002.safetensors", "{" TENSOR("a") "}", 2);
    write_tensors("m-00002-of-00002.safetensors",
                  "{" TENSOR("b") ",\"c\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]}}",
                  2);
    write_text(index, "{\"metadata\":{\"total_size\":4},\"weight_map\":{"
                      "\"c\":\"m-00002-of-00002.safetensors\","
                      "\"a\":\"m-00001-of-00002.safetensors\","
                      "\"b\":\"m-00002-of-00002.safetensors\"}}");
}

static void
shards(void)
{
    static const struct {
        const char *index, *variant;
    } cases[] = {{"m.safetensors.index.json", NULL},
                 {"m.safetensors.index.fp16.json", "fp16"},
                 {"m.fp16.safetensors.index.json", "fp16"}};
    for (size_t i = 0; i < AC_ARRAY_LEN(cases); i++) {
        write_shards(cases[i].index);
        ac_weights *w = new_set();
        CHECK_OK(ac_weights_add_folder(w, folder, "m", cases[i].variant));
        CHECK_INT(ac_weights_count(w), 3);
        CHECK_STRING(ac_weights_name(w, 0), "a");
        CHECK(ac_weights_find(w, "b") && ac_weights_find(w, "c"));
        ac_weights_unref(w);
    }
}

static void
check_index_refused(const char *index, ac_status code, const char *message)
{
    write_text("m.safetensors.index.json", index);
    ac_weights *w = new_set();
    CHECK_STATUS(ac_weights_add_folder(w, folder, "m", NULL), code, message);
    ac_weights_unref(w);
}

static void
refused_indexes(void)
{
    write_shards("m.safetensors.index.json");
#define MAP(rows) "{\"weight_map\":{" rows "}}"
#define FIRST "m-00001-of-00002.safetensors"
#define SECOND "m-00002-of-00002.safetensors"
    check_index_refused("", AC_E_FORMAT, "index.json: found an empty file");
    check_index_refused("{", AC_E_FORMAT, "m.safetensors.index.json: line 1, column 2");
    check_index_refused("[]", AC_E_FORMAT, "expected an object \"weight_map\"");
    check_index_refused("{\"weight_map\":[]}", AC_E_FORMAT, "expected an object \"weight_map\"");
    check_index_refused("{\"weight_map\":{}}", AC_E_FORMAT, "expected an object \"weight_map\"");
    check_index_refused(MAP("\"a\":1"), AC_E_FORMAT, "tensor \"a\": expected the name of a file");
#define BAD_SHARD(name)                                                                            \
    check_index_refused(MAP("\"a\":\"" name "\""), AC_E_FORMAT,                                    \
                        "expected the name of a .safetensors")
    BAD_SHARD("../" FIRST);
    BAD_SHARD("/etc/" FIRST);
    BAD_SHARD("sub/" FIRST);
    BAD_SHARD("sub\\\\" FIRST);
    BAD_SHARD("..");
    BAD_SHARD(".safetensors");
    BAD_SHARD("");
    BAD_SHARD("m.bin");
    check_index_refused(MAP("\"a\":\"absent.safetensors\""), AC_E_IO, "absent.safetensors: cannot");
    check_index_refused(MAP("\"a\":\"" FIRST "\",\"d\":\"" SECOND "\""), AC_E_FORMAT,
                        "tensor \"d\": not found in \"" SECOND "\", where the index says it is");
    check_index_refused(MAP("\"a\":\"" SECOND "\",\"b\":\"" FIRST "\""), AC_E_FORMAT,
                        "tensor \"a\": not found in \"" SECOND "\"");
    write_tensors(SECOND, "{" TENSOR("a") "}", 2);
    check_index_refused(MAP("\"a\":\"" FIRST "\",\"b\":\"" SECOND "\""), AC_E_FORMAT,
                        SECOND ": tensor \"a\": found a second time");
    write_text(SECOND, "short");
    check_index_refused(MAP("\"a\":\"" FIRST "\",\"b\":\"" SECOND "\""), AC_E_FORMAT,
                        SECOND ": found 5 bytes");
#undef BAD_SHARD
#undef MAP
}

/* ---- memory --------------------------------------------------------------------------------- */

static ac_status
folder_scenario(void *context)
{
    ac_weights *w = NULL;
    (void)context;
    AC_TRY(ac_weights_new(&w));
    ac_status status = ac_weights_add_folder(w, folder, "m", NULL);
    ac_weights_unref(w);
    return status;
}

static void
out_of_memory(void)
{
    write_shards("m.safetensors.index.json");
    write_tensors(FIRST, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} ", 8);
    test_oom(folder_scenario, NULL); /* one of the paddings makes "a" a copy */
    write_tensors(FIRST, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}  ", 8);
    test_oom(folder_scenario, NULL);
    CHECK(test_state.oom_runs > 20);
}

static int64_t
mappings_of_tests(void)
{
    char line[512];
    int64_t count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps)) {
        count += strstr(line, folder) != NULL;
    }
    if (maps) {
        fclose(maps);
    }
    return count;
}

static void
mappings_go(void)
{
    write_shards("m.safetensors.index.json");
    ac_weights *w = new_set();
    CHECK_OK(ac_weights_add_folder(w, folder, "m", NULL));
    int64_t most = mappings_of_tests(); /* 0 where there is no /proc */
    CHECK(most == 2 || most == 0);
    unsigned char own[2] = {0};
    ac_tensor t = ac_tensor_of(own, AC_U8, AC_SHAPE(2));
    CHECK_OK(ac_weights_set(w, "a", &t, NULL, NULL));
    CHECK_INT(mappings_of_tests(), most / 2);
    ac_weights_unref(w);
    CHECK_INT(mappings_of_tests(), 0);
    write_text(SECOND, "not a file of tensors");
    w = new_set();
    CHECK_STATUS(ac_weights_add_folder(w, folder, "m", NULL), AC_E_FORMAT, SECOND);
    ac_weights_unref(w);
    CHECK_INT(mappings_of_tests(), 0);
    clean_folder();
    CHECK_INT(rmdir(folder), 0);
    folder[0] = '\0';
}

TEST_MAIN(TEST(one_file), TEST(every_alignment), TEST(constant_bytes_are_summed_once),
          TEST(refused_lengths), TEST(refused_rows), TEST(refused_layouts), TEST(refused_files),
          TEST(variants), TEST(shards), TEST(refused_indexes), TEST(out_of_memory),
          TEST(mappings_go))
