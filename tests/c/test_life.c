/* life: config, weights, schedule, two steps of a small UNet on the CPU and the end of it all, with
 * each allocation failing in turn; runs are repeatable and see weights that change in place, also
 * several at once and in a child of fork.  `make tsan` runs it under the thread sanitizer. */
#include "../../csrc/denoise.h"
#include "test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

static const char config_text[] =
    "{\"_class_name\":\"UNet2DConditionModel\",\"block_out_channels\":[8,16],"
    "\"norm_num_groups\":4,\"layers_per_block\":1,\"down_block_types\":[\"CrossAttnDownBlock2D\","
    "\"DownBlock2D\"],\"up_block_types\":[\"UpBlock2D\",\"CrossAttnUpBlock2D\"],"
    "\"cross_attention_dim\":8,\"attention_head_dim\":2}";
static const char schedule_text[] = "{\"_class_name\":\"DDIMScheduler\",\"steps_offset\":1}";

enum { CHANNELS = 4, SIZE = 6, TOKENS = 5, COUNT = CHANNELS * SIZE * SIZE };

/* What a program that makes a picture holds. */
typedef struct life {
    ac_arena arena;
    ac_weights *weights;
    ac_model *model;
    ac_schedule *schedule;
    ac_graph *graph;
    bool change;          /* a weight in place, after the first run */
    float latents[COUNT]; /* of the last run */
    float first[COUNT];   /* of the one before */
} life;

/* Random numbers for every weight of the class, in the arena. */
static ac_status
make_weights(life *l, const ac_json *config)
{
    const ac_model_class *cls = NULL;
    ac_build_args args;
    uint64_t random = 5;
    AC_TRY(ac_model_class_find(config, &cls));
    void *fields = ac_arena_alloc(&l->arena, cls->config_size);
    if (!fields) {
        return ac_no_memory(cls->config_size);
    }
    AC_TRY(cls->parse(config, fields));
    cls->smallest(fields, "forward", &args);
    AC_TRY(ac_graph_new(AC_F32, &l->graph));
    cls->build(fields, &args, l->graph);
    AC_TRY(ac_graph_status(l->graph));
    for (int32_t v = 0; v < l->graph->n_values; v++) {
        const ac_value *value = &l->graph->values[v];
        if (value->kind != AC_VALUE_WEIGHT) {
            continue;
        }
        int64_t count = ac_shape_count(&value->shape);
        float *data = ac_arena_alloc(&l->arena, (size_t)count * sizeof *data);
        if (!data) {
            return ac_no_memory((size_t)count * sizeof *data);
        }
        for (int64_t i = 0; i < count; i++) {
            data[i] = (float)test_uniform(&random, -0.3, 0.3);
        }
        ac_tensor t = ac_tensor_of(data, AC_F32, value->shape);
        AC_TRY(ac_weights_set(l->weights, value->name, &t, NULL, NULL));
    }
    return AC_OK;
}

static ac_status
denoise(life *l)
{
    float states[2 * TOKENS * 8];
    uint64_t random = 9;
    for (size_t i = 0; i < AC_ARRAY_LEN(states); i++) {
        states[i] = (float)test_uniform(&random, -1, 1);
    }
    for (size_t i = 0; i < COUNT; i++) {
        l->latents[i] = (float)test_uniform(&random, -1, 1);
    }
    ac_rng rng;
    ac_rng_seed(&rng, 1);
    ac_condition condition = {.name = "encoder_hidden_states",
                              .tensor = ac_tensor_of(states, AC_F32, AC_SHAPE(2, TOKENS, 8))};
    ac_denoise_args args = {.unet = l->model, .schedule = l->schedule, .images = 1,
                            .height = SIZE, .width = SIZE, .channels = CHANNELS,
                            .condition = &condition, .n_conditions = 1, .tokens = TOKENS,
                            .guidance_scale = 3, .rng = &rng, .n_rng = 1};
    return ac_denoise(&args, l->latents);
}

static ac_status
live(life *l)
{
    const ac_json *config = NULL, *schedule = NULL;
    ac_sched_options options = {.num_inference_steps = 2};
    AC_TRY(ac_json_parse(&l->arena, config_text, sizeof config_text - 1, "unet", &config));
    AC_TRY(ac_json_parse(&l->arena, schedule_text, sizeof schedule_text - 1, "sched", &schedule));
    AC_TRY(ac_weights_new(&l->weights));
    AC_TRY(make_weights(l, config));
    AC_TRY(ac_model_new(config, l->weights, "cpu", "", &l->model));
    AC_TRY(ac_schedule_new(schedule, &options, &l->schedule));
    AC_TRY(denoise(l));
    memcpy(l->first, l->latents, sizeof l->first);
    if (l->change) {
        const ac_tensor *t = ac_weights_find(l->weights, "mid_block.attentions.0.transformer_blocks"
                                                         ".0.attn2.to_k.weight");
        ((float *)t->data)[3] += 1;
        ac_weights_check(l->weights);
    }
    return denoise(l);
}

static ac_status
life_and_end(void *context)
{
    life *l = context;
    bool change = l->change;
    *l = (life){.change = change};
    ac_arena_init(&l->arena);
    ac_status status = live(l);
    if (l->schedule) {
        ac_schedule_free(l->schedule);
    }
    ac_model_unref(l->model);
    ac_weights_unref(l->weights);
    ac_graph_free(l->graph);
    ac_arena_deinit(&l->arena);
    return status;
}

/* The device, its pool and lanes outlive a model: they are opened before anything is counted. */
static ac_device *
open_device(void)
{
    ac_device *device = NULL;
    life l = {0};
    CHECK_OK(ac_device_open("cpu", &device));
    CHECK_OK(life_and_end(&l));
    return device;
}

static void
runs_repeat(void)
{
    ac_device *device = open_device();
    static life a, b;
    CHECK_OK(life_and_end(&a));
    CHECK_OK(life_and_end(&b));
    for (int i = 0; i < COUNT; i++) {
        CHECK(isfinite(a.latents[i]) && fabsf(a.latents[i]) < 100);
    }
    CHECK(memcmp(a.first, a.latents, sizeof a.latents) == 0);
    CHECK(memcmp(a.latents, b.latents, sizeof a.latents) == 0);
    ac_device_unref(device);
}

static void
changes_in_place_are_seen(void)
{
    ac_device *device = open_device();
    static life a, b;
    b.change = true;
    CHECK_OK(life_and_end(&a));
    CHECK_OK(life_and_end(&b));
    CHECK(memcmp(a.first, b.first, sizeof a.first) == 0);
    CHECK(memcmp(b.first, b.latents, sizeof b.first) != 0);
    ac_device_unref(device);
}

static void
memory_stays_flat(void)
{
    ac_device *device = open_device();
    static life l;
    int64_t before = ac_alloc_live();
    for (int i = 0; i < 100; i++) {
        CHECK_OK(life_and_end(&l));
    }
    CHECK_INT(ac_alloc_live(), before);
    ac_device_unref(device);
}

/* ---- threads --------------------------------------------------------------------------------- */

typedef struct runner {
    pthread_t thread;
    life own;             /* with the model and schedule of another */
    const life *shared;
    _Atomic bool *stop;   /* NULL: four runs */
    _Atomic bool wrong;   /* a run failed, or gave other latents than the first */
} runner;

static life
borrow(const life *shared)
{
    return (life){.model = shared->model, .schedule = shared->schedule};
}

static void *
keep_running(void *arg)
{
    runner *r = arg;
    r->own = borrow(r->shared);
    for (int i = 0; r->stop ? !atomic_load(r->stop) : i < 4; i++) {
        if (denoise(&r->own) < 0 ||
            memcmp(r->own.latents, r->shared->latents, sizeof r->own.latents) != 0) {
            atomic_store(&r->wrong, true);
        }
    }
    return NULL;
}

static void
start_sharing(life *shared)
{
    *shared = (life){0};
    ac_arena_init(&shared->arena);
    CHECK_OK(live(shared));
}

static void
stop_sharing(life *shared)
{
    ac_schedule_free(shared->schedule);
    ac_model_unref(shared->model);
    ac_weights_unref(shared->weights);
    ac_graph_free(shared->graph);
    ac_arena_deinit(&shared->arena);
}

static void
several_runs_at_once(void)
{
    ac_device *device = open_device();
    static life shared;
    static runner runners[3];
    start_sharing(&shared);
    for (int i = 0; i < 3; i++) {
        runners[i] = (runner){.shared = &shared};
        CHECK_INT(pthread_create(&runners[i].thread, NULL, keep_running, &runners[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(runners[i].thread, NULL);
        CHECK(!atomic_load(&runners[i].wrong));
    }
    stop_sharing(&shared);
    ac_device_unref(device);
}

#ifndef __SANITIZE_THREAD__ /* which knows no threads after a fork of many */

/* Holds the model's and the weights' mutexes nearly all the time. */
static void *
keep_locking(void *arg)
{
    runner *r = arg;
    ac_build_args args = {.entry = "forward", .batch = 1, .height = SIZE, .width = SIZE,
                          .tokens = TOKENS, .timesteps = 1};
    while (!atomic_load(r->stop)) {
        ac_text text = {0};
        if (ac_model_explain(r->shared->model, &args, true, true, &text) < 0) {
            atomic_store(&r->wrong, true);
        }
        ac_text_free(&text);
        ac_weights_make_begin(r->shared->weights);
        usleep(500);
        ac_weights_make_end(r->shared->weights);
    }
    return NULL;
}

/* In the child: 0 when the model runs there as it did in the parent. */
static int
run_in_child(const life *shared)
{
    alarm(10); /* what waits for a thread that is not there ends */
    life own = borrow(shared);
    if (denoise(&own) < 0) {
        return 1;
    }
    return memcmp(own.latents, shared->latents, sizeof own.latents) == 0 ? 0 : 2;
}

static void
forks_while_other_threads_run(void)
{
    ac_device *device = open_device();
    static life shared;
    static runner runners[3];
    _Atomic bool stop = false;
    int bad = 0;
    start_sharing(&shared);
    for (int i = 0; i < 3; i++) {
        runners[i] = (runner){.shared = &shared, .stop = &stop};
        CHECK_INT(pthread_create(&runners[i].thread, NULL, i ? keep_running : keep_locking,
                                 &runners[i]), 0);
    }
    for (int i = 0; i < 30 && !bad; i++) {
        int status;
        pid_t child = fork();
        if (child == 0) {
            _exit(run_in_child(&shared));
        }
        bad = waitpid(child, &status, 0) != child || status != 0;
        usleep((useconds_t)(i * 37 % 100));
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++) {
        pthread_join(runners[i].thread, NULL);
        CHECK(!atomic_load(&runners[i].wrong));
    }
    CHECK(!bad);
    stop_sharing(&shared);
    ac_device_unref(device);
}
#else
static void
forks_while_other_threads_run(void)
{
}
#endif

static void
out_of_memory(void)
{
    ac_device *device = open_device();
    static life l;
    l.change = true;
    test_oom(life_and_end, &l);
    CHECK(test_state.oom_runs > 60);
    ac_device_unref(device);
}

TEST_MAIN(TEST(runs_repeat), TEST(changes_in_place_are_seen), TEST(memory_stays_flat),
          TEST(several_runs_at_once), TEST(forks_while_other_threads_run), TEST(out_of_memory))
