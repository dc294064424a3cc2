/* test_cuda_loop: the denoise loop and the sampler on a GPU, against the CPU and against itself.
 * Where there is no GPU it says so and passes. */
#include "cuda_rig.h"

static request want, got;

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
                            .n_rows = schedule->n_rows,
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
    job->tickets = place(device, AC_SAMPLER_TICKETS(job) * sizeof(uint32_t));
}

static void
bench_close(bench *b, ac_device *device)
{
    void *const all[] = {(void *)b->job.rows, b->state, b->sample, b->output, b->latents, b->noise,
                         b->registers, b->job.work, b->job.limits, b->job.tickets};
    for (size_t i = 0; i < AC_ARRAY_LEN(all); i++) {
        device->backend->free(device->self, all[i]);
    }
}

static void
put(ac_device *device, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    CHECK_OK(device->backend->upload(device->self, lane, to, from, bytes));
}

/* What gives the UNet's output. */
typedef enum source { UPLOADED, CONV_APART, CONV_IN_TAIL } source;

/* A UNet's last convolution in half precision. */
typedef struct last_conv {
    ac_problem conv, to_nchw;
    ac_tensor input[3], result;
    void *weight; /* packed */
} last_conv;

enum { FEATURES = 64, PIXELS = GUIDED / CHANNELS };

static void
upload_half(ac_device *device, ac_lane *lane, void *to, ac_dtype dtype, int64_t count,
            uint64_t random)
{
    static uint16_t halves[PIXELS * FEATURES];
    CHECK(count <= (int64_t)AC_ARRAY_LEN(halves));
    for (int64_t i = 0; i < count; i++) {
        ac_element_set(halves, dtype, i, test_uniform(&random, -1, 1));
    }
    put(device, lane, to, halves, (size_t)count * sizeof *halves);
    CHECK_OK(device->backend->sync(device->self, lane));
}

static void
conv_open(last_conv *c, ac_device *device, ac_lane *lane, const ac_sampler_job *job,
          ac_dtype dtype)
{
    enum { TAPS = 9 };
    const ac_shape shape[] = {AC_SHAPE(2 * IMAGES, SIZE, SIZE, FEATURES),
                              AC_SHAPE(CHANNELS, FEATURES, 3, 3), AC_SHAPE(CHANNELS)};
    for (int i = 0; i < 3; i++) {
        void *memory = place(device, (size_t)ac_shape_count(&shape[i]) * sizeof(uint16_t));
        c->input[i] = ac_tensor_of(memory, dtype, shape[i]);
        upload_half(device, lane, memory, dtype, ac_shape_count(&shape[i]), 40 + (uint64_t)i);
    }
    c->weight = place(device, CHANNELS * FEATURES * TAPS * sizeof(uint16_t));
    upload_half(device, lane, c->weight, dtype, CHANNELS * FEATURES * TAPS, 50);
    c->result = ac_tensor_of(place(device, GUIDED * sizeof(uint16_t)), dtype,
                             AC_SHAPE(2 * IMAGES, SIZE, SIZE, CHANNELS));
    c->conv = (ac_problem){.op = AC_OP_CONV2D, .n_inputs = 3, .input = c->input,
                           .output = c->result,
                           .attr.conv2d = {.stride = 1, 1, 1, 1, 1, AC_ACT_NONE}};
    c->to_nchw = (ac_problem){.op = AC_OP_TO_NCHW, .n_inputs = 1, .input = &c->result,
                              .output = ac_tensor_of(job->output, AC_F32,
                                                     AC_SHAPE(2 * IMAGES, CHANNELS, SIZE, SIZE))};
    CHECK(device->backend->tail_fits(&device->caps, &c->conv, job));
}

static void
conv_close(last_conv *c, ac_device *device)
{
    void *const all[] = {c->input[0].data, c->input[1].data, c->input[2].data, c->weight,
                         c->result.data};
    for (size_t i = 0; i < AC_ARRAY_LEN(all); i++) {
        device->backend->free(device->self, all[i]);
    }
}

static void
launch_first(const ac_device *device, ac_lane *lane, const char *name, const ac_problem *p,
             const void *prepared)
{
    const ac_kernel *const *k = device->backend->kernels;
    while (*k && !((*k)->op == p->op && (*k)->supports(p, &device->caps))) {
        k++;
    }
    CHECK(*k && strcmp((*k)->name, name) == 0);
    CHECK_OK((*k)->launch(lane, p, NULL, prepared));
}

/* A row, of other features each time. */
static void
run_row(ac_device *device, ac_lane *lane, last_conv *c, const ac_sampler_job *job, int32_t row,
        bool in_tail)
{
    const ac_backend *backend = device->backend;
    upload_half(device, lane, c->input[0].data, c->conv.output.dtype, PIXELS * FEATURES,
                60 + (uint64_t)row);
    if (row == 0 || !in_tail) {
        CHECK_OK(backend->sampler(device->self, lane, job, AC_SAMPLER_SCALE));
    }
    if (in_tail) {
        CHECK_OK(backend->tail(device->self, lane, &c->conv, c->weight, job));
        return;
    }
    launch_first(device, lane, "cuda.conv2d.narrow", &c->conv, c->weight);
    launch_first(device, lane, "cuda.to_nchw", &c->to_nchw, NULL);
    CHECK_OK(backend->sampler(device->self, lane, job, AC_SAMPLER_APPLY));
    CHECK_OK(backend->sampler(device->self, lane, job, AC_SAMPLER_SCALE)); /* as the tail ends */
}

/* All rows from the same numbers; latents, the UNet's input and what is remembered, after each. */
static void
sample_rows(ac_device *device, const ac_schedule *schedule, bool rescales, source from,
            ac_dtype dtype, float results[][COUNT + GUIDED + AC_SCHED_REGISTERS * COUNT])
{
    last_conv conv;
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
    if (from != UPLOADED) {
        conv_open(&conv, device, lane->lane, &b.job, dtype);
    }
    for (int32_t row = 0; row < schedule->n_rows; row++) {
        fill(random, GUIDED, 100 + (uint64_t)row);
        for (int i = 0; i < GUIDED; i++) {
            random[i] *= 3.0f;
        }
        put(device, lane->lane, b.output, random, GUIDED * sizeof(float));
        put(device, lane->lane, b.noise, random + 7, COUNT * sizeof(float));
        if (from == UPLOADED) {
            CHECK_OK(backend->sampler(device->self, lane->lane, &b.job, AC_SAMPLER_SCALE));
            CHECK_OK(backend->sampler(device->self, lane->lane, &b.job, AC_SAMPLER_APPLY));
        } else {
            run_row(device, lane->lane, &conv, &b.job, row, from == CONV_IN_TAIL);
        }
        float *to = results[row];
        CHECK_OK(backend->download(device->self, lane->lane, to, b.latents, COUNT * 4));
        CHECK_OK(backend->download(device->self, lane->lane, to + COUNT, b.sample, GUIDED * 4));
        CHECK_OK(backend->download(device->self, lane->lane, to + COUNT + GUIDED, b.registers,
                                   AC_SCHED_REGISTERS * COUNT * 4));
        CHECK_OK(backend->sync(device->self, lane->lane));
    }
    ac_device_lane_give(device, lane);
    if (from != UPLOADED) {
        conv_close(&conv, device);
    }
    bench_close(&b, device);
}

enum { EACH = COUNT + GUIDED + AC_SCHED_REGISTERS * COUNT, MOST_ROWS = 16 };
static float expected[MOST_ROWS][EACH], found[MOST_ROWS][EACH];

static ac_schedule *
make_schedule(const char *text)
{
    const ac_json *json;
    ac_schedule *schedule;
    ac_arena arena;
    ac_sched_options options = {.num_inference_steps = STEPS, .eta = 0.3};
    ac_arena_init(&arena);
    CHECK_OK(ac_json_parse(&arena, text, strlen(text), "sched", &json));
    CHECK_OK(ac_schedule_new(json, &options, &schedule));
    CHECK(schedule->n_rows <= MOST_ROWS);
    ac_arena_deinit(&arena);
    return schedule;
}

/* The sampler alone on the same outputs of a UNet: the same bits, but for the sums of rescale. */
static void
samplers_are_the_same_bits(void)
{
    ac_device *device = open_gpu(), *host;
    if (!device) {
        return;
    }
    CHECK_OK(ac_device_open("cpu", &host));
    for (size_t s = 0; s < 2 * AC_ARRAY_LEN(schedules); s++) {
        ac_schedule *schedule = make_schedule(schedules[s / 2]);
        sample_rows(host, schedule, s % 2, UPLOADED, AC_F32, expected);
        sample_rows(device, schedule, s % 2, UPLOADED, AC_F32, found);
        for (int32_t row = 0; row < schedule->n_rows; row++) {
            CHECK(s % 2 ? distance(found[row], expected[row], EACH) < 1e-6
                        : memcmp(found[row], expected[row], sizeof found[row]) == 0);
        }
        ac_schedule_free(schedule);
    }
    ac_device_unref(host);
    ac_device_unref(device);
}

/* The same in the launch of the last convolution, against launches of each. */
static void
samplers_in_the_tail_are_the_same_bits(void)
{
    ac_device *device = open_gpu();
    for (size_t s = 0; device && s < 2 * AC_ARRAY_LEN(schedules); s++) {
        ac_dtype dtype = s % 2 && device->caps.isa >= 80 ? AC_BF16 : AC_F16;
        ac_schedule *schedule = make_schedule(schedules[s / 2]);
        if (schedule->rows[0].threshold == 0.0) {
            sample_rows(device, schedule, false, CONV_APART, dtype, expected);
            sample_rows(device, schedule, false, CONV_IN_TAIL, dtype, found);
            CHECK(memcmp(found, expected, (size_t)schedule->n_rows * sizeof found[0]) == 0);
            CHECK(memcmp(found[0], found[1], sizeof found[0]) != 0);
        }
        ac_schedule_free(schedule);
    }
    ac_device_unref(device);
}

/* The GPU's backend with its tail counted, or without. */
static struct {
    ac_backend counted, apart;
    int32_t tails;
} backends;

static ac_status
count_tail(void *self, ac_lane *lane, const ac_problem *conv, const void *prepared,
           const ac_sampler_job *job)
{
    ac_device *device;
    CHECK_OK(ac_device_open("cuda", &device));
    backends.tails++;
    ac_status status = device->backend->tail(self, lane, conv, prepared, job);
    ac_device_unref(device);
    return status;
}

static void
open_backends(const ac_device *device, ac_dtype dtype)
{
    backends.counted = backends.apart = *device->backend;
    backends.counted.name = "counted";
    backends.counted.tail = count_tail;
    backends.apart.name = "apart";
    backends.apart.tail_fits = NULL;
    backends.tails = 0;
    ac_device_add_backend(&backends.counted);
    rig_open(&there, "counted", dtype);
    ac_device_add_backend(&backends.apart);
    rig_open(&cpu, "apart", dtype);
}

/* The row in the last convolution's launch, against both apart: launched, recorded, replayed, with
 * a callback, in tiles of one line and of four, that end within the picture or do not. */
static void
tails_are_the_same_bits(void)
{
    static const int64_t sizes[] = {SIZE, 22, 36, LARGEST};
    ac_device *device = open_gpu();
    for (size_t k = 0; device && k < 2 * AC_ARRAY_LEN(schedules); k++) {
        const char *schedule = schedules[k / 2];
        bool old = device->caps.isa < 80; /* no bf16, and slow attention over many pixels */
        size_t n_sizes = AC_ARRAY_LEN(sizes) - old;
        ac_dtype dtype = k % 2 && !old ? AC_BF16 : AC_F16;
        open_backends(device, dtype);
        for (int guided = 0; guided < 2; guided++) {
            want = (request){.schedule = schedule, .guidance = guided ? 4.0 : 1.0,
                             .size = sizes[(k + k / 4) % n_sizes],
                             .ragged = k % 3 == 1};
            got = want;
            CHECK_OK(denoise(&cpu, &want));
            for (int run = 0; run < 4; run++) {
                got.callback = run == 3 ? nothing : NULL;
                CHECK_OK(denoise(&there, &got));
                same_latents(&got, &want);
            }
        }
        CHECK((backends.tails > 0) == !strstr(schedule, "thresholding"));
        rig_close(&cpu);
        rig_close(&there);
    }
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

TEST_MAIN(TEST(loops_agree), TEST(samplers_are_the_same_bits),
          TEST(samplers_in_the_tail_are_the_same_bits), TEST(tails_are_the_same_bits),
          TEST(latents_that_are_not_finite_are_named))
