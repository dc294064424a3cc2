/* ops: names, shape rules and FLOPs, one function per op and purpose.
 *
 * A rule checks what it is given and fills *out; it assumes nothing, since models are built from
 * configs that come from outside.  A row in ops.def without a rule here does not compile.
 */
#include "ops.h"

#include <string.h>

typedef struct rule_args {
    const ac_attr *attr;
    const ac_shape *in;
    int32_t n;
    ac_shape *out;
} rule_args;

typedef ac_status (*shape_rule)(rule_args a);

#define X(NAME, name, view, operands, meaning) static ac_status shape_##name(rule_args a);
#include "ops.def"
#undef X

typedef struct op_row {
    const char *name, *operands, *meaning;
    bool view;
    shape_rule shape;
} op_row;

static const op_row ops[AC_OP_COUNT] = {
#define X(NAME, name, view, operands, meaning) {#name, operands, meaning, view, shape_##name},
#include "ops.def"
#undef X
};

static const char *const acts[AC_ACT_COUNT] = {"none",      "silu",       "gelu",
                                               "gelu_tanh", "quick_gelu", "relu"};

const char *
ac_op_name(ac_op op)
{
    return ops[op].name;
}

bool
ac_op_is_view(ac_op op)
{
    return ops[op].view;
}

const char *
ac_op_operands(ac_op op)
{
    return ops[op].operands;
}

const char *
ac_op_meaning(ac_op op)
{
    return ops[op].meaning;
}

const char *
ac_act_name(ac_act act)
{
    return acts[act];
}

/* ---- helpers of the rules ------------------------------------------------------------------- */

static bool
has(rule_args a, int32_t slot)
{
    return slot < a.n && a.in[slot].rank >= 0;
}

/* Checks one operand; entries of `expected` below 0 match anything. */
static ac_status
expect(const char *what, const ac_shape *found, const ac_shape *expected)
{
    bool same = found->rank == expected->rank;
    for (int i = 0; same && i < expected->rank; i++) {
        same = expected->dim[i] < 0 || found->dim[i] == expected->dim[i];
    }
    if (same) {
        return AC_OK;
    }
    char left[AC_SHAPE_TEXT], right[AC_SHAPE_TEXT];
    return ac_error(AC_E_SHAPE, "%s: found %s, expected %s", what, ac_shape_text(found, left),
                    ac_shape_text(expected, right));
}

static ac_status
expect_rank(const char *what, const ac_shape *found, int32_t least, int32_t most)
{
    if (found->rank >= least && found->rank <= most) {
        return AC_OK;
    }
    char text[AC_SHAPE_TEXT];
    return ac_error(AC_E_SHAPE, "%s: found %s, expected %d to %d dimensions", what,
                    ac_shape_text(found, text), least, most);
}

static ac_status
expect_vector(rule_args a, int32_t slot, const char *what, int64_t length)
{
    return has(a, slot) ? expect(what, &a.in[slot], &AC_SHAPE(length)) : AC_OK;
}

/* x with x2 beside it: x2 has x's shape but for its last dimension; returns their sum in *c. */
static ac_status
both_channels(rule_args a, int32_t x2, int64_t *c)
{
    const ac_shape *x = &a.in[0];
    *c = x->dim[x->rank - 1];
    if (has(a, x2)) {
        ac_shape expected = *x;
        expected.dim[x->rank - 1] = -1;
        AC_TRY(expect("x2", &a.in[x2], &expected));
        *c += a.in[x2].dim[x->rank - 1];
    }
    return AC_OK;
}

static ac_status
same_as_x(rule_args a)
{
    AC_TRY(expect_rank("x", &a.in[0], 1, AC_MAX_RANK));
    *a.out = a.in[0];
    return AC_OK;
}

/* ---- shape rules, in the order of ops.def ---------------------------------------------------- */

static ac_status
shape_linear(rule_args a)
{
    int64_t k;
    const ac_shape *w = &a.in[AC_LINEAR_W];
    AC_TRY(expect_rank("x", &a.in[0], 1, AC_MAX_RANK));
    AC_TRY(both_channels(a, AC_LINEAR_X2, &k));
    if (w->rank == 4) {
        AC_TRY(expect("w", w, &AC_SHAPE(-1, k, 1, 1)));
    } else {
        AC_TRY(expect("w", w, &AC_SHAPE(-1, k)));
    }
    AC_TRY(expect_vector(a, AC_LINEAR_B, "b", w->dim[0]));
    *a.out = a.in[0];
    a.out->dim[a.out->rank - 1] = w->dim[0];
    if (a.attr->linear.gated) {
        if (w->dim[0] % 2) {
            return ac_error(AC_E_SHAPE, "w: found %lld rows, expected an even number (gated)",
                            (long long)w->dim[0]);
        }
        a.out->dim[a.out->rank - 1] /= 2;
    }
    return has(a, AC_LINEAR_RESIDUAL) ? expect("residual", &a.in[AC_LINEAR_RESIDUAL], a.out)
                                      : AC_OK;
}

static ac_status
shape_conv2d(rule_args a)
{
    const ac_conv2d_attr *attr = &a.attr->conv2d;
    const ac_shape *x = &a.in[0], *w = &a.in[AC_CONV_W];
    int64_t c;
    AC_TRY(expect_rank("x", x, 4, 4));
    AC_TRY(both_channels(a, AC_CONV_X2, &c));
    AC_TRY(expect("w", w, &AC_SHAPE(-1, c, -1, -1)));
    AC_TRY(expect_vector(a, AC_CONV_B, "b", w->dim[0]));
    if (attr->stride < 1 || attr->pad_top < 0 || attr->pad_left < 0 || attr->pad_bottom < 0 ||
        attr->pad_right < 0) {
        return ac_error(AC_E_SHAPE, "conv2d: found stride %d and a padding below 0, expected "
                                    "stride 1 or more", attr->stride);
    }
    int64_t height = x->dim[1] + attr->pad_top + attr->pad_bottom - w->dim[2];
    int64_t width = x->dim[2] + attr->pad_left + attr->pad_right - w->dim[3];
    if (height < 0 || width < 0) {
        return ac_error(AC_E_SHAPE, "x: found %lldx%lld pixels, expected at least the kernel's "
                                    "%lldx%lld after padding", (long long)x->dim[1],
                        (long long)x->dim[2], (long long)w->dim[2], (long long)w->dim[3]);
    }
    *a.out = AC_SHAPE(x->dim[0], height / attr->stride + 1, width / attr->stride + 1, w->dim[0]);
    return has(a, AC_CONV_RESIDUAL) ? expect("residual", &a.in[AC_CONV_RESIDUAL], a.out) : AC_OK;
}

static ac_status
shape_up_conv2d(rule_args a)
{
    const ac_shape *x = &a.in[0], *w = &a.in[AC_CONV_W];
    AC_TRY(expect_rank("x", x, 4, 4));
    AC_TRY(expect("w", w, &AC_SHAPE(4, -1, x->dim[3], 2, 2)));
    AC_TRY(expect_vector(a, AC_CONV_B, "b", w->dim[1]));
    *a.out = AC_SHAPE(x->dim[0], 2 * x->dim[1], 2 * x->dim[2], w->dim[1]);
    return has(a, AC_CONV_RESIDUAL) ? expect("residual", &a.in[AC_CONV_RESIDUAL], a.out) : AC_OK;
}

static ac_status
shape_group_norm(rule_args a)
{
    int64_t c;
    const ac_shape *x = &a.in[0];
    AC_TRY(expect_rank("x", x, 2, AC_MAX_RANK));
    AC_TRY(both_channels(a, AC_GN_X2, &c));
    AC_TRY(expect_vector(a, AC_GN_GAMMA, "gamma", c));
    AC_TRY(expect_vector(a, AC_GN_BETA, "beta", c));
    if (has(a, AC_GN_SHIFT)) {
        const ac_shape *shift = &a.in[AC_GN_SHIFT];
        AC_TRY(expect("shift", shift, &AC_SHAPE(shift->dim[0] == 1 ? 1 : x->dim[0], c)));
    }
    int32_t groups = a.attr->group_norm.groups;
    if (groups < 1 || c % groups) {
        return ac_error(AC_E_SHAPE, "group_norm: found %lld channels, expected a multiple of %d "
                                    "groups", (long long)c, groups);
    }
    *a.out = *x;
    a.out->dim[x->rank - 1] = c;
    return AC_OK;
}

static ac_status
shape_layer_norm(rule_args a)
{
    AC_TRY(same_as_x(a));
    int64_t c = a.in[0].dim[a.in[0].rank - 1];
    AC_TRY(expect_vector(a, AC_LN_GAMMA, "gamma", c));
    return expect_vector(a, AC_LN_BETA, "beta", c);
}

static ac_status
shape_attention(rule_args a)
{
    const ac_shape *q = &a.in[AC_ATTN_Q], *k = &a.in[AC_ATTN_K];
    int32_t heads = a.attr->attention.heads;
    AC_TRY(expect_rank("q", q, 3, 3));
    AC_TRY(expect("k", k, &AC_SHAPE(q->dim[0], -1, q->dim[2])));
    AC_TRY(expect("v", &a.in[AC_ATTN_V], k));
    if (has(a, AC_ATTN_MASK)) {
        AC_TRY(expect("mask", &a.in[AC_ATTN_MASK], &AC_SHAPE(q->dim[0], k->dim[1])));
    }
    if (heads < 1 || q->dim[2] % heads) {
        return ac_error(AC_E_SHAPE, "attention: found %lld channels, expected a multiple of %d "
                                    "heads", (long long)q->dim[2], heads);
    }
    if (a.attr->attention.causal && q->dim[1] != k->dim[1]) {
        return ac_error(AC_E_SHAPE, "attention: found %lld queries and %lld keys, expected the "
                                    "same number (causal)", (long long)q->dim[1],
                        (long long)k->dim[1]);
    }
    *a.out = *q;
    return AC_OK;
}

static ac_status
shape_activation(rule_args a)
{
    return same_as_x(a);
}

static ac_status
shape_gate(rule_args a)
{
    AC_TRY(same_as_x(a));
    int64_t *last = &a.out->dim[a.out->rank - 1];
    if (*last % 2) {
        return ac_error(AC_E_SHAPE, "gate: found %lld columns, expected an even number",
                        (long long)*last);
    }
    *last /= 2;
    return AC_OK;
}

static ac_status
shape_add(rule_args a)
{
    const ac_shape *x = &a.in[0], *y = &a.in[1];
    AC_TRY(same_as_x(a));
    if (ac_shape_equal(x, y)) {
        return AC_OK;
    }
    int64_t n = y->rank == 2 && y->dim[0] == 1 ? 1 : x->dim[0];
    return expect("b", y, &AC_SHAPE(n, x->dim[x->rank - 1]));
}

static ac_status
shape_scale(rule_args a)
{
    return same_as_x(a);
}

static ac_status
shape_concat(rule_args a)
{
    AC_TRY(same_as_x(a));
    int32_t axis = a.attr->axis.axis;
    if (axis < 0 || axis >= a.out->rank) {
        return ac_error(AC_E_SHAPE, "concat: found axis %d, expected 0 to %d", axis,
                        a.out->rank - 1);
    }
    for (int32_t i = 1; i < a.n; i++) {
        ac_shape expected = a.in[0];
        expected.dim[axis] = -1;
        AC_TRY(expect("x", &a.in[i], &expected));
        a.out->dim[axis] += a.in[i].dim[axis];
    }
    return AC_OK;
}

static ac_status
shape_upsample(rule_args a)
{
    AC_TRY(expect_rank("x", &a.in[0], 4, 4));
    ac_shape expected = AC_SHAPE(a.in[0].dim[0], -1, -1, a.in[0].dim[3]);
    AC_TRY(expect("upsample", a.out, &expected));
    if (a.out->dim[1] < 1 || a.out->dim[2] < 1 || a.in[0].dim[1] < 1 || a.in[0].dim[2] < 1) {
        return ac_error(AC_E_SHAPE, "upsample: found an empty image, expected 1x1 or more");
    }
    return AC_OK;
}

static ac_status
shape_timestep(rule_args a)
{
    AC_TRY(expect("t", &a.in[0], &AC_SHAPE(-1)));
    if (a.attr->timestep.channels < 2) {
        return ac_error(AC_E_SHAPE, "timestep: found %d channels, expected 2 or more",
                        a.attr->timestep.channels);
    }
    *a.out = AC_SHAPE(a.in[0].dim[0], a.attr->timestep.channels);
    return AC_OK;
}

static ac_status
shape_embed(rule_args a)
{
    AC_TRY(expect_rank("ids", &a.in[0], 1, 2));
    AC_TRY(expect("table", &a.in[1], &AC_SHAPE(-1, -1)));
    *a.out = a.in[0];
    a.out->dim[a.out->rank++] = a.in[1].dim[1];
    return AC_OK;
}

static ac_status
shape_select(rule_args a)
{
    AC_TRY(expect_rank("table", &a.in[0], 2, AC_MAX_RANK));
    AC_TRY(expect("index", &a.in[1], &AC_SHAPE(1)));
    *a.out = (ac_shape){.rank = a.in[0].rank - 1};
    memcpy(a.out->dim, a.in[0].dim + 1, sizeof(int64_t) * (size_t)a.out->rank);
    return AC_OK;
}

static ac_status
shape_eos_pool(rule_args a)
{
    const ac_shape *x = &a.in[0];
    AC_TRY(expect_rank("x", x, 3, 3));
    AC_TRY(expect("ids", &a.in[1], &AC_SHAPE(x->dim[0], x->dim[1])));
    *a.out = AC_SHAPE(x->dim[0], x->dim[2]);
    return AC_OK;
}

static ac_status
shape_to_nhwc(rule_args a)
{
    const ac_shape *x = &a.in[0];
    AC_TRY(expect_rank("x", x, 4, 4));
    *a.out = AC_SHAPE(x->dim[0], x->dim[2], x->dim[3], x->dim[1]);
    return AC_OK;
}

static ac_status
shape_to_nchw(rule_args a)
{
    const ac_shape *x = &a.in[0];
    AC_TRY(expect_rank("x", x, 4, 4));
    *a.out = AC_SHAPE(x->dim[0], x->dim[3], x->dim[1], x->dim[2]);
    return AC_OK;
}

static ac_status
shape_cast(rule_args a)
{
    *a.out = a.in[0];
    return AC_OK;
}

static ac_status
shape_fill(rule_args a)
{
    return expect_rank("fill", a.out, 0, AC_MAX_RANK);
}

static ac_status
shape_phase_weight(rule_args a)
{
    AC_TRY(expect("w", &a.in[0], &AC_SHAPE(-1, -1, 3, 3)));
    *a.out = AC_SHAPE(4, a.in[0].dim[0], a.in[0].dim[1], 2, 2);
    return AC_OK;
}

static ac_status
shape_slice(rule_args a)
{
    int32_t axis = a.attr->axis.axis;
    const ac_shape *x = &a.in[0];
    ac_shape expected = *x;
    if (axis < 0 || axis >= x->rank) {
        return ac_error(AC_E_SHAPE, "slice: found axis %d, expected 0 to %d", axis, x->rank - 1);
    }
    expected.dim[axis] = -1;
    AC_TRY(expect("slice", a.out, &expected));
    int64_t start = a.attr->axis.start, length = a.out->dim[axis];
    if (start < 0 || length < 0 || start > x->dim[axis] - length) {
        return ac_error(AC_E_SHAPE, "slice: found %lld from %lld, expected to stay within %lld",
                        (long long)length, (long long)start, (long long)x->dim[axis]);
    }
    return AC_OK;
}

static ac_status
shape_reshape(rule_args a)
{
    int64_t found = ac_shape_count(a.out), wanted = ac_shape_count(&a.in[0]);
    if (found != wanted || found < 0) {
        char left[AC_SHAPE_TEXT], right[AC_SHAPE_TEXT];
        return ac_error(AC_E_SHAPE, "reshape: found %s, expected the %lld elements of %s",
                        ac_shape_text(a.out, left), (long long)wanted,
                        ac_shape_text(&a.in[0], right));
    }
    return AC_OK;
}

/* ---- entry points ---------------------------------------------------------------------------- */

/* Fewest operands an op needs: the words of its operand text that carry no '?'. */
static int32_t
required_operands(ac_op op)
{
    int32_t count = 0;
    for (const char *c = ops[op].operands; *c;) {
        const char *end = c + strcspn(c, " ");
        count += end[-1] != '?';
        c = end + strspn(end, " ");
    }
    return count;
}

ac_status
ac_op_shape(ac_op op, const ac_attr *attr, const ac_shape *input, int32_t n_inputs, ac_shape *out)
{
    int32_t required = required_operands(op);
    bool complete = n_inputs >= required;
    for (int32_t i = 0; complete && i < required; i++) {
        complete = input[i].rank >= 0;
    }
    if (!complete) {
        return ac_error(AC_E_INTERNAL, "%s: found %d operands, expected \"%s\"", ops[op].name,
                        n_inputs, ops[op].operands);
    }
    AC_TRY(ops[op].shape((rule_args){attr, input, n_inputs, out}));
    int64_t count = ac_shape_count(out), bytes;
    if (count < 0 || !ac_mul_i64(count, 8, &bytes)) {
        return ac_error(AC_E_SHAPE, "%s: the result has more elements than memory can hold",
                        ops[op].name);
    }
    return AC_OK;
}

double
ac_op_flops(ac_op op, const ac_attr *attr, const ac_shape *input, int32_t n_inputs,
            const ac_shape *out)
{
    double result = (double)ac_shape_count(out);
    (void)n_inputs;
    switch (op) {
    case AC_OP_LINEAR: {
        const ac_shape *w = &input[AC_LINEAR_W];
        return 2.0 * result * (double)w->dim[1] * (attr->linear.gated ? 2 : 1);
    }
    case AC_OP_CONV2D: {
        const ac_shape *w = &input[AC_CONV_W];
        return 2.0 * result * (double)(w->dim[1] * w->dim[2] * w->dim[3]);
    }
    case AC_OP_UP_CONV2D:
        return 2.0 * result * 4.0 * (double)input[AC_CONV_W].dim[2];
    case AC_OP_ATTENTION: /* q k^T and the product with v */
        return 4.0 * result * (double)input[AC_ATTN_K].dim[1];
    case AC_OP_GROUP_NORM:
    case AC_OP_LAYER_NORM:
        return 8.0 * result;
    case AC_OP_ACTIVATION:
    case AC_OP_GATE:
        return 4.0 * result;
    case AC_OP_ADD:
    case AC_OP_SCALE:
        return result;
    default:
        return 0.0;
    }
}
