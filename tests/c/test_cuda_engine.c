/* test_cuda_engine: streams, recordings, the loop and memory of the engine on a GPU, against the
 * CPU.  Where there is no GPU it says so and passes. */
#include "../../csrc/backend_cuda.h"
#include "far_rig.h"

#include <dlfcn.h>
#include <pthread.h>

/* The driver's, by hand: a caller's streams and copies are not the backend's. */
static struct {
    int (*stream_new)(void **stream, unsigned flags);
    int (*stream_sync)(void *stream);
    int (*to_device)(uint64_t to, const void *from, size_t bytes, void *stream);
    int (*to_host)(void *to, uint64_t from, size_t bytes, void *stream);
    int (*memory)(size_t *free_bytes, size_t *total);
    int (*capture)(void *stream, int mode);
    int (*capture_end)(void *stream, void **graph);
    int (*graph_free)(void *graph);
    int (*context)(void **context, int device);
    int (*make_current)(void *context);
} cu;

static void
load(void *library, const char *name, void *to)
{
    void *symbol = dlsym(library, name);
    CHECK(symbol);
    memcpy(to, &symbol, sizeof symbol);
}

static ac_device *
open_gpu(void)
{
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &device) < 0) {
        printf("(no GPU: %s) ", ac_error_message());
        return NULL;
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(library);
    load(library, "cuStreamCreate", &cu.stream_new);
    load(library, "cuStreamSynchronize", &cu.stream_sync);
    load(library, "cuMemcpyHtoDAsync_v2", &cu.to_device);
    load(library, "cuMemcpyDtoHAsync_v2", &cu.to_host);
    load(library, "cuMemGetInfo_v2", &cu.memory);
    load(library, "cuStreamBeginCapture_v2", &cu.capture);
    load(library, "cuStreamEndCapture", &cu.capture_end);
    load(library, "cuGraphDestroy", &cu.graph_free);
    load(library, "cuDevicePrimaryCtxRetain", &cu.context);
    load(library, "cuCtxSetCurrent", &cu.make_current);
    void *context; /* the driver's calls want one, and the backend leaves none behind */
    CHECK(cu.context(&context, 0) == 0 && cu.make_current(context) == 0);
    printf("(ran on cuda) ");
    return device;
}

/* Largest difference over largest value. */
static double
distance(const float *a, const float *b, int64_t count)
{
    double worst = 0.0, size = 0.0;
    for (int64_t i = 0; i < count; i++) {
        CHECK(isfinite(a[i]) && isfinite(b[i]));
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
        size = fmax(size, fabs((double)b[i]));
    }
    CHECK(size > 0.01);
    return worst / size;
}

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

/* ---- the loop -------------------------------------------------------------------------------- */

static ac_status
nothing(void *arg, int32_t index, double timestep, float *latents)
{
    (void)arg;
    (void)index;
    (void)timestep;
    (void)latents;
    return 0;
}

static void
loops_agree(void)
{
    static request eager;
    double worst = 0.0;
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    for (size_t i = 0; i < AC_ARRAY_LEN(schedules); i++) {
        rig_open(&cpu, "cpu", AC_F32);
        rig_open(&there, "cuda", AC_F32);
        for (int kind = 0; kind < 3; kind++) {
            want = (request){.schedule = schedules[i], .guidance = kind ? 3.0 : 1.0,
                             .rescale = kind == 2 ? 0.7 : 0.0, .ragged = kind == 1};
            eager = want;
            CHECK_OK(denoise(&cpu, &want));
            setenv("ACCEL_GRAPH", "off", 1);
            CHECK_OK(denoise(&there, &eager));
            unsetenv("ACCEL_GRAPH");
            worst = fmax(worst, distance(eager.latents, want.latents, COUNT));
            CHECK(distance(eager.latents, want.latents, COUNT) < 1e-4);
            CHECK_INT(eager.generator, want.generator);
            ac_model_drop_plans(there.model);
            for (int run = 0; run < 3; run++) {
                got = (request){.schedule = schedules[i], .guidance = want.guidance,
                                .rescale = want.rescale, .ragged = want.ragged,
                                .callback = run == 2 ? nothing : NULL};
                CHECK_OK(denoise(&there, &got));
                CHECK(memcmp(got.latents, eager.latents, COUNT * sizeof(float)) == 0);
            }
        }
        rig_close(&cpu);
        rig_close(&there);
    }
    printf("worst %.2g ", worst);
    ac_device_unref(device);
}

/* A sampler's memory: on the host as it is, on the GPU with a copy here. */
typedef struct bench {
    ac_sampler_job job;
    float *sample, *output, *latents, *noise, *registers;
    ac_sampler_state *state;
} bench;

enum { GUIDED = 2 * COUNT };

static void *
place(ac_device *device, size_t bytes)
{
    void *memory;
    CHECK_OK(device->backend->alloc(device->self, bytes, &memory));
    return memory;
}

static void
bench_open(bench *b, ac_device *device, const ac_schedule *schedule, bool rescales)
{
    ac_sampler_job *job = &b->job;
    *job = (ac_sampler_job){.images = IMAGES, .per_image = COUNT / IMAGES, .guided = true,
                            .rescales = rescales,
                            .thresholds = schedule->rows[0].threshold > 0.0, .io = AC_F32};
    job->rows = place(device, (size_t)schedule->n_rows * sizeof *job->rows);
    job->state = b->state = place(device, sizeof *job->state);
    job->sample = b->sample = place(device, GUIDED * sizeof(float));
    job->output = b->output = place(device, GUIDED * sizeof(float));
    job->latents = b->latents = place(device, COUNT * sizeof(float));
    job->noise = b->noise = place(device, COUNT * sizeof(float));
    b->registers = place(device, AC_SCHED_REGISTERS * COUNT * sizeof(float));
    for (int i = 0; i < AC_SCHED_REGISTERS; i++) {
        job->registers[i] = b->registers + i * COUNT;
    }
    job->work = place(device, COUNT * sizeof(float));
    job->limits = place(device, IMAGES * sizeof(double));
}

static void
bench_close(bench *b, ac_device *device)
{
    void *const all[] = {(void *)b->job.rows, b->state, b->sample, b->output, b->latents, b->noise,
                         b->registers, b->job.work, b->job.limits};
    for (size_t i = 0; i < AC_ARRAY_LEN(all); i++) {
        device->backend->free(device->self, all[i]);
    }
}

static void
put(ac_device *device, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    CHECK_OK(device->backend->upload(device->self, lane, to, from, bytes));
}

/* All rows from the same numbers; latents, the UNet's input and what is remembered, after each. */
static void
sample_rows(ac_device *device, const ac_schedule *schedule, bool rescales,
            float results[][COUNT + GUIDED + AC_SCHED_REGISTERS * COUNT])
{
    static float random[GUIDED];
    const ac_backend *backend = device->backend;
    ac_device_lane *lane;
    bench b;
    bench_open(&b, device, schedule, rescales);
    CHECK_OK(ac_device_lane_take(device, NULL, &lane));
    ac_sampler_state state = {.guidance_scale = 2.5, .guidance_rescale = rescales ? 0.6 : 0.0};
    put(device, lane->lane, b.state, &state, sizeof state);
    put(device, lane->lane, (void *)b.job.rows, schedule->rows,
        (size_t)schedule->n_rows * sizeof *schedule->rows);
    fill(random, GUIDED, 1);
    put(device, lane->lane, b.latents, random, COUNT * sizeof(float));
    for (int i = 0; i < AC_SCHED_REGISTERS; i++) {
        put(device, lane->lane, b.registers + i * COUNT, random, COUNT * sizeof(float));
    }
    for (int32_t row = 0; row < schedule->n_rows; row++) {
        fill(random, GUIDED, 100 + (uint64_t)row);
        for (int i = 0; i < GUIDED; i++) {
            random[i] *= 3.0f;
        }
        put(device, lane->lane, b.output, random, GUIDED * sizeof(float));
        put(device, lane->lane, b.noise, random + 7, COUNT * sizeof(float));
        CHECK_OK(backend->sampler(device->self, lane->lane, &b.job, AC_SAMPLER_SCALE));
        CHECK_OK(backend->sampler(device->self, lane->lane, &b.job, AC_SAMPLER_APPLY));
        float *to = results[row];
        CHECK_OK(backend->download(device->self, lane->lane, to, b.latents, COUNT * 4));
        CHECK_OK(backend->download(device->self, lane->lane, to + COUNT, b.sample, GUIDED * 4));
        CHECK_OK(backend->download(device->self, lane->lane, to + COUNT + GUIDED, b.registers,
                                   AC_SCHED_REGISTERS * COUNT * 4));
        CHECK_OK(backend->sync(device->self, lane->lane));
    }
    ac_device_lane_give(device, lane);
    bench_close(&b, device);
}

/* The sampler alone on the same outputs of a UNet: the same bits, but for the sums of rescale. */
static void
samplers_are_the_same_bits(void)
{
    enum { EACH = COUNT + GUIDED + AC_SCHED_REGISTERS * COUNT, MOST_ROWS = 16 };
    static float expected[MOST_ROWS][EACH], found[MOST_ROWS][EACH];
    ac_device *device = open_gpu(), *host;
    if (!device) {
        return;
    }
    CHECK_OK(ac_device_open("cpu", &host));
    for (size_t s = 0; s < 2 * AC_ARRAY_LEN(schedules); s++) {
        const char *text = schedules[s / 2];
        const ac_json *json;
        ac_schedule *schedule;
        ac_arena arena;
        ac_sched_options options = {.num_inference_steps = STEPS, .eta = 0.3};
        ac_arena_init(&arena);
        CHECK_OK(ac_json_parse(&arena, text, strlen(text), "sched", &json));
        CHECK_OK(ac_schedule_new(json, &options, &schedule));
        CHECK(schedule->n_rows <= MOST_ROWS);
        sample_rows(host, schedule, s % 2, expected);
        sample_rows(device, schedule, s % 2, found);
        for (int32_t row = 0; row < schedule->n_rows; row++) {
            CHECK(s % 2 ? distance(found[row], expected[row], EACH) < 1e-6
                        : memcmp(found[row], expected[row], sizeof found[row]) == 0);
        }
        ac_schedule_free(schedule);
        ac_arena_deinit(&arena);
    }
    ac_device_unref(host);
    ac_device_unref(device);
}

/* The sampler finds the row on the GPU, recorded or not, and the loop says it at the end. */
static void
latents_that_are_not_finite_are_named(void)
{
    ac_device *device = open_gpu();
    if (!device) {
        return;
    }
    rig_open(&there, "cuda", AC_F32);
    for (int run = 0; run < 6; run++) {
        float *bias = ac_weights_find(there.weights, "conv_out.bias")->data, kept = bias[1];
        got = (request){.schedule = schedules[3], .guidance = 2.0, .finite = true};
        CHECK_OK(denoise(&there, &got));
        bias[1] = run % 2 ? NAN : INFINITY;
        ac_weights_check(there.weights);
        got.callback = run % 3 == 2 ? nothing : NULL;
        CHECK_STATUS(denoise(&there, &got), AC_E_NUMERIC, "after step 1 of 6");
        got.finite = false;
        CHECK_OK(denoise(&there, &got));
        bias[1] = kept;
        ac_weights_check(there.weights);
    }
    rig_close(&there);
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
          TEST(replays_are_the_same_bits),
          TEST(threads_run_at_once), TEST(a_second_gpu_gives_the_same_bits), TEST(loops_agree),
          TEST(samplers_are_the_same_bits),
          TEST(latents_that_are_not_finite_are_named), TEST(too_large_a_size_is_refused),
          TEST(two_hundred_runs_leave_memory_flat))
