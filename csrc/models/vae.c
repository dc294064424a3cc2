/* vae: AutoencoderKL, encode and decode, with or without the 1x1 convolutions around the latents.
 *
 * Reads like diffusers' autoencoder_kl.py and vae.py.  `encode` ends at the moments (mean and log
 * variance side by side); drawing from them and scaling_factor are the pipeline's.
 */
#include "blocks.h"
#include "config.h"
#include "models.h"

#include <stdio.h>
#include <string.h>

typedef struct vae_config {
    int32_t in_channels, out_channels, latent_channels;
    int32_t n_blocks; /* length of block_out_channels */
    ac_per_block down_block_types, up_block_types, block_out_channels;
    int32_t layers_per_block;
    int32_t act_fn; /* of the resnets; the last activation is always silu */
    int32_t norm_num_groups;
    bool use_quant_conv, use_post_quant_conv, mid_block_add_attention;
} vae_config;

#define VAE_EPS 1e-6f
/* SDXL's decoder reaches 1e5 and more between its norms, f16 ends at 65504: kept times 2^-5 it has
 * room to 2e6, and what matters beside such values stays far above f16's denormals. */
#define F16_STREAM_EXPONENT (-5)

/* ---- config ---------------------------------------------------------------------------------- */

static const ac_choice down_types[] = {{"DownEncoderBlock2D", 0}, {NULL, 0}};
static const ac_choice up_types[] = {{"UpDecoderBlock2D", 0}, {NULL, 0}};

#define NAME(member) .name = #member, .offset = offsetof(vae_config, member)

static const ac_field fields[] = {
    {NAME(in_channels), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(out_channels), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(down_block_types), .kind = AC_FIELD_CHOICES, .choices = down_types},
    {NAME(up_block_types), .kind = AC_FIELD_CHOICES, .choices = up_types},
    {NAME(block_out_channels), .kind = AC_FIELD_LIST, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(layers_per_block), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_BLOCK_LAYERS},
    {NAME(act_fn), .kind = AC_FIELD_CHOICE, .choices = ac_config_activations},
    {NAME(latent_channels), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(norm_num_groups), .kind = AC_FIELD_INT, .low = 1, .high = AC_MAX_CHANNELS},
    {NAME(use_quant_conv), .kind = AC_FIELD_BOOL},
    {NAME(use_post_quant_conv), .kind = AC_FIELD_BOOL},
    {NAME(mid_block_add_attention), .kind = AC_FIELD_BOOL},
    {"sample_size", .kind = AC_FIELD_IGNORED},
    {"scaling_factor", .kind = AC_FIELD_IGNORED}, /* this and the next five: the pipeline's */
    {"shift_factor", .kind = AC_FIELD_IGNORED},
    {"latents_mean", .kind = AC_FIELD_IGNORED},
    {"latents_std", .kind = AC_FIELD_IGNORED},
    {"force_upcast", .kind = AC_FIELD_IGNORED},
};

static const vae_config defaults = {
    .in_channels = 3,
    .out_channels = 3,
    .latent_channels = 4,
    .down_block_types = {.count = 1},
    .up_block_types = {.count = 1},
    .block_out_channels = {.count = 1, .value = {64}},
    .layers_per_block = 1,
    .act_fn = AC_ACT_SILU,
    .norm_num_groups = 32,
    .use_quant_conv = true,
    .use_post_quant_conv = true,
    .mid_block_add_attention = true,
};

static ac_status
spread_and_check(vae_config *c)
{
    c->n_blocks = c->block_out_channels.count;
    AC_TRY(ac_config_per_block(&c->down_block_types, "down_block_types", c->n_blocks));
    return ac_config_per_block(&c->up_block_types, "up_block_types", c->n_blocks);
}

static ac_status
parse(const ac_json *json, void *config)
{
    vae_config *c = config;
    *c = defaults;
    AC_TRY(ac_config_read(json, "AutoencoderKL", fields, AC_ARRAY_LEN(fields), c));
    ac_status status = spread_and_check(c);
    return status < 0 ? ac_error_prefix(status, "AutoencoderKL config") : AC_OK;
}

/* ---- graph ----------------------------------------------------------------------------------- */

static ac_val
resnet(ac_graph *g, const vae_config *c, ac_val x, int32_t index, int64_t channels)
{
    ac_resnet_args args = {.channels = channels, .groups = c->norm_num_groups, .eps = VAE_EPS,
                           .act = c->act_fn, .scale = 1.0f};
    ac_push(g, "resnets.%d", index);
    x = ac_block_resnet(g, x, (ac_time){.embedding = AC_NONE, .step = AC_NONE}, &args);
    ac_pop(g);
    return x;
}

/* group_norm -> attention of one head over all pixels -> + x */
static ac_val
attention(ac_graph *g, const vae_config *c, ac_val x)
{
    int64_t b = ac_dim(g, x, 0), height = ac_dim(g, x, 1), width = ac_dim(g, x, 2);
    int64_t channels = ac_dim(g, x, 3);
    ac_attention_args args = {.heads = 1, .inner = channels, .bias = true, .context = AC_NONE,
                              .mask = AC_NONE};
    ac_push(g, "attentions.0");
    ac_val h = ac_layer_group_norm(g, "group_norm", x, c->norm_num_groups, VAE_EPS);
    h = ac_reshape(g, h, AC_SHAPE(b, height * width, channels));
    h = ac_block_attention(g, h, &args);
    h = ac_reshape(g, h, AC_SHAPE(b, height, width, channels));
    ac_pop(g);
    return ac_add(g, h, x);
}

/* resnet -> attention -> resnet */
static ac_val
mid_block(ac_graph *g, const vae_config *c, ac_val x)
{
    int64_t channels = ac_dim(g, x, -1);
    ac_push(g, "mid_block");
    x = resnet(g, c, x, 0, channels);
    if (c->mid_block_add_attention) {
        x = attention(g, c, x);
    }
    x = resnet(g, c, x, 1, channels);
    ac_pop(g);
    return x;
}

/* norm -> silu -> conv, the end of both halves */
static ac_val
out(ac_graph *g, const vae_config *c, ac_val x, int64_t channels)
{
    x = ac_layer_group_norm(g, "conv_norm_out", x, c->norm_num_groups, VAE_EPS);
    ac_name(g, "conv_act");
    x = ac_activation(g, x, AC_ACT_SILU);
    return ac_layer_conv(g, "conv_out", x, channels, 3, 1, 1);
}

/* conv_in -> (resnets -> downsample) x blocks -> mid -> out */
static ac_val
encoder(ac_graph *g, const vae_config *c, ac_val x)
{
    ac_push(g, "encoder");
    x = ac_layer_conv(g, "conv_in", x, c->block_out_channels.value[0], 3, 1, 1);
    for (int32_t i = 0; i < c->n_blocks; i++) {
        ac_push(g, "down_blocks.%d", i);
        for (int32_t j = 0; j < c->layers_per_block; j++) {
            x = resnet(g, c, x, j, c->block_out_channels.value[i]);
        }
        if (i < c->n_blocks - 1) {
            x = ac_block_downsample(g, x, 0);
        }
        ac_pop(g);
    }
    x = mid_block(g, c, x);
    x = out(g, c, x, 2 * (int64_t)c->latent_channels);
    ac_pop(g);
    return x;
}

/* conv_in -> mid -> (resnets -> upsample) x blocks -> out */
static ac_val
decoder(ac_graph *g, const vae_config *c, ac_val x)
{
    ac_push(g, "decoder");
    x = ac_layer_conv(g, "conv_in", x, c->block_out_channels.value[c->n_blocks - 1], 3, 1, 1);
    x = mid_block(g, c, x);
    for (int32_t i = 0; i < c->n_blocks; i++) {
        int32_t from = c->n_blocks - 1 - i;
        ac_push(g, "up_blocks.%d", i);
        for (int32_t j = 0; j <= c->layers_per_block; j++) {
            x = resnet(g, c, x, j, c->block_out_channels.value[from]);
        }
        if (i < c->n_blocks - 1) {
            x = ac_block_upsample(g, x, 2 * ac_dim(g, x, 1), 2 * ac_dim(g, x, 2));
        }
        ac_pop(g);
    }
    x = out(g, c, x, c->out_channels);
    ac_pop(g);
    return x;
}

static ac_val
image_input(ac_graph *g, const ac_build_args *args, const char *name, int64_t channels)
{
    ac_check_extent(g, "batch", args->batch, AC_MAX_EXTENT);
    ac_check_extent(g, "height", args->height, AC_MAX_EXTENT);
    ac_check_extent(g, "width", args->width, AC_MAX_EXTENT);
    ac_shape shape = AC_SHAPE(args->batch, channels, args->height, args->width);
    return ac_to_nhwc(g, ac_input(g, name, args->io_dtype, shape, AC_RATE_STEP));
}

static void
build(const void *config, const ac_build_args *args, ac_graph *g)
{
    const vae_config *c = config;
    g->stream_exponent = args->compute == AC_F16 ? F16_STREAM_EXPONENT : 0;
    if (strcmp(args->entry, "encode") == 0) {
        ac_val x = encoder(g, c, image_input(g, args, "sample", c->in_channels));
        if (c->use_quant_conv) {
            x = ac_layer_conv1x1(g, "quant_conv", x, 2 * (int64_t)c->latent_channels);
        }
        ac_output(g, ac_to_nchw(g, x, args->io_dtype), "moments");
    } else if (strcmp(args->entry, "decode") == 0) {
        ac_val x = image_input(g, args, "latents", c->latent_channels);
        if (c->use_post_quant_conv) {
            x = ac_layer_conv1x1(g, "post_quant_conv", x, c->latent_channels);
        }
        ac_output(g, ac_to_nchw(g, decoder(g, c, x), args->io_dtype), "sample");
    } else {
        ac_graph_fail(g, AC_E_INVALID, "entry: found \"%s\", expected encode or decode",
                      args->entry);
    }
}

static void
smallest(const void *config, const char *entry, ac_build_args *args)
{
    (void)config;
    /* 512 pixels leave four at the bottom of the deepest VAE that parse accepts. */
    int64_t size = strcmp(entry, "encode") == 0 ? 512 : 1;
    *args = (ac_build_args){.entry = entry, .batch = 1, .height = size, .width = size};
}

/* ---- old names ------------------------------------------------------------------------------- */

/* Attention layers before diffusers 0.14, and what they are called now. */
static const struct {
    const char *old, *today;
} attention_names[] = {
    {".query.", ".to_q."},
    {".key.", ".to_k."},
    {".value.", ".to_v."},
    {".proj_attn.", ".to_out.0."},
};

static bool
weight_name(const char *found, char *out_name, size_t size)
{
    const char *layer = strstr(found, ".mid_block.attentions.0.");
    for (size_t i = 0; layer && i < AC_ARRAY_LEN(attention_names); i++) {
        const char *at = strstr(layer, attention_names[i].old);
        if (at) {
            const char *rest = at + strlen(attention_names[i].old);
            int length = snprintf(out_name, size, "%.*s%s%s", (int)(at - found), found,
                                  attention_names[i].today, rest);
            return length > 0 && (size_t)length < size;
        }
    }
    return false;
}

static const char *const entries[] = {"encode", "decode", NULL};

extern const ac_model_class ac_model_autoencoder_kl;
const ac_model_class ac_model_autoencoder_kl = {
    .name = "AutoencoderKL",
    .config_size = sizeof(vae_config),
    .parse = parse,
    .entries = entries,
    .smallest = smallest,
    .build = build,
    .weight_name = weight_name,
};
