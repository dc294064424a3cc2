/* unet: UNet2DConditionModel, as SD 1.x, 2.x, SDXL and its refiner use it.
 *
 * Reads like diffusers' unet_2d_condition.py and unet_2d_blocks.py: time, conv_in, down, mid, up,
 * out.  Fields that the supported blocks of diffusers never see (resnet_out_scale_factor,
 * cross_attention_norm ...) are accepted, because there too they change nothing.
 */
#include "blocks.h"
#include "config.h"
#include "models.h"

#include <string.h>

enum { BLOCK_PLAIN, BLOCK_CROSS };
enum { MID_NONE, MID_PLAIN, MID_CROSS };
enum { ADD_NONE, ADD_TEXT_TIME };
enum { HID_NONE, HID_TEXT };

/* Transformer layers of each block: one number for the whole block, or one for each attention. */
typedef struct block_layers {
    int32_t count; /* blocks given; 0: `all` holds for every block */
    int32_t all;
    struct {
        int32_t count; /* 0: `all` */
        int32_t all, value[AC_MAX_BLOCK_LAYERS + 1];
    } block[AC_MAX_BLOCKS];
} block_layers;

typedef struct unet_config {
    int32_t in_channels, out_channels;
    bool center_input_sample, flip_sin_to_cos;
    float freq_shift;
    int32_t n_blocks; /* length of block_out_channels */
    ac_per_block down_block_types, up_block_types, block_out_channels;
    int32_t mid_block_type;
    ac_per_block only_cross_attention, layers_per_block, cross_attention_dim;
    ac_per_block attention_head_dim; /* the number of heads, in spite of its name */
    block_layers transformer_layers_per_block, reverse_transformer_layers_per_block;
    int32_t downsample_padding;
    float mid_block_scale_factor;
    int32_t act_fn, norm_num_groups;
    float norm_eps;
    int32_t encoder_hid_dim, encoder_hid_dim_type; /* 0: none */
    bool use_linear_projection;
    int32_t addition_embed_type, addition_time_embed_dim, projection_class_embeddings_input_dim;
    int32_t time_embedding_dim; /* 0: four times the first block's channels */
    int32_t time_embedding_act_fn, timestep_post_act;
    int32_t conv_in_kernel, conv_out_kernel;
} unet_config;

/* ---- config ---------------------------------------------------------------------------------- */

static const ac_choice down_types[] = {
    {"DownBlock2D", BLOCK_PLAIN}, {"CrossAttnDownBlock2D", BLOCK_CROSS}, {NULL, 0}};
static const ac_choice up_types[] = {
    {"UpBlock2D", BLOCK_PLAIN}, {"CrossAttnUpBlock2D", BLOCK_CROSS}, {NULL, 0}};
static const ac_choice mid_types[] = {
    {"UNetMidBlock2DCrossAttn", MID_CROSS}, {"UNetMidBlock2D", MID_PLAIN}, {NULL, 0}};
static const ac_choice addition_types[] = {{"text_time", ADD_TEXT_TIME}, {NULL, 0}};
static const ac_choice hid_types[] = {{"text_proj", HID_TEXT}, {NULL, 0}};

static ac_status
read_block_layers(const ac_json *value, const char *name, void *field)
{
    block_layers *out = field;
    if (value->kind != AC_JSON_ARRAY) {
        return ac_config_int(value, name, 0, AC_MAX_LAYERS, &out->all);
    }
    if (value->length < 1 || value->length > AC_MAX_BLOCKS) {
        return ac_error(AC_E_INVALID, "%s: found a list of %zu, expected 1 to %d values", name,
                        value->length, AC_MAX_BLOCKS);
    }
    out->count = (int32_t)value->length;
    for (int32_t i = 0; i < out->count; i++) {
        const ac_json *item = &value->item[i];
        if (item->kind != AC_JSON_ARRAY) {
            out->block[i].count = 0;
            AC_TRY(ac_config_int(item, name, 0, AC_MAX_LAYERS, &out->block[i].all));
            continue;
        }
        if (item->length < 1 || item->length > AC_MAX_BLOCK_LAYERS + 1) {
            return ac_error(AC_E_INVALID, "%s[%d]: found a list of %zu, expected 1 to %d values",
                            name, i, item->length, AC_MAX_BLOCK_LAYERS + 1);
        }
        out->block[i].count = (int32_t)item->length;
        for (int32_t j = 0; j < out->block[i].count; j++) {
            AC_TRY(ac_config_int(&item->item[j], name, 0, AC_MAX_LAYERS, &out->block[i].value[j]));
        }
    }
    return AC_OK;
}

static ac_status
read_block_layers_list(const ac_json *value, const char *name, void *field)
{
    return value->kind == AC_JSON_ARRAY
               ? read_block_layers(value, name, field)
               : ac_error(AC_E_INVALID, "%s: found one value, expected null or a list", name);
}

#define AT(member) .offset = offsetof(unet_config, member)
#define NAME(member) .name = #member, AT(member)

static const ac_field fields[] = {
    {NAME(in_channels), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(out_channels), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(center_input_sample), .kind = AC_FIELD_BOOL},
    {NAME(flip_sin_to_cos), .kind = AC_FIELD_BOOL},
    {NAME(freq_shift), .kind = AC_FIELD_FLOAT, .low = -1e4, .high = 1e4},
    {NAME(down_block_types), .kind = AC_FIELD_CHOICES, .choices = down_types},
    {NAME(mid_block_type), .kind = AC_FIELD_CHOICE, .nullable = true, .choices = mid_types},
    {NAME(up_block_types), .kind = AC_FIELD_CHOICES, .choices = up_types},
    {NAME(only_cross_attention), .kind = AC_FIELD_FLAGS},
    {NAME(block_out_channels), .kind = AC_FIELD_LIST, .low = 2, .high = AC_MAX_CHANNELS},
    {NAME(layers_per_block), .kind = AC_FIELD_BLOCKS, .low = 1, .high = AC_MAX_BLOCK_LAYERS},
    {NAME(downsample_padding), .kind = AC_FIELD_INT, .low = 0, .high = 16},
    {NAME(mid_block_scale_factor), .kind = AC_FIELD_FLOAT, .low = 1e-6, .high = 1e6},
    {NAME(act_fn), .kind = AC_FIELD_CHOICE, .choices = ac_config_activations},
    {NAME(norm_num_groups), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(norm_eps), .kind = AC_FIELD_FLOAT, .low = 0, .high = 1},
    {NAME(cross_attention_dim), .kind = AC_FIELD_BLOCKS, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(transformer_layers_per_block), .kind = AC_FIELD_READ, .read = read_block_layers},
    {NAME(reverse_transformer_layers_per_block), .kind = AC_FIELD_READ, .nullable = true,
     .read = read_block_layers_list},
    {NAME(encoder_hid_dim), .kind = AC_FIELD_INT, .nullable = true, .low = 1,
     .high = AC_MAX_CHANNELS},
    {NAME(encoder_hid_dim_type), .kind = AC_FIELD_CHOICE, .nullable = true, .choices = hid_types},
    {NAME(attention_head_dim), .kind = AC_FIELD_BLOCKS, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(use_linear_projection), .kind = AC_FIELD_BOOL},
    {NAME(addition_embed_type), .kind = AC_FIELD_CHOICE, .nullable = true,
     .choices = addition_types},
    {NAME(addition_time_embed_dim), .kind = AC_FIELD_INT, .nullable = true, .low = 2,
     .high = AC_MAX_CHANNELS},
    {NAME(projection_class_embeddings_input_dim), .kind = AC_FIELD_INT, .nullable = true,
     .low = 1, .high = 16 * AC_MAX_CHANNELS},
    {NAME(time_embedding_dim), .kind = AC_FIELD_INT, .nullable = true, .low = 1,
     .high = 4 * AC_MAX_CHANNELS},
    {NAME(time_embedding_act_fn), .kind = AC_FIELD_CHOICE, .nullable = true,
     .choices = ac_config_activations},
    {NAME(timestep_post_act), .kind = AC_FIELD_CHOICE, .nullable = true,
     .choices = ac_config_activations},
    {NAME(conv_in_kernel), .kind = AC_FIELD_INT, .low = 1, .high = 31},
    {NAME(conv_out_kernel), .kind = AC_FIELD_INT, .low = 1, .high = 31},
    {"num_attention_heads", .kind = AC_FIELD_ONLY, .only = "null"},
    {"dual_cross_attention", .kind = AC_FIELD_ONLY, .only = "false"},
    {"class_embed_type", .kind = AC_FIELD_ONLY, .only = "null"},
    {"num_class_embeds", .kind = AC_FIELD_ONLY, .only = "null"},
    {"class_embeddings_concat", .kind = AC_FIELD_ONLY, .only = "false"},
    {"resnet_time_scale_shift", .kind = AC_FIELD_ONLY, .only = "\"default\""},
    {"time_embedding_type", .kind = AC_FIELD_ONLY, .only = "\"positional\""},
    {"time_cond_proj_dim", .kind = AC_FIELD_ONLY, .only = "null"},
    {"attention_type", .kind = AC_FIELD_ONLY, .only = "\"default\""},
    {"sample_size", .kind = AC_FIELD_IGNORED},
    {"dropout", .kind = AC_FIELD_IGNORED},
    {"upcast_attention", .kind = AC_FIELD_IGNORED}, /* scores are always computed in f32 */
    {"resnet_skip_time_act", .kind = AC_FIELD_IGNORED},
    {"resnet_out_scale_factor", .kind = AC_FIELD_IGNORED},
    {"mid_block_only_cross_attention", .kind = AC_FIELD_IGNORED},
    {"cross_attention_norm", .kind = AC_FIELD_IGNORED},
    {"addition_embed_type_num_heads", .kind = AC_FIELD_IGNORED},
};

static const unet_config defaults = {
    .in_channels = 4,
    .out_channels = 4,
    .flip_sin_to_cos = true,
    .down_block_types = {.count = 4, .value = {BLOCK_CROSS, BLOCK_CROSS, BLOCK_CROSS}},
    .mid_block_type = MID_CROSS,
    .up_block_types = {.count = 4, .value = {BLOCK_PLAIN, BLOCK_CROSS, BLOCK_CROSS, BLOCK_CROSS}},
    .block_out_channels = {.count = 4, .value = {320, 640, 1280, 1280}},
    .only_cross_attention = {.scalar = true, .count = 1, .value = {false}},
    .layers_per_block = {.scalar = true, .count = 1, .value = {2}},
    .cross_attention_dim = {.scalar = true, .count = 1, .value = {1280}},
    .attention_head_dim = {.scalar = true, .count = 1, .value = {8}},
    .transformer_layers_per_block = {.all = 1},
    .downsample_padding = 1,
    .mid_block_scale_factor = 1.0f,
    .act_fn = AC_ACT_SILU,
    .norm_num_groups = 32,
    .norm_eps = 1e-5f,
    .conv_in_kernel = 3,
    .conv_out_kernel = 3,
};

/* Transformer layers of attention `layer` in block `block`. */
static int32_t
layers_at(const block_layers *layers, int32_t block, int32_t layer)
{
    if (!layers->count) {
        return layers->all;
    }
    return layers->block[block].count ? layers->block[block].value[layer]
                                      : layers->block[block].all;
}

/* Whether a list has a value for each block, and nested lists one for each attention. */
static ac_status
check_layers(const block_layers *layers, const char *name, const unet_config *c, bool up)
{
    if (layers->count && layers->count != c->n_blocks) {
        return ac_error(AC_E_INVALID, "%s: found %d values, expected %d, one a block", name,
                        layers->count, c->n_blocks);
    }
    for (int32_t i = 0; i < layers->count; i++) {
        int32_t from = up ? c->n_blocks - 1 - i : i;
        int32_t wanted = c->layers_per_block.value[from] + (up ? 1 : 0);
        int32_t found = layers->block[i].count;
        if (found && found < wanted) {
            return ac_error(AC_E_INVALID, "%s[%d]: found %d values, expected %d, one a layer",
                            name, i, found, wanted);
        }
    }
    return AC_OK;
}

static ac_status
check_transformer_layers(const unet_config *c)
{
    const block_layers *down = &c->transformer_layers_per_block;
    const block_layers *up = &c->reverse_transformer_layers_per_block;
    AC_TRY(check_layers(down, "transformer_layers_per_block", c, false));
    AC_TRY(check_layers(up, "reverse_transformer_layers_per_block", c, true));
    for (int32_t i = 0; i < down->count; i++) {
        if (down->block[i].count && !up->count) {
            return ac_error(AC_E_INVALID, "reverse_transformer_layers_per_block: found null, "
                                          "expected a list, since transformer_layers_per_block "
                                          "holds lists");
        }
    }
    return AC_OK;
}

/* One text goes to all blocks, so those that attend to it must agree on its width. */
static ac_status
check_cross_attention_dim(const unet_config *c)
{
    const int32_t *dims = c->cross_attention_dim.value;
    for (int32_t i = 1; i < c->n_blocks; i++) {
        if (dims[i] != dims[0]) {
            return ac_error(AC_E_UNSUPPORTED, "cross_attention_dim: found %d and %d, expected the "
                                              "same in all blocks", dims[0], dims[i]);
        }
    }
    return AC_OK;
}

static ac_status
check_addition(const unet_config *c)
{
    if (c->addition_embed_type == ADD_NONE) {
        return AC_OK;
    }
    if (!c->addition_time_embed_dim || !c->projection_class_embeddings_input_dim) {
        return ac_error(AC_E_INVALID, "addition_embed_type: found \"text_time\", expected "
                                      "addition_time_embed_dim and "
                                      "projection_class_embeddings_input_dim with it");
    }
    if (c->projection_class_embeddings_input_dim <= c->addition_time_embed_dim) {
        return ac_error(AC_E_INVALID, "projection_class_embeddings_input_dim: found %d, expected "
                                      "more than addition_time_embed_dim, %d",
                        c->projection_class_embeddings_input_dim, c->addition_time_embed_dim);
    }
    if ((float)(c->addition_time_embed_dim / 2) == c->freq_shift) {
        return ac_error(AC_E_INVALID, "addition_time_embed_dim: found %d, twice freq_shift, "
                                      "which divides by zero", c->addition_time_embed_dim);
    }
    return AC_OK;
}

static ac_status
spread_and_check(unet_config *c)
{
    int32_t n = c->n_blocks = c->block_out_channels.count;
    AC_TRY(ac_config_per_block(&c->down_block_types, "down_block_types", n));
    AC_TRY(ac_config_per_block(&c->up_block_types, "up_block_types", n));
    AC_TRY(ac_config_per_block(&c->only_cross_attention, "only_cross_attention", n));
    AC_TRY(ac_config_per_block(&c->layers_per_block, "layers_per_block", n));
    AC_TRY(ac_config_per_block(&c->cross_attention_dim, "cross_attention_dim", n));
    AC_TRY(ac_config_per_block(&c->attention_head_dim, "attention_head_dim", n));
    AC_TRY(check_transformer_layers(c));
    AC_TRY(check_cross_attention_dim(c));
    AC_TRY(check_addition(c));
    if ((float)(c->block_out_channels.value[0] / 2) == c->freq_shift) {
        return ac_error(AC_E_INVALID, "freq_shift: found %g, half of the first block's channels, "
                                      "which divides by zero", (double)c->freq_shift);
    }
    if (c->encoder_hid_dim_type != HID_NONE && !c->encoder_hid_dim) {
        return ac_error(AC_E_INVALID, "encoder_hid_dim: found null, expected a number with "
                                      "encoder_hid_dim_type \"text_proj\"");
    }
    return AC_OK;
}

static ac_status
parse(const ac_json *json, void *config)
{
    unet_config *c = config;
    *c = defaults;
    AC_TRY(ac_config_read(json, "UNet2DConditionModel", fields, AC_ARRAY_LEN(fields), c));
    ac_status status = spread_and_check(c);
    return status < 0 ? ac_error_prefix(status, "UNet2DConditionModel config") : AC_OK;
}

/* ---- graph ----------------------------------------------------------------------------------- */

#define MAX_SKIPS (AC_MAX_BLOCKS * (AC_MAX_BLOCK_LAYERS + 1) + 1)

typedef struct builder {
    ac_graph *g;
    const unet_config *c;
    const ac_build_args *args;
    ac_time time;
    ac_val context, mask; /* text, and what is added to its scores */
    ac_val skip[MAX_SKIPS];
    int32_t n_skips;
    bool forward_size; /* diffusers' forward_upsample_size */
} builder;

/* Columns of time_ids: see ac_build_args. */
static int64_t
time_ids(const unet_config *c, const ac_build_args *args)
{
    int64_t width = c->projection_class_embeddings_input_dim, each = c->addition_time_embed_dim;
    return args->time_ids ? args->time_ids : width - 5 * each == 1280 ? 5 : 6;
}

/* text_embeds and the sinusoids of time_ids, side by side, through an MLP: [b, n] */
static ac_val
addition_embedding(builder *u, int64_t n)
{
    ac_graph *g = u->g;
    const unet_config *c = u->c;
    int64_t b = u->args->batch, ids = time_ids(c, u->args), each = c->addition_time_embed_dim;
    int64_t width = c->projection_class_embeddings_input_dim, most = (width - 1) / each;
    if (ids < 1 || ids > most) {
        ac_graph_fail(g, AC_E_SHAPE, "time_ids: found %lld columns, expected 1 to %lld, so that "
                                     "some of the embedding's %lld are left for text_embeds",
                      (long long)ids, (long long)most, (long long)width);
        return AC_NONE;
    }
    int64_t text = width - ids * each;
    ac_val embeds = ac_input(g, "text_embeds", u->args->io_dtype, AC_SHAPE(b, text),
                             AC_RATE_PROMPT);
    /* f32 whatever io is: the sinusoid is computed there, and f16 cannot hold every size. */
    ac_val t = ac_input(g, "time_ids", AC_F32, AC_SHAPE(b, ids), AC_RATE_PROMPT);
    t = ac_reshape(g, t, AC_SHAPE(b * ids));
    ac_name(g, "add_time_proj");
    t = ac_timestep(g, t, (ac_timestep_attr){.channels = c->addition_time_embed_dim,
                                             .flip_sin_to_cos = c->flip_sin_to_cos,
                                             .freq_shift = c->freq_shift});
    t = ac_reshape(g, t, AC_SHAPE(b, ids * each));
    ac_val both = ac_concat(g, (ac_val[]){ac_cast(g, embeds, g->dtype), t}, 2, 1);
    return ac_layer_time_mlp(g, "add_embedding", both, n, AC_ACT_SILU, AC_ACT_NONE);
}

/* Sum of emb [steps, c] and aug [b, c] for every pair: [steps, b, c].  ADD broadcasts its second
 * operand over what lies between or, with one row, over all rows: so emb is repeated b times and
 * both are seen as rows of b*c. */
static ac_val
add_every_pair(ac_graph *g, ac_val emb, ac_val aug)
{
    int64_t steps = ac_dim(g, emb, 0), b = ac_dim(g, aug, 0), c = ac_dim(g, emb, 1);
    ac_val *copies = ac_arena_alloc(&g->arena, (size_t)b * sizeof *copies);
    if (!copies) {
        ac_graph_fail(g, AC_E_MEMORY, "time embedding: out of memory");
        return AC_NONE;
    }
    for (int64_t i = 0; i < b; i++) {
        copies[i] = emb;
    }
    if (b > 1) {
        emb = ac_concat(g, copies, (int32_t)b, 1);
    }
    emb = ac_add(g, emb, ac_reshape(g, aug, AC_SHAPE(1, b * c)));
    return ac_reshape(g, emb, AC_SHAPE(steps, b, c));
}

/* time_proj -> time_embedding -> + add_embedding -> activation of the resnets */
static ac_time
time_embedding(builder *u)
{
    ac_graph *g = u->g;
    const unet_config *c = u->c;
    const ac_build_args *args = u->args;
    int32_t channels = c->block_out_channels.value[0];
    int64_t n = c->time_embedding_dim ? c->time_embedding_dim : 4 * (int64_t)channels;
    int64_t rows = args->timesteps;
    if (!args->loop && rows != 1 && rows != args->batch) {
        ac_graph_fail(g, AC_E_SHAPE, "timestep: found %lld values, expected 1 or one an image, "
                                     "%lld", (long long)rows, (long long)args->batch);
    }
    ac_val t = ac_input(g, "timestep", AC_F32, AC_SHAPE(rows), AC_RATE_SCHEDULE);
    ac_val step = args->loop ? ac_input(g, "step", AC_I32, AC_SHAPE(1), AC_RATE_STEP) : AC_NONE;
    ac_name(g, "time_proj");
    ac_val emb = ac_timestep(g, t, (ac_timestep_attr){.channels = channels,
                                                      .flip_sin_to_cos = c->flip_sin_to_cos,
                                                      .freq_shift = c->freq_shift});
    emb = ac_layer_time_mlp(g, "time_embedding", emb, n, c->act_fn, c->timestep_post_act);
    if (c->addition_embed_type == ADD_TEXT_TIME) {
        ac_val aug = addition_embedding(u, n);
        emb = args->loop               ? add_every_pair(g, emb, aug)
              : rows < args->batch ? ac_add(g, aug, emb)
                                       : ac_add(g, emb, aug);
    } else if (args->loop) {
        emb = ac_reshape(g, emb, AC_SHAPE(rows, 1, n));
    }
    emb = ac_activation(g, emb, c->time_embedding_act_fn);
    return (ac_time){.embedding = ac_activation(g, emb, c->act_fn), .step = step};
}

/* encoder_hidden_states, through encoder_hid_proj where there is one, and its mask */
static void
text(builder *u)
{
    ac_graph *g = u->g;
    const ac_build_args *args = u->args;
    int64_t width = u->c->cross_attention_dim.value[0], hid = u->c->encoder_hid_dim;
    ac_shape shape = AC_SHAPE(args->batch, args->tokens, hid ? hid : width);
    u->context = ac_input(g, "encoder_hidden_states", args->io_dtype, shape, AC_RATE_PROMPT);
    u->context = ac_cast(g, u->context, g->dtype);
    if (hid) {
        u->context = ac_layer_linear(g, "encoder_hid_proj", u->context, width, true);
    }
    u->mask = args->masked ? ac_input(g, "encoder_attention_mask", AC_F32,
                                      AC_SHAPE(args->batch, args->tokens), AC_RATE_PROMPT)
                           : AC_NONE;
}

static ac_val
resnet(builder *u, ac_val x, int32_t index, int64_t channels, float scale)
{
    ac_resnet_args args = {.channels = channels, .groups = u->c->norm_num_groups,
                           .eps = u->c->norm_eps, .act = u->c->act_fn, .scale = scale};
    ac_push(u->g, "resnets.%d", index);
    x = ac_block_resnet(u->g, x, u->time, &args);
    ac_pop(u->g);
    return x;
}

static ac_val
attention(builder *u, ac_val x, int32_t index, int32_t heads, int32_t layers, bool only_cross)
{
    ac_transformer_args args = {.heads = heads, .layers = layers, .groups = u->c->norm_num_groups,
                                .linear_projection = u->c->use_linear_projection,
                                .only_cross = only_cross, .context = u->context, .mask = u->mask};
    ac_push(u->g, "attentions.%d", index);
    x = ac_block_transformer(u->g, x, &args);
    ac_pop(u->g);
    return x;
}

static void
push_skip(builder *u, ac_val x)
{
    u->skip[u->n_skips++] = x;
}

/* (resnet -> attention) x layers -> downsample; each result is a skip */
static ac_val
down_block(builder *u, ac_val x, int32_t i)
{
    const unet_config *c = u->c;
    ac_push(u->g, "down_blocks.%d", i);
    for (int32_t j = 0; j < c->layers_per_block.value[i]; j++) {
        x = resnet(u, x, j, c->block_out_channels.value[i], 1.0f);
        if (c->down_block_types.value[i] == BLOCK_CROSS) {
            x = attention(u, x, j, c->attention_head_dim.value[i],
                          layers_at(&c->transformer_layers_per_block, i, j),
                          c->only_cross_attention.value[i]);
        }
        push_skip(u, x);
    }
    if (i < c->n_blocks - 1) {
        x = ac_block_downsample(u->g, x, c->downsample_padding);
        push_skip(u, x);
    }
    ac_pop(u->g);
    return x;
}

/* resnet -> attention -> resnet, or one resnet, or nothing */
static ac_val
mid_block(builder *u, ac_val x)
{
    const unet_config *c = u->c;
    int32_t last = c->n_blocks - 1, channels = c->block_out_channels.value[last];
    if (c->mid_block_type == MID_NONE) {
        return x;
    }
    ac_push(u->g, "mid_block");
    x = resnet(u, x, 0, channels, c->mid_block_scale_factor);
    if (c->mid_block_type == MID_CROSS) {
        x = attention(u, x, 0, c->attention_head_dim.value[last],
                      layers_at(&c->transformer_layers_per_block, last, 0), false);
        x = resnet(u, x, 1, channels, c->mid_block_scale_factor);
    }
    ac_pop(u->g);
    return x;
}

/* (concat skip -> resnet -> attention) x (layers + 1) -> upsample to the next skip's size */
static ac_val
up_block(builder *u, ac_val x, int32_t i)
{
    const unet_config *c = u->c;
    int32_t from = c->n_blocks - 1 - i; /* the down block at this size */
    bool own = c->reverse_transformer_layers_per_block.count > 0;
    ac_push(u->g, "up_blocks.%d", i);
    for (int32_t j = 0; j <= c->layers_per_block.value[from]; j++) {
        ac_val skip = u->skip[--u->n_skips];
        x = ac_concat(u->g, (ac_val[]){x, skip}, 2, 3);
        x = resnet(u, x, j, c->block_out_channels.value[from], 1.0f);
        if (c->up_block_types.value[i] == BLOCK_CROSS) {
            int32_t layers = own ? layers_at(&c->reverse_transformer_layers_per_block, i, j)
                                 : layers_at(&c->transformer_layers_per_block, from, j);
            x = attention(u, x, j, c->attention_head_dim.value[from], layers,
                          c->only_cross_attention.value[from]);
        }
    }
    if (i < c->n_blocks - 1) {
        /* Twice the size, or an odd skip's own: 2 x 5 pixels must become 9 where 9 went down. */
        ac_val next = u->skip[u->n_skips - 1];
        int64_t height = u->forward_size ? ac_dim(u->g, next, 1) : 2 * ac_dim(u->g, x, 1);
        int64_t width = u->forward_size ? ac_dim(u->g, next, 2) : 2 * ac_dim(u->g, x, 2);
        x = ac_block_upsample(u->g, x, height, width);
    }
    ac_pop(u->g);
    return x;
}

static void
build(const void *config, const ac_build_args *args, ac_graph *g)
{
    const unet_config *c = config;
    builder u = {.g = g, .c = c, .args = args};
    int64_t factor = (int64_t)1 << (c->n_blocks - 1);
    u.forward_size = args->height % factor || args->width % factor;
    ac_check_extent(g, "batch", args->batch, AC_MAX_EXTENT);
    ac_check_extent(g, "height", args->height, AC_MAX_EXTENT);
    ac_check_extent(g, "width", args->width, AC_MAX_EXTENT);
    ac_check_extent(g, "tokens", args->tokens, AC_MAX_EXTENT);
    ac_check_extent(g, "timesteps", args->timesteps, AC_MAX_EXTENT);
    if (g->status) {
        return;
    }
    ac_val x = ac_input(g, "sample", args->io_dtype,
                        AC_SHAPE(args->batch, c->in_channels, args->height, args->width),
                        AC_RATE_STEP);
    x = ac_to_nhwc(g, x);
    if (c->center_input_sample) {
        x = ac_scale(g, x, 2.0f, -1.0f);
    }
    u.time = time_embedding(&u);
    text(&u);

    x = ac_layer_conv(g, "conv_in", x, c->block_out_channels.value[0], c->conv_in_kernel, 1,
                      (c->conv_in_kernel - 1) / 2);
    push_skip(&u, x);
    for (int32_t i = 0; i < c->n_blocks; i++) {
        x = down_block(&u, x, i);
    }
    x = mid_block(&u, x);
    for (int32_t i = 0; i < c->n_blocks; i++) {
        x = up_block(&u, x, i);
    }
    x = ac_layer_group_norm(g, "conv_norm_out", x, c->norm_num_groups, c->norm_eps);
    ac_name(g, "conv_act");
    x = ac_activation(g, x, c->act_fn);
    x = ac_layer_conv(g, "conv_out", x, c->out_channels, c->conv_out_kernel, 1,
                      (c->conv_out_kernel - 1) / 2);
    ac_output(g, ac_to_nchw(g, x, args->loop ? AC_F32 : args->io_dtype), "sample");
}

static void
smallest(const void *config, const char *entry, ac_build_args *args)
{
    const unet_config *c = config;
    /* 512 pixels leave four at the bottom of the deepest UNet that parse accepts. */
    *args = (ac_build_args){.entry = entry, .batch = 1, .height = 512, .width = 512, .tokens = 1,
                            .timesteps = 1, .time_ids = c->addition_embed_type != ADD_NONE};
}

static const char *const entries[] = {"forward", NULL};

extern const ac_model_class ac_model_unet_2d_condition;
const ac_model_class ac_model_unet_2d_condition = {
    .name = "UNet2DConditionModel",
    .config_size = sizeof(unet_config),
    .parse = parse,
    .entries = entries,
    .smallest = smallest,
    .build = build,
};
