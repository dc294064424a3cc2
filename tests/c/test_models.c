/* models: parameter counts of the published configs, names, what parse refuses, what the check of
 * weights lists, and graphs and plans of every class at many sizes on the null device. */
#include "test.h"

#include "../../csrc/model.h"
#include "../../csrc/models/models.h"

typedef struct model {
    ac_arena arena;
    const ac_json *json;
    const ac_model_class *cls;
    void *config;
} model;

static ac_status
model_parse(model *m, const char *text)
{
    *m = (model){0};
    ac_arena_init(&m->arena);
    AC_TRY(ac_json_parse(&m->arena, text, strlen(text), "test", &m->json));
    AC_TRY(ac_model_class_find(m->json, &m->cls));
    m->config = ac_arena_alloc(&m->arena, m->cls->config_size);
    return m->config ? m->cls->parse(m->json, m->config) : ac_no_memory(m->cls->config_size);
}

static void
model_free(model *m)
{
    ac_arena_deinit(&m->arena);
}

static char *
read_config(const char *name)
{
    static char text[1 << 16];
    char path[200];
    snprintf(path, sizeof path, "tests/configs/%s.json", name);
    FILE *file = fopen(path, "rb");
    if (!file) {
        TEST_FAIL("%s: cannot be opened; run from the repository's root", path);
    }
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = '\0';
    return text;
}

/* ---- published configs ----------------------------------------------------------------------- */

static const struct {
    const char *name;
    int64_t parameters;
    int32_t weights;
} published[] = {
    {"sd15_unet", 859520964, 686},       {"sd21_unet", 865910724, 686},
    {"sdxl_base_unet", 2567463684, 1680}, {"sdxl_refiner_unet", 2259526660, 1220},
    {"sd_vae", 83653863, 248},           {"sdxl_vae", 83653863, 248},
    {"clip_l", 123060480, 196},          {"clip_h", 340387840, 372},
    {"clip_bigg", 694659840, 517},
};

static void
count_parameters(const model *m, int64_t *parameters, int32_t *weights)
{
    *parameters = *weights = 0;
    for (int i = 0; m->cls->entries[i]; i++) {
        ac_graph *g;
        ac_build_args args;
        m->cls->smallest(m->config, m->cls->entries[i], &args);
        CHECK_OK(ac_graph_new(AC_F32, &g));
        m->cls->build(m->config, &args, g);
        CHECK_OK(ac_graph_status(g));
        CHECK_OK(ac_graph_sort(g));
        CHECK_OK(ac_graph_verify(g));
        for (int32_t v = 0; v < g->n_values; v++) {
            if (g->values[v].kind == AC_VALUE_WEIGHT) {
                *parameters += ac_shape_count(&g->values[v].shape);
                ++*weights;
            }
        }
        ac_graph_free(g);
    }
}

static void
published_counts(void)
{
    for (size_t i = 0; i < AC_ARRAY_LEN(published); i++) {
        model m;
        int64_t parameters;
        int32_t weights;
        CHECK_OK(model_parse(&m, read_config(published[i].name)));
        count_parameters(&m, &parameters, &weights);
        CHECK_INT(parameters, published[i].parameters);
        CHECK_INT(weights, published[i].weights);
        model_free(&m);
    }
}

/* Every id that a dumped graph's nodes read is there before. */
static void
check_dumped_graph(const ac_json *graph)
{
    static bool known[1 << 14];
    memset(known, 0, sizeof known);
    const char *const sources[] = {"inputs", "weights"};
    for (int i = 0; i < 2; i++) {
        const ac_json *list = ac_json_get(graph, sources[i]);
        for (size_t k = 0; k < list->length; k++) {
            known[ac_json_get(&list->item[k], "id")->integer] = true;
        }
    }
    const ac_json *nodes = ac_json_get(graph, "nodes");
    CHECK(nodes->length > 10);
    for (size_t n = 0; n < nodes->length; n++) {
        const ac_json *node = &nodes->item[n], *input = ac_json_get(node, "input");
        for (size_t k = 0; k < input->length; k++) {
            CHECK(input->item[k].kind == AC_JSON_NULL || known[input->item[k].integer]);
        }
        CHECK(ac_json_get(node, "attr")->kind == AC_JSON_OBJECT);
        known[ac_json_get(ac_json_get(node, "output"), "id")->integer] = true;
    }
    const ac_json *outputs = ac_json_get(graph, "outputs");
    CHECK(outputs->length > 0 && known[ac_json_get(&outputs->item[0], "id")->integer]);
}

/* The JSON of the plan and of the graph after each pass is JSON, and whole. */
static void
check_explained(ac_model *planned, const ac_build_args *args)
{
    ac_arena arena;
    ac_text text = {0};
    const ac_json *json;
    ac_arena_init(&arena);
    CHECK_OK(ac_model_explain(planned, args, true, true, &text));
    CHECK_OK(ac_json_parse(&arena, text.data, text.length, "explain", &json));
    const ac_json *passes = ac_json_get(json, "passes"), *plan = ac_json_get(json, "plan");
    CHECK(passes->length == 8 && ac_json_get(plan, "steps")->length > 10);
    for (size_t i = 0; i < passes->length; i++) {
        check_dumped_graph(ac_json_get(&passes->item[i], "graph"));
    }
    ac_text_free(&text);
    ac_arena_deinit(&arena);
}

static void
plan_one(const char *name, const ac_build_args *args)
{
    model m;
    ac_model *planned;
    ac_text text = {0};
    CHECK_OK(model_parse(&m, read_config(name)));
    CHECK_OK(ac_model_new(m.json, NULL, "null", "", &planned));
    CHECK_OK(ac_model_explain(planned, args, false, false, &text));
    CHECK(text.length > 1000);
    ac_text_free(&text);
    check_explained(planned, args);
    ac_model_unref(planned);
    model_free(&m);
}

static void
published_plans(void)
{
    static const char *const unets[] = {"sd15_unet", "sd21_unet", "sdxl_base_unet",
                                        "sdxl_refiner_unet"};
    for (size_t i = 0; i < AC_ARRAY_LEN(unets); i++) {
        ac_build_args args = {.entry = "forward", .batch = 2, .height = 64, .width = 64,
                              .tokens = 77, .timesteps = 1};
        plan_one(unets[i], &args);
        args.loop = true;
        args.timesteps = 20;
        plan_one(unets[i], &args);
        args = (ac_build_args){.entry = "forward", .batch = 3, .height = 65, .width = 37,
                               .tokens = 154, .timesteps = 3, .masked = true};
        plan_one(unets[i], &args);
    }
    plan_one("sd_vae", &(ac_build_args){.entry = "encode", .batch = 1, .height = 513,
                                        .width = 512});
    plan_one("sd_vae", &(ac_build_args){.entry = "decode", .batch = 2, .height = 63, .width = 64});
    plan_one("clip_l", &(ac_build_args){.entry = "forward", .batch = 2, .tokens = 77,
                                        .clip_skip = 1});
    plan_one("clip_bigg", &(ac_build_args){.entry = "forward", .batch = 2, .tokens = 40,
                                           .hidden_states = true, .masked = true});
}

/* ---- configs --------------------------------------------------------------------------------- */

static void
refuses(const char *text, ac_status status, const char *part)
{
    model m;
    CHECK_STATUS(model_parse(&m, text), status, part);
    model_free(&m);
}

#define UNET(fields) "{\"_class_name\": \"UNet2DConditionModel\", " fields "}"
#define VAE(fields) "{\"_class_name\": \"AutoencoderKL\", " fields "}"
#define CLIP(fields) "{\"architectures\": [\"CLIPTextModel\"], " fields "}"

static void
configs_that_do_not_fit(void)
{
    refuses("[]", AC_E_UNSUPPORTED, "_class_name");
    refuses("{\"_class_name\": \"FluxTransformer2DModel\"}", AC_E_UNSUPPORTED,
            "found class \"FluxTransformer2DModel\", expected one of UNet2DConditionModel");
    refuses(UNET("\"novelty\": 3"), AC_E_UNSUPPORTED, "novelty: found 3, expected no field");
    refuses(UNET("\"act_fn\": \"mish\""), AC_E_UNSUPPORTED,
            "act_fn: found \"mish\", expected one of \"silu\"");
    refuses(UNET("\"act_fn\": 3"), AC_E_INVALID, "act_fn: found 3");
    refuses(UNET("\"in_channels\": \"4\""), AC_E_INVALID, "in_channels: found \"4\"");
    refuses(UNET("\"in_channels\": 4.5"), AC_E_INVALID, "in_channels: found 4.5");
    refuses(UNET("\"in_channels\": 1e18"), AC_E_INVALID, "from 1 to 16384");
    refuses(UNET("\"in_channels\": null"), AC_E_INVALID, "in_channels: found null");
    refuses(UNET("\"norm_eps\": -1"), AC_E_INVALID, "norm_eps: found -1");
    refuses(UNET("\"class_embed_type\": \"timestep\""), AC_E_UNSUPPORTED,
            "class_embed_type: found \"timestep\", expected null");
    refuses(UNET("\"dual_cross_attention\": true"), AC_E_UNSUPPORTED, "found true, expected false");
    refuses(UNET("\"block_out_channels\": []"), AC_E_INVALID, "block_out_channels: found a list");
    refuses(UNET("\"block_out_channels\": [32, \"x\"]"), AC_E_INVALID, "block_out_channels[1]");
    refuses(UNET("\"down_block_types\": [\"KDownBlock2D\"]"), AC_E_UNSUPPORTED,
            "down_block_types[0]: found \"KDownBlock2D\", expected one of \"DownBlock2D\"");
    refuses(UNET("\"layers_per_block\": [2, 2]"), AC_E_INVALID,
            "layers_per_block: found 2 values, expected 4, one a block");
    refuses(UNET("\"transformer_layers_per_block\": [1, [2, 2], 1, 1]"), AC_E_INVALID,
            "reverse_transformer_layers_per_block: found null");
    refuses(UNET("\"transformer_layers_per_block\": [1, [2], 1, 1]"), AC_E_INVALID,
            "transformer_layers_per_block[1]: found 1 values, expected 2");
    refuses(UNET("\"addition_embed_type\": \"text_time\""), AC_E_INVALID,
            "addition_time_embed_dim");
    refuses(UNET("\"act_fn\": \"mish\", \"novelty\": 3"), AC_E_UNSUPPORTED, "found 2 fields");
    refuses(VAE("\"norm_num_groups\": true"), AC_E_INVALID, "norm_num_groups: found true");
    refuses(VAE("\"up_block_types\": [\"AttnUpDecoderBlock2D\"]"), AC_E_UNSUPPORTED,
            "AttnUpDecoderBlock2D");
    refuses(VAE("\"block_out_channels\": [64, 64]"), AC_E_INVALID, "down_block_types: found 1");
    refuses(CLIP("\"hidden_act\": \"laplace\""), AC_E_UNSUPPORTED, "hidden_act");
    refuses(CLIP("\"num_attention_heads\": 7"), AC_E_INVALID, "hidden_size: found 512");
    refuses(CLIP("\"eos_token_id\": [1, 2]"), AC_E_INVALID, "eos_token_id: found a list of 2");
}

static void
configs_that_fit(void)
{
    model m;
    CHECK_OK(model_parse(&m, UNET("\"_diffusers_version\": \"0.1\", \"dropout\": 0.5, "
                                  "\"sample_size\": [8, 9], \"only_cross_attention\": [true, "
                                  "false, false, true], \"attention_head_dim\": [5, 10, 20, 20], "
                                  "\"transformer_layers_per_block\": [1, [2, 3], 1, 1], "
                                  "\"reverse_transformer_layers_per_block\": [1, 1, [1, 2, 3], "
                                  "0]")));
    model_free(&m);
    CHECK_OK(model_parse(&m, VAE("\"latents_mean\": [1, 2], \"use_quant_conv\": false")));
    model_free(&m);
    CHECK_OK(model_parse(&m, CLIP("\"id2label\": {\"0\": \"a\"}, \"projection_dim\": null")));
    model_free(&m);
}

static void
build_fails(const char *text, const ac_build_args *args, const char *part)
{
    model m;
    ac_graph *g;
    CHECK_OK(model_parse(&m, text));
    CHECK_OK(ac_graph_new(AC_F32, &g));
    m.cls->build(m.config, args, g);
    CHECK_STATUS(ac_graph_status(g), g->status, part);
    CHECK(g->status < 0);
    ac_graph_free(g);
    model_free(&m);
}

static void
sizes_that_do_not_fit(void)
{
    const ac_build_args good = {.entry = "forward", .batch = 2, .height = 8, .width = 8,
                                .tokens = 7, .timesteps = 1};
    ac_build_args args = good;
    args.batch = 0;
    build_fails(UNET("\"dropout\": 0"), &args, "batch: found 0");
    args = good;
    args.height = INT64_MAX;
    build_fails(UNET("\"dropout\": 0"), &args, "height: found");
    args = good;
    args.timesteps = 3;
    build_fails(UNET("\"dropout\": 0"), &args, "timestep: found 3 values, expected 1");
    args = good;
    args.tokens = 78;
    build_fails(CLIP("\"dropout\": 0"), &args, "tokens: found 78, expected 1 to 77");
    args.tokens = 7;
    args.clip_skip = 13;
    build_fails(CLIP("\"dropout\": 0"), &args, "clip_skip: found 13");
    build_fails(VAE("\"act_fn\": \"silu\""), &good, "entry: found \"forward\"");
    args = good;
    args.entry = "decode";
    args.height = 1 << 20;
    args.width = 1 << 20;
    args.batch = 1 << 20;
    build_fails(VAE("\"act_fn\": \"silu\""), &args, "memory can hold");
    build_fails(UNET("\"norm_num_groups\": 7"), &good,
                "down_blocks.0.resnets.0.norm1: group_norm: found 320 channels");
    build_fails(UNET("\"attention_head_dim\": 400"), &good,
                "down_blocks.0.attentions.0: attention_head_dim: found 400 heads for 320");
}

/* ---- weights --------------------------------------------------------------------------------- */

static const char small_vae[] =
    VAE("\"block_out_channels\": [8, 8], \"down_block_types\": [\"DownEncoderBlock2D\", "
        "\"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\", "
        "\"UpDecoderBlock2D\"], \"norm_num_groups\": 4");

/* Puts a tensor of every weight of the class into `weights`; the data is never read. */
static ac_status
fill_weights(const model *m, ac_weights *weights, const char *(*name)(const char *, char *))
{
    static float data[1];
    for (int i = 0; m->cls->entries[i]; i++) {
        ac_graph *g;
        ac_build_args args;
        m->cls->smallest(m->config, m->cls->entries[i], &args);
        AC_TRY(ac_graph_new(AC_F32, &g));
        m->cls->build(m->config, &args, g);
        ac_status status = ac_graph_status(g);
        for (int32_t v = 0; v < g->n_values && !status; v++) {
            if (g->values[v].kind == AC_VALUE_WEIGHT) {
                char buffer[AC_WEIGHT_NAME];
                ac_tensor t = ac_tensor_of(data, AC_F32, g->values[v].shape);
                const char *as = name ? name(g->values[v].name, buffer) : g->values[v].name;
                status = ac_weights_set(weights, as, &t, NULL, NULL);
            }
        }
        ac_graph_free(g);
        AC_TRY(status);
    }
    return AC_OK;
}

static void
set_weight(ac_weights *weights, const char *name, ac_dtype dtype, ac_shape shape)
{
    static float data[1];
    ac_tensor t = ac_tensor_of(data, dtype, shape);
    CHECK_OK(ac_weights_set(weights, name, &t, NULL, NULL));
}

static void
weights_that_do_not_fit(void)
{
    model m;
    ac_weights *weights;
    CHECK_OK(model_parse(&m, small_vae));
    CHECK_OK(ac_weights_new(&weights));
    CHECK_OK(fill_weights(&m, weights, NULL));
    CHECK_OK(ac_model_check_weights(m.cls, m.config, weights));

    set_weight(weights, "stranger", AC_F32, AC_SHAPE(2, 3));
    set_weight(weights, "quant_conv.bias", AC_F32, AC_SHAPE(9));
    set_weight(weights, "quant_conv.weight", AC_I64, AC_SHAPE(8, 8, 1, 1));
    CHECK(ac_weights_rename(weights, "decoder.conv_in.bias", "decoder.conv_in.bias2"));
    const char *parts[] = {"2 of another shape, 1 missing, 2 unknown",
                           "stranger: found [2, 3]",
                           "decoder.conv_in.bias2: found [8]",
                           "quant_conv.bias: found [9], expected [8]",
                           "quant_conv.weight: found int64, expected a float dtype",
                           "decoder.conv_in.bias: found nothing, expected [8]"};
    for (size_t i = 0; i < AC_ARRAY_LEN(parts); i++) {
        CHECK_STATUS(ac_model_check_weights(m.cls, m.config, weights), AC_E_WEIGHTS, parts[i]);
    }
    ac_weights_unref(weights);

    CHECK_OK(ac_weights_new(&weights));
    /* all of them, however many */
    CHECK_STATUS(ac_model_check_weights(m.cls, m.config, weights), AC_E_WEIGHTS, " missing");
    int64_t lines = 0;
    for (const char *c = ac_error_message(); *c; c++) {
        lines += *c == '\n';
    }
    CHECK(lines == atoll(strstr(ac_error_message(), "fit: ") + 5) && lines > 60);
    ac_weights_unref(weights);
    model_free(&m);
}

static const char *
without_prefix(const char *name, char *buffer)
{
    (void)buffer;
    return strncmp(name, "text_model.", 11) == 0 ? name + 11 : name;
}

/* "...mid_block.attentions.0.to_out.0.bias" as files before diffusers 0.14 have it */
static const char *
old_attention(const char *name, char *buffer)
{
    static const char *const names[][2] = {
        {".to_q.", ".query."},
        {".to_k.", ".key."},
        {".to_v.", ".value."},
        {".to_out.0.", ".proj_attn."},
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(names); i++) {
        const char *at = strstr(name, names[i][0]);
        if (at) {
            snprintf(buffer, AC_WEIGHT_NAME, "%.*s%s%s", (int)(at - name), name, names[i][1],
                     at + strlen(names[i][0]));
            return buffer;
        }
    }
    return name;
}

static void
weights_under_other_names(void)
{
    model m;
    ac_weights *weights;
    const char prefix[] = "encoder.mid_block.attentions.0";
    char name[AC_WEIGHT_NAME];
    CHECK_OK(model_parse(&m, small_vae));
    CHECK_OK(ac_weights_new(&weights));
    CHECK_OK(fill_weights(&m, weights, old_attention));
    snprintf(name, sizeof name, "%s.key.weight", prefix);
    CHECK(ac_weights_find(weights, name));
    set_weight(weights, name, AC_F32, AC_SHAPE(8, 8, 1, 1)); /* a convolution, as some have it */
    CHECK_OK(ac_model_check_weights(m.cls, m.config, weights));
    ac_model_weight_name(m.cls, "encoder.mid_block.attentions.0.proj_attn.bias", name);
    CHECK_STRING(name, "encoder.mid_block.attentions.0.to_out.0.bias");
    CHECK(ac_weights_find(weights, name));
    ac_model_weight_name(m.cls, "encoder.conv_in.weight", name);
    CHECK_STRING(name, "encoder.conv_in.weight");
    ac_weights_unref(weights);
    model_free(&m);

    for (int bare = 0; bare < 2; bare++) {
        CHECK_OK(model_parse(&m, CLIP("\"hidden_size\": 8, \"num_hidden_layers\": 2")));
        CHECK_OK(ac_weights_new(&weights));
        CHECK_OK(fill_weights(&m, weights, bare ? without_prefix : NULL));
        set_weight(weights, bare ? "embeddings.position_ids" : "text_model.embeddings.position_ids",
                   AC_I64, AC_SHAPE(1, 77));
        CHECK_INT(ac_weights_find(weights, "encoder.layers.0.mlp.fc1.bias") != NULL, bare);
        CHECK_OK(ac_model_check_weights(m.cls, m.config, weights));
        ac_weights_unref(weights);
        model_free(&m);
    }
}

/* ---- structure ------------------------------------------------------------------------------- */

static const char small_xl[] =
    UNET("\"block_out_channels\": [32, 64], \"down_block_types\": [\"DownBlock2D\", "
         "\"CrossAttnDownBlock2D\"], \"up_block_types\": [\"CrossAttnUpBlock2D\", \"UpBlock2D\"], "
         "\"cross_attention_dim\": 24, \"attention_head_dim\": [2, 4], \"addition_embed_type\": "
         "\"text_time\", \"addition_time_embed_dim\": 8, "
         "\"projection_class_embeddings_input_dim\": 64, \"transformer_layers_per_block\": [1, 2]");

static ac_val
weight_user(const ac_graph *g, const char *name)
{
    ac_val w = ac_map_get(&g->weights, name);
    for (int32_t i = 0; i < g->n_nodes; i++) {
        for (int32_t j = 0; j < g->nodes[i].n_inputs; j++) {
            if (g->nodes[i].input[j] == w) {
                return g->nodes[i].output;
            }
        }
    }
    TEST_FAIL("%s: found no node that uses it", name);
}

static void
rates(void)
{
    static const struct {
        const char *weight;
        ac_rate rate;
    } expected[] = {
        {"add_embedding.linear_1.weight", AC_RATE_PROMPT},
        {"time_embedding.linear_2.weight", AC_RATE_SCHEDULE},
        {"mid_block.resnets.1.time_emb_proj.weight", AC_RATE_SCHEDULE},
        {"mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight", AC_RATE_PROMPT},
        {"mid_block.attentions.0.transformer_blocks.1.attn2.to_q.weight", AC_RATE_STEP},
        {"conv_in.weight", AC_RATE_STEP},
    };
    for (int batch = 1; batch < 4; batch += 2) {
        model m;
        ac_graph *g;
        ac_build_args args = {.entry = "forward", .batch = batch, .height = 9, .width = 6,
                              .tokens = 5, .timesteps = 10, .loop = true, .io_dtype = AC_F16};
        CHECK_OK(model_parse(&m, small_xl));
        CHECK_OK(ac_graph_new(AC_F32, &g));
        m.cls->build(m.config, &args, g);
        CHECK_OK(ac_graph_status(g));
        CHECK_OK(ac_graph_sort(g));
        for (size_t i = 0; i < AC_ARRAY_LEN(expected); i++) {
            CHECK_INT(g->values[weight_user(g, expected[i].weight)].rate, expected[i].rate);
        }
        ac_val shift = weight_user(g, "mid_block.resnets.1.time_emb_proj.weight");
        CHECK(ac_shape_equal(&g->values[shift].shape, &AC_SHAPE(10, batch, 64)));
        ac_val sample = ac_graph_find_output(g, "sample");
        CHECK_INT(g->values[sample].dtype, AC_F32); /* our loop's stay f32 */
        CHECK(ac_shape_equal(&g->values[sample].shape, &AC_SHAPE(batch, 4, 9, 6)));
        ac_graph_free(g);
        model_free(&m);
    }
}

/* Every size builds, and the result is as large as the sample. */
static void
unet_sizes(void)
{
    model m;
    CHECK_OK(model_parse(&m, UNET("\"attention_head_dim\": 4, \"downsample_padding\": 0, "
                                  "\"block_out_channels\": [32, 32, 64, 64]")));
    for (int64_t height = 8; height < 28; height++) {
        for (int64_t width = 8; width < 28; width += 3) {
            ac_graph *g;
            ac_build_args args = {.entry = "forward", .batch = 1, .height = height,
                                  .width = width, .tokens = 3, .timesteps = 1};
            CHECK_OK(ac_graph_new(AC_F32, &g));
            m.cls->build(m.config, &args, g);
            CHECK_OK(ac_graph_status(g));
            ac_val sample = ac_graph_find_output(g, "sample");
            CHECK(ac_shape_equal(&g->values[sample].shape, &AC_SHAPE(1, 4, height, width)));
            ac_graph_free(g);
        }
    }
    model_free(&m);
}

static ac_status
check_scenario(void *context)
{
    model m;
    ac_weights *weights = NULL;
    ac_status status = model_parse(&m, context);
    status = status ? status : ac_weights_new(&weights);
    status = status ? status : fill_weights(&m, weights, NULL);
    status = status ? status : ac_model_check_weights(m.cls, m.config, weights);
    ac_weights_unref(weights);
    model_free(&m);
    return status;
}

static void
out_of_memory(void)
{
    test_oom(check_scenario, (void *)small_vae);
    test_oom(check_scenario, (void *)small_xl);
}

TEST_MAIN(TEST(published_counts), TEST(published_plans), TEST(configs_that_do_not_fit),
          TEST(configs_that_fit), TEST(sizes_that_do_not_fit), TEST(weights_that_do_not_fit),
          TEST(weights_under_other_names), TEST(rates), TEST(unet_sizes), TEST(out_of_memory))
