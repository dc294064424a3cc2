/* test_cuda_tune: choices that were measured are remembered, in a file that may be damaged; with
 * ACCEL_TUNE=off nothing is measured.  Where there is no GPU it says so and passes. */
#include "../../csrc/backend_cuda.h"
#include "test.h"

#include <stdlib.h>
#include <unistd.h>

enum { ROWS = 64, COLUMNS = 128, CHANNELS = 64 };

static char folder[64], path[96];

/* One product on a device opened for it, so that its libraries start anew. */
static bool
multiply(uint16_t *out)
{
    ac_device *device;
    ac_lane *lane;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &device) < 0) {
        printf("(no GPU) ");
        return false;
    }
    const ac_backend *b = device->backend;
    ac_tensor input[2] = {ac_tensor_of(NULL, AC_F16, AC_SHAPE(ROWS, CHANNELS)),
                          ac_tensor_of(NULL, AC_F16, AC_SHAPE(COLUMNS, CHANNELS))};
    ac_problem p = {.op = AC_OP_LINEAR, .n_inputs = 2, .input = input,
                    .output = ac_tensor_of(NULL, AC_F16, AC_SHAPE(ROWS, COLUMNS))};
    const ac_kernel *kernel = NULL;
    for (const ac_kernel *const *k = b->kernels; *k && !kernel; k++) {
        kernel = strcmp((*k)->name, "cuda.linear.cublaslt") == 0 ? *k : NULL;
    }
    if (!kernel || !kernel->supports(&p, &device->caps)) {
        printf("(no cuBLASLt) ");
        ac_device_unref(device);
        return false;
    }
    void *scratch;
    uint64_t state = 7;
    CHECK_OK(b->lane_open(device->self, &lane));
    CHECK_OK(b->alloc(device->self, kernel->scratch(&p, &device->caps), &scratch));
    CHECK_OK(b->alloc(device->self, ac_tensor_bytes(&p.output), &p.output.data));
    uint16_t *host = malloc(2 * (size_t)COLUMNS * CHANNELS);
    for (int i = 0; i < 2; i++) {
        size_t bytes = ac_tensor_bytes(&input[i]);
        for (size_t k = 0; k < bytes / 2; k++) {
            host[k] = ac_f32_to_f16((float)test_uniform(&state, -0.5, 0.5));
        }
        CHECK_OK(b->alloc(device->self, bytes, &input[i].data));
        CHECK_OK(b->upload(device->self, lane, input[i].data, host, bytes));
        CHECK_OK(b->sync(device->self, lane));
    }
    free(host);
    CHECK_OK(kernel->launch(lane, &p, scratch, NULL));
    CHECK_OK(b->download(device->self, lane, out, p.output.data, ac_tensor_bytes(&p.output)));
    CHECK_OK(b->sync(device->self, lane));
    void *memory[] = {scratch, input[0].data, input[1].data, p.output.data};
    for (size_t i = 0; i < AC_ARRAY_LEN(memory); i++) {
        b->free(device->self, memory[i]);
    }
    b->lane_close(device->self, lane);
    ac_device_unref(device);
    printf("(ran on cuda) ");
    return true;
}

/* Length of the file, and its text, cut off. */
static size_t
read_cache(char *text, size_t size)
{
    FILE *file = fopen(path, "r");
    size_t length = file ? fread(text, 1, size - 1, file) : 0;
    text[length] = '\0';
    if (file) {
        fclose(file);
    }
    return length;
}

static void
write_cache(const char *text)
{
    FILE *file = fopen(path, "w");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

static void
use_folder(void)
{
    snprintf(folder, sizeof folder, "/tmp/accel-tune-XXXXXX");
    CHECK(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/cuda-1.txt", folder);
    setenv("ACCEL_CACHE", folder, 1);
    unsetenv("ACCEL_TUNE");
}

static void
leave_folder(void)
{
    unlink(path);
    rmdir(folder);
    unsetenv("ACCEL_CACHE");
    unsetenv("ACCEL_TUNE");
}

static uint16_t first[ROWS * COLUMNS], second[ROWS * COLUMNS];

static void
choices_are_remembered(void)
{
    char before[4096], after[4096];
    use_folder();
    if (multiply(first)) {
        CHECK(read_cache(before, sizeof before) > 60 && strncmp(before, "accel tune 1\n", 13) == 0);
        CHECK(strstr(before, "cublasLt") && strstr(before, "m64 n128 k64"));
        CHECK(multiply(second) && memcmp(first, second, sizeof first) == 0);
        read_cache(after, sizeof after);
        CHECK_STRING(after, before);
    }
    leave_folder();
}

static void
a_damaged_file_is_ignored(void)
{
    static const char *const damage[] = {"", "accel tune 2\n", "accel tune 1\nno tabs\n",
                                         "accel tune 1\nkey\tway\tnot a time\n",
                                         "accel tune 1\nkey\tway\t1e999\n", "\n\n\t\t\n"};
    char text[4096];
    use_folder();
    for (size_t i = 0; i < AC_ARRAY_LEN(damage); i++) {
        write_cache(damage[i]);
        if (!multiply(first)) {
            break;
        }
        CHECK(read_cache(text, sizeof text) > 60 && strncmp(text, "accel tune 1\n", 13) == 0);
        CHECK(!strstr(text, "not a time") && !strstr(text, "no tabs") && !strstr(text, "1e999"));
    }
    leave_folder();
}

static void
tuning_can_be_switched_off(void)
{
    char text[64];
    use_folder();
    setenv("ACCEL_TUNE", "off", 1);
    if (multiply(first)) {
        CHECK_INT(read_cache(text, sizeof text), 0);
        CHECK(multiply(second) && memcmp(first, second, sizeof first) == 0);
    }
    leave_folder();
}

static void
a_folder_that_cannot_be_written_is_no_error(void)
{
    use_folder();
    setenv("ACCEL_CACHE", "/proc/accel", 1);
    multiply(first);
    leave_folder();
}

TEST_MAIN(TEST(choices_are_remembered), TEST(a_damaged_file_is_ignored),
          TEST(tuning_can_be_switched_off), TEST(a_folder_that_cannot_be_written_is_no_error))
