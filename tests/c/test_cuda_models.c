/* test_cuda_models: whole models through the same graph, passes, plan and exec on two devices: the
 * CPU in f32 and, where there is a GPU, CUDA in f32, f16 and bf16.  Random weights, all of them.
 *
 *     test_cuda_models [filter]
 *     test_cuda_models --time     SD1.5's UNet at 64x64, batch 2, f16: ms a call, not recorded
 */
#include "../../csrc/backend_cuda.h"
#include "../../csrc/model.h"
#include "test.h"

#include <time.h>

enum { MAX_TENSORS = 4096 };

/* One model on one device, with its weights and the tensors at its edges. */
typedef struct rig {
    ac_arena arena;
    ac_model *model;
    ac_device *device; /* borrowed */
    ac_weights *weights;
    ac_build_args args;
    ac_exec *exec;
    void *host[MAX_TENSORS], *memory[16]; /* to free: weights on the host, edges on the device */
    int32_t n_host, n_memory;
    float *result; /* first output as f32, on the host */
    int64_t count;
} rig;

static double
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Depends on the name alone: the same numbers for every device, rounded to the dtype. */
static void
fill(void *data, ac_dtype dtype, const ac_shape *shape, const char *name, bool weight)
{
    uint64_t state = ac_hash(name, strlen(name), AC_HASH_SEED) | 1;
    int64_t count = ac_shape_count(shape);
    bool matrix = weight && shape->rank > 1;
    double fan_in = matrix ? (double)count / (double)shape->dim[0] : 1.0;
    double scale = matrix ? sqrt(3.0 / fan_in) : weight ? 0.3 : 1.7;
    bool gamma = weight && !matrix && strstr(name, "norm") && strstr(name, "weight");
    for (int64_t i = 0; i < count; i++) {
        double x = ac_dtype_is_float(dtype) ? test_uniform(&state, -scale, scale) + gamma
                                            : (double)(test_random(&state) % 50);
        ac_element_set(data, dtype, i, strcmp(name, "timestep") == 0 ? 500.0 + 100.0 * x : x);
    }
}

static void *
host_tensor(rig *r, ac_dtype dtype, const ac_shape *shape)
{
    void *data = ac_malloc_aligned((size_t)ac_shape_count(shape) * ac_dtype_size(dtype));
    CHECK(data && r->n_host < MAX_TENSORS);
    return r->host[r->n_host++] = data;
}

static void
add_weights(rig *r, const ac_model_class *cls, const void *config, ac_dtype dtype)
{
    for (int i = 0; cls->entries[i]; i++) {
        ac_graph *g;
        ac_build_args args;
        cls->smallest(config, cls->entries[i], &args);
        CHECK_OK(ac_graph_new(AC_F32, &g));
        cls->build(config, &args, g);
        CHECK_OK(ac_graph_status(g));
        for (ac_val v = 0; v < g->n_values; v++) {
            const ac_value *value = &g->values[v];
            if (value->kind == AC_VALUE_WEIGHT && !ac_weights_find(r->weights, value->name)) {
                ac_tensor t = ac_tensor_of(host_tensor(r, dtype, &value->shape), dtype,
                                           value->shape);
                fill(t.data, dtype, &value->shape, value->name, true);
                CHECK_OK(ac_weights_set(r->weights, value->name, &t, NULL, NULL));
            }
        }
        ac_graph_free(g);
    }
}

static void
rig_open(rig *r, const char *config_text, const char *device, ac_dtype dtype, ac_build_args args)
{
    const ac_json *json;
    const ac_model_class *cls;
    *r = (rig){.args = args};
    r->args.io_dtype = r->args.compute = dtype;
    ac_arena_init(&r->arena);
    CHECK_OK(ac_json_parse(&r->arena, config_text, strlen(config_text), "test", &json));
    CHECK_OK(ac_model_class_find(json, &cls));
    void *config = ac_arena_alloc(&r->arena, cls->config_size);
    CHECK(config);
    CHECK_OK(cls->parse(json, config));
    CHECK_OK(ac_weights_new(&r->weights));
    add_weights(r, cls, config, dtype);
    CHECK_OK(ac_model_new(json, r->weights, device, "", &r->model));
    r->device = ac_model_device(r->model);
}

static void *
device_tensor(rig *r, const ac_io *io)
{
    const ac_backend *b = r->device->backend;
    size_t bytes = (size_t)ac_shape_count(&io->shape) * ac_dtype_size(io->dtype);
    void *host = ac_malloc_aligned(bytes), *memory;
    ac_device_lane *lane;
    CHECK(host && r->n_memory < (int32_t)AC_ARRAY_LEN(r->memory));
    fill(host, io->dtype, &io->shape, io->name, false);
    CHECK_OK(b->alloc(r->device->self, bytes, &memory));
    CHECK_OK(ac_device_lane_take(r->device, NULL, &lane));
    CHECK_OK(b->upload(r->device->self, lane->lane, memory, host, bytes));
    CHECK_OK(b->sync(r->device->self, lane->lane));
    ac_device_lane_give(r->device, lane);
    ac_free_aligned(host);
    return r->memory[r->n_memory++] = memory;
}

static void
read_result(rig *r, void *memory, ac_dtype dtype)
{
    const ac_backend *b = r->device->backend;
    size_t bytes = (size_t)r->count * ac_dtype_size(dtype);
    void *host = ac_malloc_aligned(bytes);
    ac_device_lane *lane;
    CHECK(host);
    CHECK_OK(ac_device_lane_take(r->device, NULL, &lane));
    CHECK_OK(b->sync(r->device->self, lane->lane));
    CHECK_OK(b->download(r->device->self, lane->lane, host, memory, bytes));
    CHECK_OK(b->sync(r->device->self, lane->lane));
    ac_device_lane_give(r->device, lane);
    r->result = ac_malloc((size_t)r->count * sizeof *r->result);
    CHECK(r->result);
    ac_convert(r->result, AC_F32, host, dtype, r->count);
    ac_free_aligned(host);
}

static void
wait_for(const rig *r)
{
    ac_device_lane *lane;
    CHECK_OK(ac_device_lane_take(r->device, NULL, &lane));
    CHECK_OK(r->device->backend->sync(r->device->self, lane->lane));
    ac_device_lane_give(r->device, lane);
}

/* Runs once, or `times` more and tells the time of one. */
static double
rig_run(rig *r, int times)
{
    ac_io *io;
    int32_t count;
    void *output = NULL;
    ac_dtype dtype = AC_F32;
    double taken = 0.0;
    CHECK_OK(ac_model_io(r->model, &r->args, &io, &count));
    CHECK_OK(ac_model_take(r->model, &r->args, 0, &r->exec));
    for (int32_t i = 0; i < count; i++) {
        ac_tensor t = ac_tensor_of(device_tensor(r, &io[i]), io[i].dtype, io[i].shape);
        CHECK_OK(io[i].output ? ac_exec_bind_output(r->exec, io[i].name, &t)
                              : ac_exec_bind(r->exec, io[i].name, &t));
        if (io[i].output && !output) {
            output = t.data;
            dtype = io[i].dtype;
            r->count = ac_shape_count(&io[i].shape);
        }
    }
    CHECK_OK(ac_exec_run(r->exec, AC_RATE_PROMPT));
    if (times) {
        wait_for(r);
        taken = now();
        for (int i = 0; i < times; i++) {
            CHECK_OK(ac_exec_run(r->exec, AC_RATE_STEP));
        }
        wait_for(r);
        taken = (now() - taken) / times;
    }
    read_result(r, output, dtype);
    ac_model_give(r->model, r->exec);
    ac_free(io);
    return taken;
}

static void
rig_close(rig *r)
{
    wait_for(r);
    for (int32_t i = 0; i < r->n_memory; i++) {
        r->device->backend->free(r->device->self, r->memory[i]);
    }
    ac_weights_drop_derived(r->weights);
    ac_model_unref(r->model);
    ac_weights_unref(r->weights);
    for (int32_t i = 0; i < r->n_host; i++) {
        ac_free_aligned(r->host[i]);
    }
    ac_arena_deinit(&r->arena);
    ac_free(r->result);
}

/* Norm of the difference over that of the expected. */
static double
distance(const rig *found, const rig *expected)
{
    double error = 0.0, size = 0.0;
    CHECK_INT(found->count, expected->count);
    for (int64_t i = 0; i < found->count; i++) {
        double d = (double)found->result[i] - (double)expected->result[i];
        error += d * d;
        size += (double)expected->result[i] * (double)expected->result[i];
    }
    CHECK(size > 0.0);
    return sqrt(error / size);
}

static bool
have_gpu(void)
{
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &device) < 0) {
        printf("(no GPU) ");
        return false;
    }
    ac_device_unref(device);
    return true;
}

static void
compare(const char *config, ac_build_args args)
{
    static const struct {
        ac_dtype dtype;
        double most;
    } runs[] = {{AC_F32, 2e-5}, {AC_F16, 1e-2}, {AC_BF16, 8e-2}};
    static rig cpu, gpu;
    if (!have_gpu()) {
        return;
    }
    rig_open(&cpu, config, "cpu", AC_F32, args);
    rig_run(&cpu, 0);
    for (size_t i = 0; i < AC_ARRAY_LEN(runs); i++) {
        rig_open(&gpu, config, "cuda", runs[i].dtype, args);
        rig_run(&gpu, 0);
        double d = distance(&gpu, &cpu);
        printf("%s %.2g ", ac_dtype_name(runs[i].dtype), d);
        fflush(stdout);
        CHECK(d <= runs[i].most);
        rig_close(&gpu);
    }
    rig_close(&cpu);
}

static void
a_little_unet(void)
{
    compare("{\"_class_name\": \"UNet2DConditionModel\", \"block_out_channels\": [64, 128], "
            "\"down_block_types\": [\"CrossAttnDownBlock2D\", \"DownBlock2D\"], "
            "\"up_block_types\": [\"UpBlock2D\", \"CrossAttnUpBlock2D\"], "
            "\"layers_per_block\": 2, \"cross_attention_dim\": 48, \"attention_head_dim\": 8, "
            "\"sample_size\": 16}",
            (ac_build_args){.entry = "forward", .batch = 2, .height = 16, .width = 24,
                            .tokens = 77, .timesteps = 1});
}

static void
a_little_sdxl_unet(void)
{
    compare("{\"_class_name\": \"UNet2DConditionModel\", \"block_out_channels\": [64, 128], "
            "\"down_block_types\": [\"DownBlock2D\", \"CrossAttnDownBlock2D\"], "
            "\"up_block_types\": [\"CrossAttnUpBlock2D\", \"UpBlock2D\"], "
            "\"layers_per_block\": 2, \"cross_attention_dim\": 96, \"sample_size\": 16, "
            "\"attention_head_dim\": [1, 2], \"transformer_layers_per_block\": [1, 2], "
            "\"use_linear_projection\": true, \"addition_embed_type\": \"text_time\", "
            "\"addition_time_embed_dim\": 16, \"projection_class_embeddings_input_dim\": 136}",
            (ac_build_args){.entry = "forward", .batch = 2, .height = 18, .width = 15,
                            .tokens = 20, .timesteps = 1});
}

#define LITTLE_VAE                                                                                 \
    "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [32, 64], "                      \
    "\"down_block_types\": [\"DownEncoderBlock2D\", \"DownEncoderBlock2D\"], "                     \
    "\"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"], "                           \
    "\"layers_per_block\": 1, \"latent_channels\": 4, \"sample_size\": 32}"

static void
a_little_vae_decodes(void)
{
    compare(LITTLE_VAE, (ac_build_args){.entry = "decode", .batch = 1, .height = 20, .width = 12});
}

static void
a_little_vae_encodes(void)
{
    compare(LITTLE_VAE, (ac_build_args){.entry = "encode", .batch = 2, .height = 32, .width = 24});
}

static void
a_little_clip(void)
{
    compare("{\"architectures\": [\"CLIPTextModel\"], \"model_type\": \"clip_text_model\", "
            "\"vocab_size\": 60, \"hidden_size\": 64, \"intermediate_size\": 128, "
            "\"num_attention_heads\": 2, \"num_hidden_layers\": 3, "
            "\"max_position_embeddings\": 77, \"hidden_act\": \"quick_gelu\", "
            "\"eos_token_id\": 2, \"layer_norm_eps\": 1e-05}",
            (ac_build_args){.entry = "forward", .batch = 2, .tokens = 77});
}

static int
time_sd15(void)
{
    static char text[1 << 16];
    static rig r;
    FILE *file = fopen("tests/configs/sd15_unet.json", "rb");
    if (!file || !have_gpu()) {
        printf("needs a GPU and the repository's root\n");
        return 1;
    }
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    rig_open(&r, text, "cuda", AC_F16,
             (ac_build_args){.entry = "forward", .batch = 2, .height = 64, .width = 64,
                             .tokens = 77, .timesteps = 1});
    double taken = rig_run(&r, 20);
    int64_t finite = 0;
    for (int64_t i = 0; i < r.count; i++) {
        finite += isfinite(r.result[i]) != 0;
    }
    printf("SD1.5 UNet 64x64 batch 2 f16: %.2f ms a call; %lld of %lld results finite\n",
           taken * 1e3, (long long)finite, (long long)r.count);
    rig_close(&r);
    return finite != r.count;
}

int
main(int argc, char **argv)
{
    static const test_row rows[] = {TEST(a_little_unet), TEST(a_little_sdxl_unet),
                                    TEST(a_little_vae_decodes), TEST(a_little_vae_encodes),
                                    TEST(a_little_clip)};
    if (argc > 1 && strcmp(argv[1], "--time") == 0) {
        return time_sd15();
    }
    return test_main(argc, argv, rows, AC_ARRAY_LEN(rows));
}
