/* blocks: layers and blocks; recipes stand at the top of each. */
#include "blocks.h"

#include <math.h>

int64_t
ac_dim(const ac_graph *g, ac_val x, int32_t axis)
{
    if (x == AC_NONE) {
        return 1;
    }
    const ac_shape *shape = &g->values[x].shape;
    axis = axis < 0 ? axis + shape->rank : axis;
    return axis >= 0 && axis < shape->rank ? shape->dim[axis] : 1;
}

void
ac_check_extent(ac_graph *g, const char *what, int64_t value, int64_t most)
{
    if (value < 1 || value > most) {
        ac_graph_fail(g, AC_E_SHAPE, "%s: found %lld, expected 1 to %lld", what, (long long)value,
                      (long long)most);
    }
}

/* ---- layers ---------------------------------------------------------------------------------- */

/* Weight and bias of layer `name`. */
static void
layer_weights(ac_graph *g, const char *name, ac_shape shape, bool bias, ac_val *w, ac_val *b)
{
    ac_push(g, "%s", name);
    *w = ac_weight(g, "weight", shape);
    *b = bias ? ac_weight(g, "bias", AC_SHAPE(shape.dim[0])) : AC_NONE;
    ac_pop(g);
    ac_name(g, name);
}

ac_val
ac_layer_linear(ac_graph *g, const char *name, ac_val x, int64_t n, bool bias)
{
    ac_val w, b;
    layer_weights(g, name, AC_SHAPE(n, ac_dim(g, x, -1)), bias, &w, &b);
    return ac_linear(g, x, w, b);
}

ac_val
ac_layer_conv1x1(ac_graph *g, const char *name, ac_val x, int64_t n)
{
    ac_val w, b;
    layer_weights(g, name, AC_SHAPE(n, ac_dim(g, x, -1), 1, 1), true, &w, &b);
    return ac_linear(g, x, w, b);
}

static ac_val
layer_conv(ac_graph *g, const char *name, ac_val x, int64_t n, int32_t kernel, ac_conv2d_attr attr)
{
    ac_val w, b;
    layer_weights(g, name, AC_SHAPE(n, ac_dim(g, x, -1), kernel, kernel), true, &w, &b);
    return ac_conv2d(g, x, w, b, attr);
}

ac_val
ac_layer_conv(ac_graph *g, const char *name, ac_val x, int64_t n, int32_t kernel, int32_t stride,
              int32_t padding)
{
    ac_conv2d_attr attr = {.stride = stride, .pad_top = padding, .pad_left = padding,
                           .pad_bottom = padding, .pad_right = padding};
    return layer_conv(g, name, x, n, kernel, attr);
}

ac_val
ac_layer_group_norm(ac_graph *g, const char *name, ac_val x, int32_t groups, float eps)
{
    ac_val gamma, beta;
    layer_weights(g, name, AC_SHAPE(ac_dim(g, x, -1)), true, &gamma, &beta);
    return ac_group_norm(g, x, gamma, beta, groups, eps);
}

ac_val
ac_layer_layer_norm(ac_graph *g, const char *name, ac_val x, float eps)
{
    ac_val gamma, beta;
    layer_weights(g, name, AC_SHAPE(ac_dim(g, x, -1)), true, &gamma, &beta);
    return ac_layer_norm(g, x, gamma, beta, eps);
}

ac_val
ac_layer_time_mlp(ac_graph *g, const char *name, ac_val x, int64_t n, ac_act act, ac_act post_act)
{
    ac_push(g, "%s", name);
    x = ac_layer_linear(g, "linear_1", x, n, true);
    x = ac_activation(g, x, act);
    x = ac_layer_linear(g, "linear_2", x, n, true);
    x = ac_activation(g, x, post_act);
    ac_pop(g);
    return x;
}

/* ---- blocks ---------------------------------------------------------------------------------- */

ac_val
ac_block_resnet(ac_graph *g, ac_val x, ac_time time, const ac_resnet_args *args)
{
    ac_val h = ac_layer_group_norm(g, "norm1", x, args->groups, args->eps);
    h = ac_activation(g, h, args->act);
    h = ac_layer_conv(g, "conv1", h, args->channels, 3, 1, 1);
    if (time.embedding != AC_NONE) {
        ac_val shift = ac_layer_linear(g, "time_emb_proj", time.embedding, args->channels, true);
        if (time.step != AC_NONE) {
            shift = ac_select(g, shift, time.step);
        }
        h = ac_add(g, h, shift);
    }
    h = ac_layer_group_norm(g, "norm2", h, args->groups, args->eps);
    h = ac_activation(g, h, args->act);
    h = ac_layer_conv(g, "conv2", h, args->channels, 3, 1, 1);
    if (ac_dim(g, x, -1) != args->channels) {
        x = ac_layer_conv1x1(g, "conv_shortcut", x, args->channels);
    }
    h = ac_add(g, h, x);
    return args->scale == 1.0f ? h : ac_scale(g, h, 1.0f / args->scale, 0.0f);
}

ac_val
ac_block_downsample(ac_graph *g, ac_val x, int32_t padding)
{
    int32_t before = padding, after = padding ? padding : 1;
    ac_conv2d_attr attr = {.stride = 2, .pad_top = before, .pad_left = before,
                           .pad_bottom = after, .pad_right = after};
    ac_push(g, "downsamplers.0");
    x = layer_conv(g, "conv", x, ac_dim(g, x, -1), 3, attr);
    ac_pop(g);
    return x;
}

ac_val
ac_block_upsample(ac_graph *g, ac_val x, int64_t height, int64_t width)
{
    ac_push(g, "upsamplers.0");
    x = ac_upsample(g, x, height, width);
    x = ac_layer_conv(g, "conv", x, ac_dim(g, x, -1), 3, 1, 1);
    ac_pop(g);
    return x;
}

ac_val
ac_block_attention(ac_graph *g, ac_val x, const ac_attention_args *args)
{
    ac_val context = args->context == AC_NONE ? x : args->context;
    ac_val q = ac_layer_linear(g, "to_q", x, args->inner, args->bias);
    ac_val k = ac_layer_linear(g, "to_k", context, args->inner, args->bias);
    ac_val v = ac_layer_linear(g, "to_v", context, args->inner, args->bias);
    double channels = (double)(args->inner / args->heads);
    ac_attention_attr attr = {.heads = args->heads, .scale = (float)(1.0 / sqrt(channels))};
    ac_val h = ac_attention(g, q, k, v, args->mask, attr);
    return ac_layer_linear(g, "to_out.0", h, ac_dim(g, x, -1), true);
}

#define TRANSFORMER_LN_EPS 1e-5f /* diffusers' Transformer2DModel passes its default on */
#define TRANSFORMER_GN_EPS 1e-6f

/* norm1 -> attn1 -> +; norm2 -> attn2 (text) -> +; norm3 -> GEGLU -> linear -> +.  x [b, t, c] */
static ac_val
transformer_layer(ac_graph *g, ac_val x, const ac_transformer_args *args)
{
    int64_t c = ac_dim(g, x, -1);
    ac_attention_args attn1 = {.heads = args->heads, .inner = c, .mask = AC_NONE,
                               .context = args->only_cross ? args->context : AC_NONE};
    ac_attention_args attn2 = {.heads = args->heads, .inner = c, .context = args->context,
                               .mask = args->mask};

    ac_val h = ac_layer_layer_norm(g, "norm1", x, TRANSFORMER_LN_EPS);
    ac_push(g, "attn1");
    h = ac_block_attention(g, h, &attn1);
    ac_pop(g);
    x = ac_add(g, h, x);

    h = ac_layer_layer_norm(g, "norm2", x, TRANSFORMER_LN_EPS);
    ac_push(g, "attn2");
    h = ac_block_attention(g, h, &attn2);
    ac_pop(g);
    x = ac_add(g, h, x);

    h = ac_layer_layer_norm(g, "norm3", x, TRANSFORMER_LN_EPS);
    ac_push(g, "ff");
    h = ac_layer_linear(g, "net.0.proj", h, 8 * c, true);
    h = ac_gate(g, h, AC_ACT_GELU);
    h = ac_layer_linear(g, "net.2", h, c, true);
    ac_pop(g);
    return ac_add(g, h, x);
}

static ac_val
projection(ac_graph *g, const char *name, ac_val x, int64_t n, bool linear)
{
    return linear ? ac_layer_linear(g, name, x, n, true) : ac_layer_conv1x1(g, name, x, n);
}

ac_val
ac_block_transformer(ac_graph *g, ac_val x, const ac_transformer_args *args)
{
    int64_t b = ac_dim(g, x, 0), height = ac_dim(g, x, 1), width = ac_dim(g, x, 2);
    int64_t c = ac_dim(g, x, 3), inner = c / args->heads * args->heads;
    if (inner < 1) {
        ac_graph_fail(g, AC_E_UNSUPPORTED, "attention_head_dim: found %d heads for %lld channels",
                      args->heads, (long long)c);
        return AC_NONE;
    }
    ac_val h = ac_layer_group_norm(g, "norm", x, args->groups, TRANSFORMER_GN_EPS);
    h = ac_reshape(g, h, AC_SHAPE(b, height * width, c));
    h = projection(g, "proj_in", h, inner, args->linear_projection);
    for (int32_t i = 0; i < args->layers; i++) {
        ac_push(g, "transformer_blocks.%d", i);
        h = transformer_layer(g, h, args);
        ac_pop(g);
    }
    h = projection(g, "proj_out", h, c, args->linear_projection);
    h = ac_reshape(g, h, AC_SHAPE(b, height, width, c));
    return ac_add(g, h, x);
}
