/* fuzz_model: eight characters of build arguments, then config.json.
 *
 * What parse accepts is built for every entry point, or refused by name; what is built is sound
 * before and after the passes, and is planned on the null device.
 */
#include "../../csrc/model.h"
#include "../../csrc/passes/passes.h"
#include "fuzz.h"

#include <string.h>

#define SMALL "\"block_out_channels\":[8,16],\"norm_num_groups\":4,\"layers_per_block\":1,"

const char *const fuzz_seeds[] = {
    "10443000{\"_class_name\":\"UNet2DConditionModel\"," SMALL "\"down_block_types\":["
    "\"CrossAttnDownBlock2D\",\"DownBlock2D\"],\"up_block_types\":[\"UpBlock2D\","
    "\"CrossAttnUpBlock2D\"],\"cross_attention_dim\":8,\"attention_head_dim\":2,"
    "\"sample_size\":8,\"in_channels\":4,\"out_channels\":4,\"center_input_sample\":false,"
    "\"flip_sin_to_cos\":true,\"freq_shift\":0,\"downsample_padding\":1,\"act_fn\":\"silu\"}",
    "12757111{\"_class_name\":\"UNet2DConditionModel\"," SMALL "\"down_block_types\":["
    "\"DownBlock2D\",\"CrossAttnDownBlock2D\"],\"up_block_types\":[\"CrossAttnUpBlock2D\","
    "\"UpBlock2D\"],\"cross_attention_dim\":8,\"attention_head_dim\":[1,2],"
    "\"transformer_layers_per_block\":[1,2],\"addition_embed_type\":\"text_time\","
    "\"addition_time_embed_dim\":4,\"projection_class_embeddings_input_dim\":32,"
    "\"use_linear_projection\":true,\"upcast_attention\":null,\"only_cross_attention\":false}",
    "10980000{\"_class_name\":\"AutoencoderKL\"," SMALL "\"down_block_types\":["
    "\"DownEncoderBlock2D\",\"DownEncoderBlock2D\"],\"up_block_types\":[\"UpDecoderBlock2D\","
    "\"UpDecoderBlock2D\"],\"latent_channels\":2,\"sample_size\":32,\"scaling_factor\":0.18215,"
    "\"use_quant_conv\":true,\"use_post_quant_conv\":true,\"mid_block_add_attention\":true,"
    "\"force_upcast\":true,\"latents_mean\":null}",
    "20007012{\"architectures\":[\"CLIPTextModel\"],\"hidden_size\":16,\"intermediate_size\":32,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"max_position_embeddings\":16,"
    "\"vocab_size\":99,\"hidden_act\":\"quick_gelu\",\"eos_token_id\":2,\"layer_norm_eps\":1e-5}",
    "20007023{\"architectures\":[\"CLIPTextModelWithProjection\"],\"hidden_size\":16,"
    "\"intermediate_size\":32,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
    "\"projection_dim\":8,\"max_position_embeddings\":77,\"vocab_size\":49,\"hidden_act\":\"gelu\","
    "\"eos_token_id\":48,\"bos_token_id\":0,\"pad_token_id\":1}",
    NULL,
};
const char *const fuzz_words[] = {
    "null", "true", "false", "Infinity", "-1", "0", "1", "2", "3", "7", "32", "1e18", "0.5",
    "2147483648", "[]", "[1]", "[8,16]", "[8,16,24]", "[1,[2,1]]", "[true,false]", "{}", "\"x\"",
    "\"silu\"", "\"gelu\"", "\"quick_gelu\"", "\"relu\"", "\"mish\"", "\"text_time\"", "\"text\"",
    "\"DownBlock2D\"", "\"CrossAttnDownBlock2D\"", "\"UpBlock2D\"", "\"CrossAttnUpBlock2D\"",
    "\"UNetMidBlock2DCrossAttn\"", "\"UNetMidBlock2D\"", "\"DownEncoderBlock2D\"",
    "\"UpDecoderBlock2D\"", "\"default\"", "\"scale_shift\"", "\"positional\"",
    "\"UNet2DConditionModel\"", "\"AutoencoderKL\"", "\"CLIPTextModel\"",
    "\"CLIPTextModelWithProjection\"", "\"mid_block_type\":", "\"block_out_channels\":",
    "\"attention_head_dim\":", "\"num_attention_heads\":", "\"transformer_layers_per_block\":",
    "\"reverse_transformer_layers_per_block\":", "\"only_cross_attention\":", "\"norm_eps\":",
    "\"norm_num_groups\":", "\"layers_per_block\":", "\"time_cond_proj_dim\":",
    "\"conv_in_kernel\":", "\"conv_out_kernel\":", "\"class_embed_type\":",
    "\"resnet_time_scale_shift\":", "\"mid_block_add_attention\":false,",
    "\"use_quant_conv\":false,", "\"use_linear_projection\":true,", "\"dual_cross_attention\":",
    NULL,
};

enum { ARGUMENTS = 8 };

static int
digit(uint8_t c)
{
    return c >= '0' && c <= '9' ? c - '0' : c % 11;
}

static ac_build_args
read_args(const uint8_t *c, const char *entry)
{
    return (ac_build_args){.entry = entry,
                           .batch = digit(c[0]),
                           .timesteps = 1 + digit(c[1]) * (digit(c[7]) & 1),
                           .height = digit(c[2]),
                           .width = digit(c[3]),
                           .tokens = digit(c[4]),
                           .loop = digit(c[5]) & 1,
                           .masked = digit(c[6]) & 1,
                           .hidden_states = digit(c[6]) & 2,
                           .clip_skip = digit(c[7]) / 2,
                           .io_dtype = c[5] & 4 ? AC_F16 : AC_F32,
                           .compute = AC_F32};
}

/* The graph is sound as built and after the passes. */
static ac_status
check_graph(ac_graph *g)
{
    AC_TRY(ac_graph_status(g));
    AC_TRY(ac_graph_sort(g));
    ac_status status = ac_graph_verify(g);
    FUZZ_CHECK(status == AC_OK || status == AC_E_MEMORY);
    AC_TRY(status);
    status = ac_passes_run(g, 0, NULL);
    FUZZ_CHECK(status == AC_OK || status == AC_E_MEMORY);
    AC_TRY(status);
    status = ac_graph_verify(g);
    FUZZ_CHECK(status == AC_OK || status == AC_E_MEMORY);
    return status;
}

static ac_status
build_entry(const ac_model_class *cls, const void *config, const ac_build_args *args)
{
    ac_graph *g = NULL;
    AC_TRY(ac_graph_new(AC_F32, &g));
    cls->build(config, args, g);
    ac_status status = check_graph(g);
    ac_graph_free(g);
    return status;
}

static ac_status
plan_entry(const ac_json *json, const ac_build_args *args)
{
    ac_model *model = NULL;
    ac_text text = {0};
    AC_TRY(ac_model_new(json, NULL, "null", "", &model));
    ac_status status = ac_model_explain(model, args, true, false, &text);
    ac_text_free(&text);
    ac_model_unref(model);
    return status;
}

/* All that a config and arguments lead to; every status on the way is the caller's. */
static ac_status
run(ac_arena *arena, const uint8_t *data, size_t size)
{
    const ac_json *json = NULL;
    const ac_model_class *cls = NULL;
    AC_TRY(ac_json_parse(arena, (const char *)data + ARGUMENTS, size - ARGUMENTS, "fuzz", &json));
    AC_TRY(ac_model_class_find(json, &cls));
    void *config = ac_arena_alloc(arena, cls->config_size);
    if (!config) {
        return ac_no_memory(cls->config_size);
    }
    AC_TRY(cls->parse(json, config));
    ac_status first = AC_OK;
    for (int i = 0; cls->entries[i]; i++) {
        ac_build_args args = read_args(data, cls->entries[i]);
        ac_status built = build_entry(cls, config, &args);
        ac_status planned = built == AC_OK ? plan_entry(json, &args) : AC_OK;
        FUZZ_CHECK(planned == AC_OK || planned == AC_E_MEMORY);
        first = first < 0 ? first : built < 0 ? built : planned;
    }
    return first;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < ARGUMENTS) {
        return -1;
    }
    ac_arena arena;
    ac_arena_init(&arena);
    ac_status status = run(&arena, data, size);
    FUZZ_CHECK(status == AC_OK || (ac_error_message()[0] && status != AC_E_INTERNAL));
    ac_arena_deinit(&arena);
    return status == AC_OK ? 0 : -1;
}
