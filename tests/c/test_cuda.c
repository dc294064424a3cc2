/* test_cuda: what the CUDA backend promises beside its kernels: errors that name the facts and
 * leave it usable, recorded launches, two lanes.  Where there is no GPU it says so and passes;
 * `make test-gpu` looks for "ran on cuda". */
#include "../../csrc/backend_cuda.h"
#include "test.h"

#include <dlfcn.h>

enum { COUNT = 5000 };

static ac_device *
open_device(void)
{
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &device) < 0) {
        printf("(no GPU) ");
        return NULL;
    }
    printf("(ran on cuda) ");
    return device;
}

static const ac_kernel *
scale_kernel(const ac_device *device)
{
    for (const ac_kernel *const *k = device->backend->kernels; *k; k++) {
        if ((*k)->op == AC_OP_SCALE) {
            return *k;
        }
    }
    return NULL;
}

/* y = 2 y + 1 in place. */
static ac_problem
doubling(ac_tensor *y)
{
    ac_problem p = {.op = AC_OP_SCALE, .n_inputs = 1, .input = y, .output = *y};
    p.attr.scale = (ac_scale_attr){2.0f, 1.0f};
    return p;
}

static void
out_of_memory_names_sizes_and_leaves_nothing(void)
{
    ac_device *device = open_device();
    void *memory;
    if (!device) {
        return;
    }
    const ac_backend *b = device->backend;
    CHECK_STATUS(b->alloc(device->self, (size_t)1 << 50, &memory), AC_E_MEMORY,
                 "1125899906842624 bytes were asked for");
    CHECK(strstr(ac_error_message(), "are free") && !memory);
    CHECK_OK(b->alloc(device->self, 1 << 20, &memory));
    b->free(device->self, memory);
    CHECK_OK(b->alloc(device->self, 0, &memory));
    b->free(device->self, memory);
    ac_device_unref(device);
}

static void
a_missing_gpu_is_named(void)
{
    ac_device *device = open_device(), *other;
    if (device) {
        CHECK_STATUS(ac_device_open("cuda:99", &other), AC_E_DEVICE, "cuda:99");
        ac_device_unref(device);
    }
}

static void
another_abi_is_refused(void)
{
    /* The library looks at it before anything else: this needs no GPU, but the library. */
    static const ac_host newer = {.abi = AC_ABI + 1}; /* nothing in it can be called */
    const ac_backend *backend;
    ac_backend none = {.abi = 0}, only = {.abi = AC_ABI};
    ac_backend_cuda_fn fill;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_backend_cuda_load(&backend) < 0) {
        printf("(no library) ");
        return;
    }
    CHECK_INT(backend->abi, AC_ABI);
    void *library = dlopen("python/accel/libaccel_cuda.so", RTLD_NOW | RTLD_LOCAL);
    void *symbol = library ? dlsym(library, "ac_backend_cuda") : NULL;
    CHECK(symbol);
    memcpy(&fill, &symbol, sizeof fill);
    CHECK_INT(fill(AC_ABI + 1, &newer, &none), AC_E_DEVICE);
    CHECK(memcmp(&none, &only, sizeof none) == 0);
    dlclose(library);
}

static void
a_replay_does_what_was_recorded(void)
{
    ac_device *device = open_device();
    static float x[COUNT], y[COUNT];
    ac_lane *lane;
    ac_recording *recording;
    void *memory;
    if (!device) {
        return;
    }
    const ac_backend *b = device->backend;
    for (int i = 0; i < COUNT; i++) {
        x[i] = sinf((float)i);
    }
    CHECK_OK(b->lane_open(device->self, &lane));
    CHECK_OK(b->alloc(device->self, sizeof x, &memory));
    CHECK_OK(b->upload(device->self, lane, memory, x, sizeof x));
    ac_tensor t = ac_tensor_of(memory, AC_F32, AC_SHAPE(COUNT));
    ac_problem p = doubling(&t);
    CHECK_OK(b->record_begin(device->self, lane));
    CHECK_OK(scale_kernel(device)->launch(lane, &p, NULL, NULL));
    CHECK_OK(scale_kernel(device)->launch(lane, &p, NULL, NULL));
    CHECK_OK(b->record_end(device->self, lane, &recording));
    for (int round = 0; round < 2; round++) {
        CHECK_OK(b->replay(device->self, lane, recording));
    }
    CHECK_OK(b->download(device->self, lane, y, memory, sizeof y));
    CHECK_OK(b->sync(device->self, lane));
    for (int i = 0; i < COUNT; i++) { /* four doublings; recording itself ran none */
        CHECK_CLOSE(y[i], 16.0 * x[i] + 15.0, 1e-5);
    }
    b->record_free(device->self, recording);
    b->free(device->self, memory);
    b->lane_close(device->self, lane);
    ac_device_unref(device);
}

static void
two_lanes_keep_their_order(void)
{
    ac_device *device = open_device();
    enum { LANES = 2, ROUNDS = 20 };
    ac_lane *lane[LANES];
    void *memory[LANES];
    float first[LANES] = {1.0f, 3.0f}, last[LANES];
    if (!device) {
        return;
    }
    const ac_backend *b = device->backend;
    for (int i = 0; i < LANES; i++) {
        CHECK_OK(b->lane_open(device->self, &lane[i]));
        CHECK_OK(b->alloc(device->self, sizeof(float), &memory[i]));
        CHECK_OK(b->upload(device->self, lane[i], memory[i], &first[i], sizeof(float)));
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES; i++) {
            ac_tensor t = ac_tensor_of(memory[i], AC_F32, AC_SHAPE(1));
            ac_problem p = doubling(&t);
            CHECK_OK(scale_kernel(device)->launch(lane[i], &p, NULL, NULL));
        }
    }
    for (int i = 0; i < LANES; i++) {
        CHECK_OK(b->download(device->self, lane[i], &last[i], memory[i], sizeof(float)));
        CHECK_OK(b->sync(device->self, lane[i]));
        CHECK_CLOSE(last[i], ((double)first[i] + 1.0) * (1 << ROUNDS) - 1.0, 1.0);
        b->free(device->self, memory[i]);
        b->lane_close(device->self, lane[i]);
    }
    ac_device_unref(device);
}

TEST_MAIN(TEST(out_of_memory_names_sizes_and_leaves_nothing), TEST(a_missing_gpu_is_named),
          TEST(another_abi_is_refused), TEST(a_replay_does_what_was_recorded),
          TEST(two_lanes_keep_their_order))
