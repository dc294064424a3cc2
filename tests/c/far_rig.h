/* far_rig: one UNet on the CPU and on the far device: weights by name, loops, single calls. */
#ifndef AC_TEST_FAR_RIG_H
#define AC_TEST_FAR_RIG_H

#include "far_device.h"

static const char config_text[] =
    "{\"_class_name\":\"UNet2DConditionModel\",\"block_out_channels\":[32,16],"
    "\"norm_num_groups\":4,\"layers_per_block\":1,\"down_block_types\":[\"CrossAttnDownBlock2D\","
    "\"DownBlock2D\"],\"up_block_types\":[\"UpBlock2D\",\"CrossAttnUpBlock2D\"],"
    "\"cross_attention_dim\":8,\"attention_head_dim\":2}";

static const char *const schedules[] = {
    "{\"_class_name\":\"DDIMScheduler\",\"steps_offset\":1}",
    "{\"_class_name\":\"DDIMScheduler\",\"thresholding\":true,\"clip_sample\":false}",
    "{\"_class_name\":\"PNDMScheduler\"}",
    "{\"_class_name\":\"EulerDiscreteScheduler\"}",
    "{\"_class_name\":\"EulerAncestralDiscreteScheduler\"}",
    "{\"_class_name\":\"DPMSolverMultistepScheduler\",\"thresholding\":true}",
    "{\"_class_name\":\"DPMSolverMultistepScheduler\",\"algorithm_type\":\"sde-dpmsolver++\"}",
};

enum { CHANNELS = 4, SIZE = 6, TOKENS = 5, IMAGES = 2, STEPS = 6, MOST = 32, LARGEST = 130,
       COUNT = IMAGES * CHANNELS * SIZE * SIZE };

typedef struct rig {
    ac_arena arena;
    ac_weights *weights;
    ac_model *model;
    void *far_block;       /* of weights that lie on the device */
    ac_dtype dtype;
} rig;

/* ---- a model --------------------------------------------------------------------------------- */

static inline void
set_weight(rig *r, const ac_value *value, void *data)
{
    ac_tensor t = ac_tensor_of(data, r->dtype, value->shape);
    CHECK_OK(ac_weights_set(r->weights, value->name, &t, NULL, NULL));
}

/* Numbers by name. */
static inline void
add_weights(rig *r, const ac_json *config)
{
    const ac_model_class *cls;
    ac_build_args args;
    ac_graph *g;
    CHECK_OK(ac_model_class_find(config, &cls));
    void *fields = ac_arena_alloc(&r->arena, cls->config_size);
    CHECK_OK(cls->parse(config, fields));
    cls->smallest(fields, "forward", &args);
    CHECK_OK(ac_graph_new(AC_F32, &g));
    cls->build(fields, &args, g);
    CHECK_OK(ac_graph_status(g));
    for (int32_t v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        if (value->kind != AC_VALUE_WEIGHT) {
            continue;
        }
        int64_t count = ac_shape_count(&value->shape);
        uint64_t random = ac_hash(value->name, strlen(value->name), AC_HASH_SEED) | 1;
        void *data = ac_arena_alloc(&r->arena, (size_t)count * ac_dtype_size(r->dtype));
        CHECK(data);
        for (int64_t i = 0; i < count; i++) {
            ac_element_set(data, r->dtype, i, test_uniform(&random, -0.3, 0.3));
        }
        set_weight(r, value, data);
    }
    ac_graph_free(g);
}

static inline void
rig_open(rig *r, const char *device, ac_dtype dtype)
{
    const ac_json *config;
    *r = (rig){.dtype = dtype};
    ac_arena_init(&r->arena);
    CHECK_OK(ac_json_parse(&r->arena, config_text, sizeof config_text - 1, "unet", &config));
    CHECK_OK(ac_weights_new(&r->weights));
    add_weights(r, config);
    CHECK_OK(ac_model_new(config, r->weights, device, "", &r->model));
}

static inline void
rig_close(rig *r)
{
    ac_model_unref(r->model);
    ac_weights_unref(r->weights);
    if (r->far_block) {
        far_free(NULL, r->far_block);
    }
    ac_arena_deinit(&r->arena);
}

/* ---- the loop -------------------------------------------------------------------------------- */

typedef struct request {
    const char *schedule;
    int64_t size;
    double guidance, rescale;
    bool ragged;        /* a generator for each image */
    bool queue;         /* on a stream, latents, conditions and registers on the device */
    bool finite;        /* is checked */
    ac_step_fn callback;
    ac_status (*poll)(void *arg, int32_t index, double timestep);
    uint32_t generator; /* out: its next word */
    float latents[IMAGES * CHANNELS * LARGEST * LARGEST];
} request;

static float states[2 * IMAGES * TOKENS * 8];
static uint16_t half_states[2 * IMAGES * TOKENS * 8];

static inline void
fill(float *x, int64_t count, uint64_t random)
{
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float)test_uniform(&random, -1, 1);
    }
}

static inline int64_t
count_of(const request *q)
{
    return IMAGES * CHANNELS * q->size * q->size;
}

/* All operands in far memory. */
static inline ac_status
denoise_there(ac_denoise_args *args, ac_condition *condition, request *q)
{
    void *x, *states_there;
    size_t bytes = (size_t)count_of(q) * sizeof(float);
    CHECK_OK(far_alloc(NULL, bytes, &x));
    CHECK_OK(far_alloc(NULL, sizeof states, &states_there));
    memcpy(x, q->latents, bytes);
    memcpy(states_there, states, sizeof states);
    condition->tensor.data = states_there;
    condition->device = args->device = true;
    args->stream = (ac_stream){.given = true, .handle = (void *)(uintptr_t)(q->size + 16)};
    ac_status status = ac_denoise(args, x);
    memcpy(q->latents, x, bytes);
    far_free(NULL, x);
    far_free(NULL, states_there);
    return status;
}

static inline ac_status
denoise(rig *r, request *q)
{
    const ac_json *json;
    ac_schedule *schedule;
    ac_sched_options options = {.num_inference_steps = STEPS, .eta = 0.3};
    ac_arena arena;
    ac_rng rng[IMAGES];
    q->size = q->size ? q->size : SIZE;
    ac_arena_init(&arena);
    CHECK_OK(ac_json_parse(&arena, q->schedule, strlen(q->schedule), "sched", &json));
    CHECK_OK(ac_schedule_new(json, &options, &schedule));
    for (int i = 0; i < IMAGES; i++) {
        ac_rng_seed(&rng[i], 5 + (uint64_t)i);
    }
    fill(states, AC_ARRAY_LEN(states), 9);
    for (size_t i = 0; i < AC_ARRAY_LEN(states) && r->dtype != AC_F32; i++) {
        ac_element_set(half_states, r->dtype, (int64_t)i, states[i]);
    }
    fill(q->latents, count_of(q), 11);
    int64_t batch = q->guidance > 1 ? 2 * IMAGES : IMAGES;
    ac_condition condition = {.name = "encoder_hidden_states",
                              .tensor = ac_tensor_of(r->dtype == AC_F32 ? (void *)states
                                                                        : half_states,
                                                     r->dtype, AC_SHAPE(batch, TOKENS, 8))};
    ac_denoise_args args = {.unet = r->model, .schedule = schedule, .images = IMAGES,
                            .height = q->size, .width = q->size, .channels = CHANNELS,
                            .condition = &condition, .n_conditions = 1, .tokens = TOKENS,
                            .compute = r->dtype,
                            .guidance_scale = q->guidance, .guidance_rescale = q->rescale,
                            .rng = rng, .n_rng = q->ragged ? IMAGES : 1,
                            .callback = q->callback, .poll = q->poll, .finite = q->finite};
    ac_status status = q->queue ? denoise_there(&args, &condition, q)
                                : ac_denoise(&args, q->latents);
    q->generator = ac_rng_next(&rng[0]);
    ac_schedule_free(schedule);
    ac_arena_deinit(&arena);
    return status;
}

static inline void
same_latents(const request *a, const request *b)
{
    double size = 0.0;
    for (int64_t i = 0; i < count_of(a); i++) {
        CHECK(isfinite(a->latents[i]));
        size += fabs((double)a->latents[i]);
    }
    CHECK(size > 1.0);
    CHECK(memcmp(a->latents, b->latents, (size_t)count_of(a) * sizeof(float)) == 0);
    CHECK_INT(a->generator, b->generator);
}

static inline void
start_count(void)
{
    far.replays = far.uploads = far.launches = far.follows = far.waits = far.syncs = 0;
    far.downloads = far.copies = far.samplers = far.tails = 0;
    far.most = far.live;
    far.uploaded = 0;
}

static rig cpu, there;

static inline void
open_both(void)
{
    ac_device_add_backend(&far_backend);
    CHECK_INT(far.live, 0);
    rig_open(&cpu, "cpu", AC_F32);
    rig_open(&there, "far", AC_F32);
}

static inline void
close_both(void)
{
    rig_close(&cpu);
    rig_close(&there);
    CHECK_INT(far.live, 0);
    CHECK_INT(far.recordings, 0);
    CHECK_INT(far.events, 0);
}

/* ---- one call -------------------------------------------------------------------------------- */

/* A UNet call with operands on the host, or far. */
static inline ac_status
call(rig *r, int64_t size, ac_stream stream, bool on_host, float *out)
{
    static float x[IMAGES * CHANNELS * MOST * MOST];
    float timestep = 400.0f;
    ac_exec *exec;
    void *memory[4] = {0};
    ac_build_args args = {.entry = "forward", .batch = IMAGES, .height = size, .width = size,
                          .tokens = TOKENS, .timesteps = 1};
    ac_tensor t[4] = {ac_tensor_of(x, AC_F32, AC_SHAPE(IMAGES, CHANNELS, size, size)),
                      ac_tensor_of(&timestep, AC_F32, AC_SHAPE(1)),
                      ac_tensor_of(states, AC_F32, AC_SHAPE(IMAGES, TOKENS, 8)),
                      ac_tensor_of(out, AC_F32, AC_SHAPE(IMAGES, CHANNELS, size, size))};
    static const char *const names[] = {"sample", "timestep", "encoder_hidden_states", "sample"};
    fill(x, ac_tensor_count(&t[0]), 3);
    fill(states, AC_ARRAY_LEN(states), 9);
    AC_TRY(ac_model_take(r->model, &args, 0, &exec));
    for (int i = 0; i < 4; i++) {
        if (!on_host) {
            CHECK_OK(far_alloc(NULL, ac_tensor_bytes(&t[i]), &memory[i]));
            memcpy(memory[i], t[i].data, ac_tensor_bytes(&t[i]));
            t[i].data = memory[i];
        }
        ac_status (*const input[])(ac_exec *, const char *, const ac_tensor *) = {
            ac_exec_bind, ac_exec_bind_host, ac_exec_bind_output, ac_exec_bind_output_host};
        CHECK_OK(input[2 * (i == 3) + on_host](exec, names[i], &t[i]));
    }
    ac_status status = ac_exec_run_on(exec, AC_RATE_PROMPT, stream);
    ac_model_give(r->model, exec);
    if (!on_host) {
        memcpy(out, memory[3], ac_tensor_bytes(&t[3]));
        for (int i = 0; i < 4; i++) {
            far_free(NULL, memory[i]);
        }
    }
    return status;
}

#endif
