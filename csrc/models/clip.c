/* clip: CLIPTextModel and CLIPTextModelWithProjection.
 *
 * Reads like transformers' modeling_clip.py.  Both classes share everything but what they return of
 * the pooled state.  Names are those of the published files, "text_model.encoder..."; modules of
 * transformers 5.6 and later leave the prefix out of CLIPTextModel.
 */
#include "blocks.h"
#include "config.h"
#include "models.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct clip_config {
    int32_t vocab_size, hidden_size, intermediate_size, projection_dim;
    int32_t num_hidden_layers, num_attention_heads, max_position_embeddings;
    int32_t hidden_act;
    float layer_norm_eps;
    int32_t eos_token_id;
    bool projected; /* CLIPTextModelWithProjection */
} clip_config;

/* ---- config ---------------------------------------------------------------------------------- */

static const ac_choice activations[] = {{"quick_gelu", AC_ACT_QUICK_GELU},
                                        {"gelu", AC_ACT_GELU},
                                        {"gelu_new", AC_ACT_GELU_TANH},
                                        {"gelu_pytorch_tanh", AC_ACT_GELU_TANH},
                                        {"silu", AC_ACT_SILU},
                                        {"swish", AC_ACT_SILU},
                                        {"relu", AC_ACT_RELU},
                                        {NULL, 0}};

#define NAME(member) .name = #member, .offset = offsetof(clip_config, member)

static const ac_field fields[] = {
    {NAME(vocab_size), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_EXTENT},
    {NAME(hidden_size), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(intermediate_size), .kind = AC_FIELD_INT, .low = 1, .high = 8 * AC_MAX_CHANNELS},
    {NAME(projection_dim), .kind = AC_FIELD_INT, .nullable = true, .low = 1,
     .high = AC_MAX_CHANNELS},
    {NAME(num_hidden_layers), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_LAYERS},
    {NAME(num_attention_heads), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(max_position_embeddings), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_EXTENT},
    {NAME(hidden_act), .kind = AC_FIELD_CHOICE, .choices = activations},
    {NAME(layer_norm_eps), .kind = AC_FIELD_FLOAT, .low = 0, .high = 1},
    {NAME(eos_token_id), .kind = AC_FIELD_INT, .low = 0, .high = INT32_MAX},
    {"model_type", .kind = AC_FIELD_ONLY, .only = "\"clip_text_model\" \"clip\""},
    {"is_decoder", .kind = AC_FIELD_ONLY, .only = "false"},
    {"is_encoder_decoder", .kind = AC_FIELD_ONLY, .only = "false"},
    {"add_cross_attention", .kind = AC_FIELD_ONLY, .only = "false"},
    {"chunk_size_feed_forward", .kind = AC_FIELD_ONLY, .only = "0"},
    {"pruned_heads", .kind = AC_FIELD_IGNORED}, /* transformers 5 knows it no more */
    {"architectures", .kind = AC_FIELD_IGNORED},
    {"attention_dropout", .kind = AC_FIELD_IGNORED},
    {"dropout", .kind = AC_FIELD_IGNORED},
    {"initializer_factor", .kind = AC_FIELD_IGNORED},
    {"initializer_range", .kind = AC_FIELD_IGNORED},
    {"bos_token_id", .kind = AC_FIELD_IGNORED},
    {"pad_token_id", .kind = AC_FIELD_IGNORED},
    {"transformers_version", .kind = AC_FIELD_IGNORED},
    {"torch_dtype", .kind = AC_FIELD_IGNORED},
    {"dtype", .kind = AC_FIELD_IGNORED},
    {"return_dict", .kind = AC_FIELD_IGNORED},
    {"output_hidden_states", .kind = AC_FIELD_IGNORED},
    {"output_attentions", .kind = AC_FIELD_IGNORED},
    {"use_cache", .kind = AC_FIELD_IGNORED},
    {"tie_word_embeddings", .kind = AC_FIELD_IGNORED},
    {"torchscript", .kind = AC_FIELD_IGNORED},
    {"id2label", .kind = AC_FIELD_IGNORED},
    {"label2id", .kind = AC_FIELD_IGNORED},
    {"problem_type", .kind = AC_FIELD_IGNORED},
    {"finetuning_task", .kind = AC_FIELD_IGNORED},
};

static const clip_config defaults = {
    .vocab_size = 49408,
    .hidden_size = 512,
    .intermediate_size = 2048,
    .projection_dim = 512,
    .num_hidden_layers = 12,
    .num_attention_heads = 8,
    .max_position_embeddings = 77,
    .hidden_act = AC_ACT_QUICK_GELU,
    .layer_norm_eps = 1e-5f,
    .eos_token_id = 49407,
};

static ac_status
parse_as(const ac_json *json, const char *class_name, bool projected, clip_config *c)
{
    *c = defaults;
    c->projected = projected;
    AC_TRY(ac_config_read(json, class_name, fields, AC_ARRAY_LEN(fields), c));
    if (c->hidden_size % c->num_attention_heads) {
        return ac_error(AC_E_INVALID, "%s config: hidden_size: found %d, expected a multiple of "
                                      "num_attention_heads, %d", class_name, c->hidden_size,
                        c->num_attention_heads);
    }
    if (projected && !c->projection_dim) {
        return ac_error(AC_E_INVALID, "%s config: projection_dim: found null, expected a number",
                        class_name);
    }
    return AC_OK;
}

static ac_status
parse_text(const ac_json *json, void *config)
{
    return parse_as(json, "CLIPTextModel", false, config);
}

static ac_status
parse_projected(const ac_json *json, void *config)
{
    return parse_as(json, "CLIPTextModelWithProjection", true, config);
}

/* ---- graph ----------------------------------------------------------------------------------- */

/* token_embedding[ids] + position_embedding[0 .. tokens): [b, tokens, c] */
static ac_val
embeddings(ac_graph *g, const clip_config *c, const ac_build_args *args, ac_val ids)
{
    int64_t b = args->batch, tokens = args->tokens, width = c->hidden_size;
    ac_push(g, "embeddings");
    ac_val table = ac_weight(g, "token_embedding.weight", AC_SHAPE(c->vocab_size, width));
    ac_val positions = ac_weight(g, "position_embedding.weight",
                                 AC_SHAPE(c->max_position_embeddings, width));
    ac_name(g, "token_embedding");
    ac_val x = ac_embed(g, ids, table);
    /* ADD broadcasts one row over all: a text is one row of tokens*c. */
    positions = ac_slice(g, positions, 0, 0, tokens);
    positions = ac_reshape(g, positions, AC_SHAPE(1, tokens * width));
    x = ac_reshape(g, x, AC_SHAPE(b, tokens * width));
    ac_name(g, "position_embedding");
    x = ac_add(g, x, positions);
    x = ac_reshape(g, x, AC_SHAPE(b, tokens, width));
    ac_pop(g);
    return x;
}

/* layer_norm1 -> causal attention -> +; layer_norm2 -> fc1 -> act -> fc2 -> + */
static ac_val
encoder_layer(ac_graph *g, const clip_config *c, ac_val x, ac_val mask)
{
    int64_t width = c->hidden_size;
    double head = (double)(width / c->num_attention_heads);
    ac_attention_attr attr = {.heads = c->num_attention_heads, .scale = (float)(1.0 / sqrt(head)),
                              .causal = true};

    ac_val h = ac_layer_layer_norm(g, "layer_norm1", x, c->layer_norm_eps);
    ac_push(g, "self_attn");
    ac_val q = ac_layer_linear(g, "q_proj", h, width, true);
    ac_val k = ac_layer_linear(g, "k_proj", h, width, true);
    ac_val v = ac_layer_linear(g, "v_proj", h, width, true);
    h = ac_attention(g, q, k, v, mask, attr);
    h = ac_layer_linear(g, "out_proj", h, width, true);
    ac_pop(g);
    x = ac_add(g, x, h);

    h = ac_layer_layer_norm(g, "layer_norm2", x, c->layer_norm_eps);
    ac_push(g, "mlp");
    h = ac_layer_linear(g, "fc1", h, c->intermediate_size, true);
    ac_name(g, "activation_fn");
    h = ac_activation(g, h, c->hidden_act);
    h = ac_layer_linear(g, "fc2", h, width, true);
    ac_pop(g);
    return ac_add(g, x, h);
}

static void
output(ac_graph *g, const ac_build_args *args, ac_val x, const char *name)
{
    ac_output(g, ac_cast(g, x, args->io_dtype), name);
}

static void
output_hidden_state(ac_graph *g, const ac_build_args *args, ac_val x, int32_t index)
{
    char name[32];
    snprintf(name, sizeof name, "hidden_states.%d", index);
    output(g, args, x, name);
}

static void
check_args(const clip_config *c, const ac_build_args *args, ac_graph *g)
{
    ac_check_extent(g, "batch", args->batch, AC_MAX_EXTENT);
    ac_check_extent(g, "input_ids, tokens", args->tokens, c->max_position_embeddings);
    if (args->clip_skip < 0 || args->clip_skip > c->num_hidden_layers) {
        ac_graph_fail(g, AC_E_INVALID, "clip_skip: found %d, expected 0 to %d, the layers",
                      args->clip_skip, c->num_hidden_layers);
    }
}

static void
build(const void *config, const ac_build_args *args, ac_graph *g)
{
    const clip_config *c = config;
    int64_t b = args->batch, tokens = args->tokens;
    int32_t skipped_at = c->num_hidden_layers - args->clip_skip;
    bool whole = !args->clip_skip || args->hidden_states;
    check_args(c, args, g);

    ac_val ids = ac_input(g, "input_ids", AC_I64, AC_SHAPE(b, tokens), AC_RATE_PROMPT);
    ac_val mask = args->masked ? ac_input(g, "attention_mask", AC_F32, AC_SHAPE(b, tokens),
                                          AC_RATE_PROMPT)
                               : AC_NONE;
    ac_push(g, "text_model");
    ac_val x = embeddings(g, c, args, ids), skipped = x;
    for (int32_t i = 0; i < (whole ? c->num_hidden_layers : skipped_at); i++) {
        if (args->hidden_states) {
            output_hidden_state(g, args, x, i);
        }
        ac_push(g, "encoder.layers.%d", i);
        x = encoder_layer(g, c, x, mask);
        ac_pop(g);
        skipped = i + 1 == skipped_at ? x : skipped;
    }
    if (args->hidden_states) {
        output_hidden_state(g, args, x, c->num_hidden_layers);
    }
    if (args->clip_skip) {
        skipped = ac_layer_layer_norm(g, "final_layer_norm", skipped, c->layer_norm_eps);
        output(g, args, skipped, "clip_skip");
    }
    if (whole) {
        x = ac_layer_layer_norm(g, "final_layer_norm", x, c->layer_norm_eps);
    }
    ac_pop(g);
    if (!whole) {
        return;
    }
    output(g, args, x, "last_hidden_state");
    ac_val pooled = ac_eos_pool(g, x, ids, c->eos_token_id);
    if (c->projected) {
        pooled = ac_layer_linear(g, "text_projection", pooled, c->projection_dim, false);
    }
    output(g, args, pooled, c->projected ? "text_embeds" : "pooler_output");
}

static void
smallest(const void *config, const char *entry, ac_build_args *args)
{
    (void)config;
    *args = (ac_build_args){.entry = entry, .batch = 1, .tokens = 1};
}

/* ---- names ----------------------------------------------------------------------------------- */

static bool
weight_name(const char *found, char *out, size_t size)
{
    static const char *const bare[] = {"embeddings.", "encoder.", "final_layer_norm."};
    for (size_t i = 0; i < AC_ARRAY_LEN(bare); i++) {
        if (strncmp(found, bare[i], strlen(bare[i])) == 0) {
            int length = snprintf(out, size, "text_model.%s", found);
            return length > 0 && (size_t)length < size;
        }
    }
    return false;
}

/* A constant 0, 1, 2 ... that old files carry along. */
static bool
ignores(const void *config, const char *weight)
{
    (void)config;
    return strcmp(weight, "text_model.embeddings.position_ids") == 0;
}

static const char *const entries[] = {"forward", NULL};

extern const ac_model_class ac_model_clip_text, ac_model_clip_text_projected;
const ac_model_class ac_model_clip_text = {
    .name = "CLIPTextModel",
    .config_size = sizeof(clip_config),
    .parse = parse_text,
    .entries = entries,
    .smallest = smallest,
    .build = build,
    .weight_name = weight_name,
    .ignores = ignores,
};
const ac_model_class ac_model_clip_text_projected = {
    .name = "CLIPTextModelWithProjection",
    .config_size = sizeof(clip_config),
    .parse = parse_projected,
    .entries = entries,
    .smallest = smallest,
    .build = build,
    .weight_name = weight_name,
    .ignores = ignores,
};
