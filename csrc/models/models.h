/* models: the table "_class_name" -> how to read its config and build its graph.
 *
 * A model is one builder file and one row; it never touches passes, plan or exec.  Builders use
 * diffusers' names in diffusers' order, so that unet.c reads like unet_2d_condition.py.
 *
 * Graph inputs and outputs, by class and entry (names are the contract with csrc/py):
 *   UNet2DConditionModel forward
 *     sample [b, c, h, w] io, step          timestep [timesteps] f32, schedule
 *     step [1] i32, step (only `loop`)      encoder_hidden_states [b, tokens, d] io, prompt
 *     text_embeds [b, d] io, time_ids [b, 6|5] f32, prompt (only addition_embed_type "text_time")
 *     encoder_attention_mask [b, tokens] f32, added to scores, prompt (only `masked`)
 *     -> sample [b, c_out, h, w] io
 *   AutoencoderKL encode: sample [b, 3, h, w] io -> moments [b, 2 c_latent, h/8, w/8] io
 *                 decode: latents [b, c_latent, h, w] io -> sample [b, 3, 8h, 8w] io
 *   CLIPTextModel, CLIPTextModelWithProjection forward
 *     input_ids [b, tokens] i64, prompt     attention_mask [b, tokens] f32, added (only `masked`)
 *     -> last_hidden_state [b, tokens, d] io; pooler_output [b, d] io, or text_embeds [b, p] io
 *     -> hidden_states.<i> i = 0 .. layers io (only `hidden_states`), clip_skip (only clip_skip)
 */
#ifndef AC_MODELS_H
#define AC_MODELS_H

#include "../graph.h"
#include "../json.h"
#include "../weights.h"

/* What a graph is built for; one graph (and plan, and exec) for each distinct value. */
typedef struct ac_build_args {
    const char *entry;     /* "forward" (UNet, CLIP), "encode", "decode" (VAE) */
    int64_t batch;
    int64_t height, width; /* of the sample input: latent pixels; VAE encode: image pixels */
    int64_t tokens;        /* text length; UNet: of encoder_hidden_states */
    int64_t timesteps;     /* UNet: rows of `timestep`; with `loop` one a step, else 1 or batch */
    int64_t time_ids;      /* UNet, "text_time": columns of `time_ids`; the config does not say.
                            * 0: 6 (SDXL), or 5 where that leaves 1280 for text_embeds (refiner) */
    bool loop;             /* UNet: our loop calls: `timestep` [timesteps] is per schedule and the
                            * step is chosen by input `step` [1] i32; outputs stay f32 */
    bool masked;           /* CLIP: input `attention_mask`; UNet: `encoder_attention_mask` */
    bool hidden_states;    /* CLIP: outputs `hidden_states.0` .. too */
    int32_t clip_skip;     /* CLIP: k > 0: output `clip_skip`, the final layer norm of
                            * hidden_states[-(k+1)]; what comes after it is dead */
    ac_dtype io_dtype;     /* of float inputs and outputs at the edges */
    ac_dtype compute;      /* of activations: f32 on the CPU */
    int32_t tf32;          /* AC_TF32_*; of effect where compute is f32 and the device has it */
} ac_build_args;

typedef struct ac_model_class {
    const char *name; /* config.json's _class_name, or architectures[0] */
    size_t config_size;
    /* Reads the config; an unknown field or an unsupported value raises with its name. */
    ac_status (*parse)(const ac_json *json, void *config);
    /* Which entry points the class has, NULL-terminated. */
    const char *const *entries;
    /* Small args that make build() name every weight of entry `entry`. */
    void (*smallest)(const void *config, const char *entry, ac_build_args *args);
    /* Builds graph inputs, nodes and outputs.  Checks the args; errors are sticky in g. */
    void (*build)(const void *config, const ac_build_args *args, ac_graph *g);
    /* The name the model uses for a weight found under another one (old published names, prefixes
     * that come and go): true and the name in `out`, or false (as it is).  NULL: never. */
    bool (*weight_name)(const char *found, char *out, size_t size);
    /* True for names found in files that the model does not use ("...position_ids"). */
    bool (*ignores)(const void *config, const char *weight);
} ac_model_class;

/* NULL-terminated; find returns UNSUPPORTED with the list of known names. */
extern const ac_model_class *const ac_model_classes[];
ac_status ac_model_class_find(const ac_json *config, const ac_model_class **out);

/* Longest name of a weight, with its NUL. */
#define AC_WEIGHT_NAME 512

/* Puts into `out` the name under which the model asks for the weight that files or modules call
 * `found`.  What re-binds weights later asks here first. */
void ac_model_weight_name(const ac_model_class *cls, const char *found, char out[AC_WEIGHT_NAME]);

/* Every weight the class needs against what `weights` has: unknown, missing and wrongly shaped
 * ones, all listed in one message.  Renames by weight_name first.  A linear layer's [n, k] and a
 * 1x1 convolution's [n, k, 1, 1] are the same bytes and both accepted. */
ac_status ac_model_check_weights(const ac_model_class *cls, const void *config,
                                 ac_weights *weights);

#endif
