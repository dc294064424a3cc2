/* blocks: the layers and blocks that UNet2DConditionModel, AutoencoderKL and CLIP are made of.
 *
 * Each emits the ops that PyTorch's modules would run, one by one, with weights named as diffusers
 * names its modules; csrc/passes fuses and merges.  Images are NHWC here, so a 1x1 convolution is
 * a linear layer over the last dimension and an image is a matrix of tokens without a permute.
 * The caller pushes the scope of a block ("resnets.0"); a layer takes its own name.
 */
#ifndef AC_BLOCKS_H
#define AC_BLOCKS_H

#include "../graph.h"

/* Size of an axis; negative axes count from the end.  1 after an error. */
int64_t ac_dim(const ac_graph *g, ac_val x, int32_t axis);

/* Fails the graph unless 1 <= value <= most; what ac_build_args holds comes from a caller. */
void ac_check_extent(ac_graph *g, const char *what, int64_t value, int64_t most);

/* ---- layers: weights `name`.weight and .bias under the scope ------------------------------- */

/* x [..., k] -> [..., n] */
ac_val ac_layer_linear(ac_graph *g, const char *name, ac_val x, int64_t n, bool bias);
/* The same with a convolution's weight [n, k, 1, 1]. */
ac_val ac_layer_conv1x1(ac_graph *g, const char *name, ac_val x, int64_t n);
/* kernel x kernel, the same padding on all sides */
ac_val ac_layer_conv(ac_graph *g, const char *name, ac_val x, int64_t n, int32_t kernel,
                     int32_t stride, int32_t padding);
ac_val ac_layer_group_norm(ac_graph *g, const char *name, ac_val x, int32_t groups, float eps);
ac_val ac_layer_layer_norm(ac_graph *g, const char *name, ac_val x, float eps);
/* linear_1 -> act -> linear_2 -> post_act: x [..., k] -> [..., n] (diffusers' TimestepEmbedding) */
ac_val ac_layer_time_mlp(ac_graph *g, const char *name, ac_val x, int64_t n, ac_act act,
                         ac_act post_act);

/* ---- time ----------------------------------------------------------------------------------- */

/* The time embedding as every resnet takes it: already through the activation, since each
 * resnet's own would give the same values.
 *
 * Called by a pipeline, `embedding` is [1 or b, c] and `step` is absent.  In our own loop the
 * embedding is that of all steps, [steps, 1 or b, c], its rate is "schedule", and each resnet
 * projects all steps: [steps, 1 or b, c_out].  Only then does SELECT take the row of this step, so
 * that per step nothing of it is left but one row to read; the merge pass makes one GEMM of the
 * projections and one SELECT of the selects.  ADD broadcasts the row over pixels, and over the
 * batch where it is 1. */
typedef struct ac_time {
    ac_val embedding; /* AC_NONE: resnets have no time projection (VAE) */
    ac_val step;      /* i32 [1], or AC_NONE */
} ac_time;

/* ---- blocks --------------------------------------------------------------------------------- */

typedef struct ac_resnet_args {
    int64_t channels;  /* of the result */
    int32_t groups;
    float eps;
    ac_act act;
    float scale;       /* diffusers' output_scale_factor: the sum is divided by it */
} ac_resnet_args;

/* norm1 -> act -> conv1 -> + time_emb_proj -> norm2 -> act -> conv2; + x or conv_shortcut(x) */
ac_val ac_block_resnet(ac_graph *g, ac_val x, ac_time time, const ac_resnet_args *args);

/* Stride 2.  padding 0 pads right and bottom only: symmetric padding there shifts a VAE's picture
 * by about 7 pixels. */
ac_val ac_block_downsample(ac_graph *g, ac_val x, int32_t padding);

/* Nearest neighbour to height x width -> conv */
ac_val ac_block_upsample(ac_graph *g, ac_val x, int64_t height, int64_t width);

typedef struct ac_attention_args {
    int32_t heads;
    int64_t inner;  /* heads times channels of a head */
    bool bias;      /* of to_q, to_k and to_v; to_out.0 always has one */
    ac_val context; /* [b, tokens, c]; AC_NONE: x itself */
    ac_val mask;    /* [b, tokens] added to the scores, or AC_NONE */
} ac_attention_args;

/* to_out.0(softmax(to_q(x) to_k(context)^T / sqrt(d)) to_v(context)); x [b, t, c] */
ac_val ac_block_attention(ac_graph *g, ac_val x, const ac_attention_args *args);

typedef struct ac_transformer_args {
    int32_t heads, layers, groups;
    bool linear_projection; /* proj_in and proj_out are linear, else 1x1 convolutions */
    bool only_cross;        /* attn1 attends to the text too */
    ac_val context, mask;
} ac_transformer_args;

/* norm -> proj_in -> transformer_blocks -> proj_out; + x.  x NHWC. */
ac_val ac_block_transformer(ac_graph *g, ac_val x, const ac_transformer_args *args);

#endif
