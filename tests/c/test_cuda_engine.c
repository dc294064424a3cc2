/* test_cuda_engine: streams, recordings and memory of the engine on a GPU, against the CPU.  Where
 * there is no GPU it says so and passes. */
#include "cuda_rig.h"

#include <pthread.h>

/* ---- streams --------------------------------------------------------------------------------- */

/* A UNet's operands on the GPU, filled and read by the caller in its own stream. */
typedef struct operands {
    float x[COUNT], timestep, states[2 * IMAGES * TOKENS * 8], out[COUNT];
    void *memory[4];
    ac_tensor tensor[4];
} operands;

static void
make_operands(ac_device *device, operands *o, uint64_t seed)
{
    float *const host[] = {o->x, &o->timestep, o->states, o->out};
    const ac_shape shape[] = {AC_SHAPE(IMAGES, CHANNELS, SIZE, SIZE), AC_SHAPE(1),
                              AC_SHAPE(IMAGES, TOKENS, 8), AC_SHAPE(IMAGES, CHANNELS, SIZE, SIZE)};
    fill(o->x, COUNT, seed);
    fill(o->states, AC_ARRAY_LEN(o->states), seed + 1);
    o->timestep = 400.0f;
    for (int i = 0; i < 4; i++) {
        o->tensor[i] = ac_tensor_of(host[i], AC_F32, shape[i]);
        if (device) {
            CHECK_OK(device->backend->alloc(device->self, 4096, &o->memory[i]));
            o->tensor[i].data = o->memory[i];
        }
    }
}

static void
free_operands(ac_device *device, operands *o)
{
    for (int i = 0; i < 4; i++) {
        device->backend->free(device->self, o->memory[i]);
    }
}

static ac_status
try_unet(rig *r, operands *o, ac_stream stream)
{
    static const char *const names[] = {"sample", "timestep", "encoder_hidden_states", "sample"};
    ac_exec *exec;
    ac_build_args args = {.entry = "forward", .batch = IMAGES, .height = SIZE, .width = SIZE,
                          .tokens = TOKENS, .timesteps = 1};
    CHECK_OK(ac_model_take(r->model, &args, 0, &exec));
    for (int i = 0; i < 4; i++) {
        CHECK_OK((i == 3 ? ac_exec_bind_output : ac_exec_bind)(exec, names[i], &o->tensor[i]));
    }
    ac_status status = ac_exec_run_on(exec, AC_RATE_PROMPT, stream);
    ac_model_give(r->model, exec);
    return status;
}

static void
run_unet(rig *r, operands *o, ac_stream stream)
{
    CHECK_OK(try_unet(r, o, stream));
}

/* Copies in, run and copies out are queued one after the other; nobody waits in between, and the
 * exec goes from stream to stream. */
static void
callers_streams_are_followed(void)
{
    enum { STREAMS = 3, ROUNDS = 12 };
    static operands expected[STREAMS], found[STREAMS];
    void *stream[STREAMS] = {NULL}; /* the first is the legacy default stream */
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    rig_open(&cpu, "cpu", AC_F32);
    rig_open(&there, "cuda", AC_F32);
    for (int i = 0; i < STREAMS; i++) {
        CHECK(i == 0 || cu.stream_new(&stream[i], 1) == 0);
        make_operands(NULL, &expected[i], 10 + (uint64_t)i);
        make_operands(device, &found[i], 10 + (uint64_t)i);
        run_unet(&cpu, &expected[i], (ac_stream){0});
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < STREAMS; i++) {
            operands *o = &found[i];
            memset(o->out, 0, sizeof o->out);
            CHECK(cu.to_device((uintptr_t)o->memory[0], o->x, sizeof o->x, stream[i]) == 0);
            CHECK(cu.to_device((uintptr_t)o->memory[1], &o->timestep, 4, stream[i]) == 0);
            CHECK(cu.to_device((uintptr_t)o->memory[2], o->states, IMAGES * TOKENS * 8 * 4,
                               stream[i]) == 0);
            run_unet(&there, o, (ac_stream){true, stream[i]});
            CHECK(cu.to_host(o->out, (uintptr_t)o->memory[3], sizeof o->out, stream[i]) == 0);
        }
        for (int i = 0; i < STREAMS; i++) {
            CHECK(cu.stream_sync(stream[i]) == 0);
            CHECK(distance(found[i].out, expected[i].out, COUNT) < 2e-5);
        }
    }
    for (int i = 0; i < STREAMS; i++) {
        free_operands(device, &found[i]);
    }
    rig_close(&cpu);
    rig_close(&there);
    ac_device_unref(device);
}

/* In a stream where the lane has been, and in one where it has not: neither capture is disturbed,
 * though any wait for their streams would end them. */
static void
captures_of_the_caller_are_refused(void)
{
    static operands expected, found;
    void *stream[2], *graph;
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    rig_open(&cpu, "cpu", AC_F32);
    rig_open(&there, "cuda", AC_F32);
    make_operands(NULL, &expected, 10);
    make_operands(device, &found, 10);
    run_unet(&cpu, &expected, (ac_stream){0});
    for (int i = 0; i < 2; i++) {
        CHECK(cu.stream_new(&stream[i], 1) == 0);
    }
    CHECK(cu.to_device((uintptr_t)found.memory[0], found.x, sizeof found.x, stream[0]) == 0);
    CHECK(cu.to_device((uintptr_t)found.memory[1], &found.timestep, 4, stream[0]) == 0);
    CHECK(cu.to_device((uintptr_t)found.memory[2], found.states, sizeof found.states,
                       stream[0]) == 0);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 2; i++) {
            run_unet(&there, &found, (ac_stream){true, stream[0]});
            CHECK(cu.capture(stream[i], 0) == 0);
            CHECK_STATUS(try_unet(&there, &found, (ac_stream){true, stream[i]}), AC_E_UNSUPPORTED,
                         "being captured");
            CHECK(cu.capture_end(stream[i], &graph) == 0 && graph);
            CHECK(cu.graph_free(graph) == 0);
        }
        run_unet(&there, &found, (ac_stream){true, stream[round % 2]});
        CHECK(cu.to_host(found.out, (uintptr_t)found.memory[3], sizeof found.out,
                         stream[round % 2]) == 0);
        CHECK(cu.stream_sync(stream[round % 2]) == 0);
        CHECK(distance(found.out, expected.out, COUNT) < 2e-5);
    }
    free_operands(device, &found);
    rig_close(&cpu);
    rig_close(&there);
    ac_device_unref(device);
}

/* ---- recordings ------------------------------------------------------------------------------ */

static void
replays_are_the_same_bits(void)
{
    static float eager[COUNT], found[COUNT];
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    for (int dtype = 0; dtype < 2; dtype++) {
        setenv("ACCEL_GRAPH", "off", 1);
        rig_open(&there, "cuda", dtype ? AC_F16 : AC_F32);
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, eager));
        rig_close(&there);
        unsetenv("ACCEL_GRAPH");
        rig_open(&there, "cuda", dtype ? AC_F16 : AC_F32);
        for (int run = 0; run < 5; run++) {
            memset(found, 0, sizeof found);
            CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
            CHECK(memcmp(found, eager, sizeof found) == 0);
        }
        rig_close(&there);
    }
    ac_device_unref(device);
}

/* Checks belong on the main thread: says whether all was well. */
static void *
call_often(void *expected)
{
    static char good;
    float out[COUNT];
    bool same = true;
    for (int run = 0; run < 30; run++) {
        memset(out, 0, sizeof out);
        same = call(&there, SIZE, (ac_stream){0}, true, out) == AC_OK &&
               memcmp(out, expected, sizeof out) == 0 && same;
    }
    return same ? &good : NULL;
}

/* Two lanes over one set of weights, one of them recording while the other runs. */
static void
threads_run_at_once(void)
{
    static float expected[COUNT];
    pthread_t thread[3];
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    rig_open(&there, "cuda", AC_F32);
    CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, expected));
    for (int i = 0; i < 3; i++) {
        CHECK(pthread_create(&thread[i], NULL, call_often, expected) == 0);
    }
    for (int i = 0; i < 3; i++) {
        void *good;
        CHECK(pthread_join(thread[i], &good) == 0 && good);
    }
    rig_close(&there);
    ac_device_unref(device);
}

static void
a_second_gpu_gives_the_same_bits(void)
{
    static float first[COUNT], found[COUNT];
    ac_device *device = open_gpu(), *second;
    if (!device) {
        return;
    }
    if (ac_device_open("cuda:1", &second) < 0) {
        printf("(one GPU) ");
        ac_device_unref(device);
        return;
    }
    rig_open(&cpu, "cuda:0", AC_F16);
    rig_open(&there, "cuda:1", AC_F16);
    for (int run = 0; run < 4; run++) {
        CHECK_OK(call(&cpu, SIZE, (ac_stream){0}, true, first));
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
        CHECK(memcmp(first, found, sizeof found) == 0);
    }
    rig_close(&cpu);
    rig_close(&there);
    ac_device_unref(second);
    ac_device_unref(device);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static size_t
free_memory(void)
{
    size_t free_bytes, total;
    CHECK(cu.memory(&free_bytes, &total) == 0);
    return free_bytes;
}

/* Somebody else has nearly all of the GPU: the plan's size and what is free are named, nothing
 * stays, and the next call works. */
static void
too_large_a_size_is_refused(void)
{
    enum { BATCH = 8, LARGE = 512 };
    static float found[COUNT], again[COUNT];
    ac_device *device = open_gpu();
    ac_exec *exec;
    void *taken;
    if (!device) {
        return;
    }
    rig_open(&there, "cuda", AC_F32);
    CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, found));
    size_t bytes = (size_t)BATCH * CHANNELS * LARGE * LARGE * sizeof(float);
    float *large = calloc(1, bytes);
    CHECK(large);
    CHECK_OK(device->backend->alloc(device->self, free_memory() - ((size_t)160 << 20), &taken));
    size_t before = free_memory();
    ac_build_args args = {.entry = "forward", .batch = BATCH, .height = LARGE, .width = LARGE,
                          .tokens = TOKENS, .timesteps = 1};
    ac_tensor x = ac_tensor_of(large, AC_F32, AC_SHAPE(BATCH, CHANNELS, LARGE, LARGE));
    ac_tensor t = ac_tensor_of(large, AC_F32, AC_SHAPE(1));
    ac_tensor prompt = ac_tensor_of(large, AC_F32, AC_SHAPE(BATCH, TOKENS, 8));
    for (int run = 0; run < 3; run++) {
        CHECK_OK(ac_model_take(there.model, &args, 0, &exec));
        CHECK_OK(ac_exec_bind_host(exec, "sample", &x));
        CHECK_OK(ac_exec_bind_host(exec, "timestep", &t));
        CHECK_OK(ac_exec_bind_host(exec, "encoder_hidden_states", &prompt));
        CHECK_OK(ac_exec_bind_output_host(exec, "sample", &x));
        CHECK_STATUS(ac_exec_run(exec, AC_RATE_PROMPT), AC_E_MEMORY, "are free; this plan takes");
        ac_model_give(there.model, exec);
        CHECK(free_memory() >= before);
        CHECK_OK(call(&there, SIZE, (ac_stream){0}, true, again));
        CHECK(memcmp(found, again, sizeof found) == 0);
    }
    device->backend->free(device->self, taken);
    free(large);
    rig_close(&there);
    ac_device_unref(device);
}

static void
two_hundred_runs_leave_memory_flat(void)
{
    static float out[IMAGES * CHANNELS * 64 * 64];
    size_t after_first = 0, before;
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    before = free_memory();
    rig_open(&there, "cuda", AC_F32);
    for (int run = 0; run < 200; run++) {
        CHECK_OK(call(&there, 4 + run % 20, (ac_stream){0}, true, out));
        after_first = run == 59 ? free_memory() : after_first;
    }
    printf("%zd bytes between run 60 and 200 ", (ssize_t)(after_first - free_memory()));
    CHECK(free_memory() + ((size_t)4 << 20) >= after_first);
    rig_close(&there);
    printf("%.1f MB stay after the end ", ((double)before - (double)free_memory()) / 1e6);
    ac_device_unref(device);
}

TEST_MAIN(TEST(callers_streams_are_followed), TEST(captures_of_the_caller_are_refused),
          TEST(replays_are_the_same_bits), TEST(threads_run_at_once),
          TEST(a_second_gpu_gives_the_same_bits), TEST(too_large_a_size_is_refused),
          TEST(two_hundred_runs_leave_memory_flat))
