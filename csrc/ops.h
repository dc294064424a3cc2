/* ops: the enum from ops.def, attributes of each op, and the builder functions models call.
 *
 * A builder function checks shapes, appends one node and returns its value.  Errors are sticky in
 * the graph: after the first, every call returns AC_NONE and does nothing, so models have no
 * status checks.
 */
#ifndef AC_OPS_H
#define AC_OPS_H

#include "tensor.h"

typedef enum ac_op {
#define X(NAME, name, view, operands, meaning) AC_OP_##NAME,
#include "ops.def"
#undef X
    AC_OP_COUNT
} ac_op;

const char *ac_op_name(ac_op op);
bool ac_op_is_view(ac_op op);
const char *ac_op_operands(ac_op op);
const char *ac_op_meaning(ac_op op);

typedef enum ac_act {
    AC_ACT_NONE,
    AC_ACT_SILU,       /* x sigmoid(x) */
    AC_ACT_GELU,       /* exact, with erf */
    AC_ACT_GELU_TANH,  /* "gelu_new", "gelu_pytorch_tanh" */
    AC_ACT_QUICK_GELU, /* x sigmoid(1.702 x) */
    AC_ACT_RELU,
    AC_ACT_COUNT
} ac_act;

const char *ac_act_name(ac_act act);

/* Where products of f32 may round what they multiply to TF32 (11 bits); sums stay f32. */
enum { AC_TF32_MATMUL = 1, AC_TF32_CONV = 2 };

/* Operand slots.  An absent optional operand is AC_NONE in a graph, rank -1 in a problem. */
enum { AC_LINEAR_X, AC_LINEAR_W, AC_LINEAR_B, AC_LINEAR_RESIDUAL, AC_LINEAR_X2 };
enum { AC_CONV_X, AC_CONV_W, AC_CONV_B, AC_CONV_RESIDUAL, AC_CONV_X2 };
enum { AC_GN_X, AC_GN_GAMMA, AC_GN_BETA, AC_GN_X2, AC_GN_SHIFT };
enum { AC_LN_X, AC_LN_GAMMA, AC_LN_BETA };
enum { AC_ATTN_Q, AC_ATTN_K, AC_ATTN_V, AC_ATTN_MASK };

/* x [..., k1], x2 [..., k2], w [n, k1+k2] (or [n, k, 1, 1]), b [n], residual and result [..., n].
 * gated: w has 2n rows, value first then gate, as diffusers' GEGLU; result value * act(gate). */
typedef struct ac_linear_attr {
    ac_act act;
    bool gated;
} ac_linear_attr;

/* x NHWC, w [c_out, c_in, kh, kw] as PyTorch stores it.  Cross-correlation, zero padding. */
typedef struct ac_conv2d_attr {
    int32_t stride;                              /* both axes */
    int32_t pad_top, pad_left, pad_bottom, pad_right;
    ac_act act;
} ac_conv2d_attr;

/* w [4, c_out, c_in, 2, 2] from PHASE_WEIGHT, phase = 2 (row & 1) + (column & 1). */
typedef struct ac_up_conv2d_attr {
    ac_act act;
} ac_up_conv2d_attr;

/* Statistics over the pixels and channels of a group, per image.  x and x2 are concatenated by
 * channel; shift [n, c] is added before the statistics. */
typedef struct ac_group_norm_attr {
    int32_t groups;
    float eps;
    ac_act act;
    int32_t exponent; /* the result is times 2^exponent, after act: see passes/rescale.c */
} ac_group_norm_attr;

typedef struct ac_layer_norm_attr {
    float eps;
} ac_layer_norm_attr;

/* q [n, tq, heads*d], k and v [n, tk, heads*d], mask [n, tk] added to the scores of all queries. */
typedef struct ac_attention_attr {
    int32_t heads;
    float scale;
    bool causal; /* query i sees keys 0..i; tq == tk */
} ac_attention_attr;

typedef struct ac_activation_attr {
    ac_act act;
} ac_activation_attr;

typedef struct ac_scale_attr {
    float scale, offset;
} ac_scale_attr;

typedef struct ac_axis_attr { /* CONCAT; SLICE */
    int32_t axis;
    int64_t start; /* SLICE: elements along axis */
} ac_axis_attr;

/* diffusers' get_timestep_embedding: half = channels/2, frequency i is
 * exp(-ln(max_period) i / (half - freq_shift)); flip puts the cosines first. */
typedef struct ac_timestep_attr {
    int32_t channels;
    bool flip_sin_to_cos;
    float freq_shift;
} ac_timestep_attr;

/* transformers' two rules: eos_id 2 means "the highest id of the text" (old configs), any other
 * value "the first position that holds eos_id". */
typedef struct ac_eos_pool_attr {
    int64_t eos_id;
} ac_eos_pool_attr;

typedef struct ac_fill_attr {
    float value;
} ac_fill_attr;

typedef union ac_attr {
    ac_linear_attr linear;
    ac_conv2d_attr conv2d;
    ac_up_conv2d_attr up_conv2d;
    ac_group_norm_attr group_norm;
    ac_layer_norm_attr layer_norm;
    ac_attention_attr attention;
    ac_activation_attr activation; /* ACTIVATION, GATE */
    ac_scale_attr scale;
    ac_axis_attr axis; /* CONCAT, SLICE */
    ac_timestep_attr timestep;
    ac_eos_pool_attr eos_pool;
    ac_fill_attr fill;
} ac_attr;

/* Shape rule of an op: the result's shape, or a status with message that starts with what is
 * wrong ("w: found [3, 4], expected [.., 5]").  `input[i].rank` is -1 for an absent operand.
 * SLICE, RESHAPE, UPSAMPLE and FILL take the wanted shape in *out and check it. */
ac_status ac_op_shape(ac_op op, const ac_attr *attr, const ac_shape *input, int32_t n_inputs,
                      ac_shape *out);

/* Floating-point operations (a multiply-add is two) of one op on these shapes. */
double ac_op_flops(ac_op op, const ac_attr *attr, const ac_shape *input, int32_t n_inputs,
                   const ac_shape *out);

/* Attributes as text ("stride=2 pad=0,0,1,1 act=silu"), for dumps, cache keys and explain. */
void ac_op_attr_text(ac_op op, const ac_attr *attr, ac_text *text);
/* The same by name: {"stride": 2, "pad": [0, 0, 1, 1], "act": "silu"}. */
void ac_op_attr_json(ac_op op, const ac_attr *attr, ac_text *text);

/* ---- builder functions; graph.h has the graph ---------------------------------------------- */

typedef struct ac_graph ac_graph;
typedef int32_t ac_val; /* index of a value in its graph */
#define AC_NONE (-1)

ac_val ac_linear(ac_graph *g, ac_val x, ac_val w, ac_val b);
ac_val ac_conv2d(ac_graph *g, ac_val x, ac_val w, ac_val b, ac_conv2d_attr attr);
ac_val ac_group_norm(ac_graph *g, ac_val x, ac_val gamma, ac_val beta, int32_t groups, float eps);
ac_val ac_layer_norm(ac_graph *g, ac_val x, ac_val gamma, ac_val beta, float eps);
ac_val ac_attention(ac_graph *g, ac_val q, ac_val k, ac_val v, ac_val mask, ac_attention_attr attr);
ac_val ac_activation(ac_graph *g, ac_val x, ac_act act); /* AC_ACT_NONE returns x */
ac_val ac_gate(ac_graph *g, ac_val x, ac_act act);
ac_val ac_add(ac_graph *g, ac_val a, ac_val b);
ac_val ac_scale(ac_graph *g, ac_val x, float scale, float offset);
ac_val ac_concat(ac_graph *g, const ac_val *x, int32_t count, int32_t axis);
ac_val ac_slice(ac_graph *g, ac_val x, int32_t axis, int64_t start, int64_t length);
ac_val ac_reshape(ac_graph *g, ac_val x, ac_shape shape);
ac_val ac_upsample(ac_graph *g, ac_val x, int64_t height, int64_t width);
ac_val ac_timestep(ac_graph *g, ac_val t, ac_timestep_attr attr); /* [n] -> [n, channels] */
ac_val ac_embed(ac_graph *g, ac_val ids, ac_val table);           /* [n, t] -> [n, t, c] */
ac_val ac_select(ac_graph *g, ac_val table, ac_val index);        /* [s, ...] -> [...] */
ac_val ac_eos_pool(ac_graph *g, ac_val x, ac_val ids, int64_t eos_id); /* [n,t,c] -> [n,c] */
ac_val ac_to_nhwc(ac_graph *g, ac_val x);
ac_val ac_to_nchw(ac_graph *g, ac_val x, ac_dtype dtype);
ac_val ac_cast(ac_graph *g, ac_val x, ac_dtype dtype);
ac_val ac_fill(ac_graph *g, ac_shape shape, float value);

#endif
