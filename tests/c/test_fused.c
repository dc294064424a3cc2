/* Fused against unfused: little graphs run on one device with a pass on and with every pass off.
 * They must agree, and the number of nodes of some ops shows that the pass did, or rightly did not
 * do, what it is for. */
#include "little_graph.h"

static ac_val
image(ac_graph *g, const char *name, int64_t c)
{
    return ac_input(g, name, AC_F32, AC_SHAPE(2, 5, 6, c), AC_RATE_STEP);
}

static ac_val
tokens(ac_graph *g, const char *name, ac_rate rate)
{
    return ac_input(g, name, AC_F32, AC_SHAPE(2, 7, 12), rate);
}

/* ---- merge_linears --------------------------------------------------------------------------- */

static ac_val
attention(ac_graph *g, const char *name, ac_val x, ac_val context, bool bias)
{
    ac_push(g, "%s", name);
    ac_val q = linear(g, "to_q", x, 16, bias), k = linear(g, "to_k", context, 16, false);
    ac_val v = linear(g, "to_v", context, 16, bias);
    ac_val y = ac_attention(g, q, k, v, AC_NONE, (ac_attention_attr){.heads = 2, .scale = 0.3f});
    y = linear(g, "to_out", y, 12, true);
    ac_pop(g);
    return y;
}

/* QKV; one of the three without a bias. */
static void
self_attention(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP);
    ac_output(g, attention(g, "attn", x, x, true), "y0");
}

static void
self_attention_no_bias(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP);
    ac_output(g, attention(g, "attn", x, x, false), "y0");
}

/* K and V of three layers over one text, at prompt rate. */
static void
cross_attention(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP), text = tokens(g, "text", AC_RATE_PROMPT);
    for (int i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof name, "l%d", i);
        x = ac_add(g, attention(g, name, x, text, false), x);
    }
    ac_output(g, x, "y0");
}

/* Time projections of three resnets, of all steps, then the row of this step; `rows` images. */
static void
time_projections(ac_graph *g, int64_t rows)
{
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(5, rows, 12), AC_RATE_SCHEDULE);
    ac_val step = ac_input(g, "step", AC_I32, AC_SHAPE(1), AC_RATE_STEP), x = image(g, "x", 8);
    for (int i = 0; i < 3; i++) {
        ac_push(g, "r%d", i);
        ac_val shift = linear(g, "time", ac_activation(g, t, AC_ACT_SILU), 8, i != 1);
        x = ac_add(g, conv(g, "conv", x, 8, 1), ac_select(g, shift, step));
        ac_pop(g);
    }
    ac_output(g, x, "y0");
}

static void
time_one_row(ac_graph *g, uint64_t seed)
{
    (void)seed;
    time_projections(g, 1);
}

static void
time_row_an_image(ac_graph *g, uint64_t seed)
{
    (void)seed;
    time_projections(g, 2);
}

/* The same without our loop: no select, and a reshape in between. */
static void
time_reshaped(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(1, 2, 12), AC_RATE_SCHEDULE);
    ac_val x = image(g, "x", 8);
    for (int i = 0; i < 2; i++) {
        ac_push(g, "r%d", i);
        ac_val shift = ac_reshape(g, linear(g, "time", t, 8, true), AC_SHAPE(2, 8));
        x = ac_add(g, conv(g, "conv", x, 8, 1), shift);
        ac_pop(g);
    }
    ac_output(g, x, "y0");
}

/* Readers that want packed rows, graph outputs, and steps that differ: nothing to merge. */
static void
not_mergeable(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP), image_ = image(g, "image", 8);
    ac_output(g, linear(g, "a", x, 4, true), "y0");
    ac_output(g, ac_activation(g, linear(g, "b", x, 4, true), AC_ACT_RELU), "y1");
    ac_output(g, ac_add(g, linear(g, "e", x, 12, true), x), "y3");
    ac_output(g, ac_add(g, linear(g, "f", x, 12, true), x), "y4");
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(3, 2, 6), AC_RATE_SCHEDULE);
    ac_val one = ac_input(g, "one", AC_I32, AC_SHAPE(1), AC_RATE_STEP);
    ac_val two = ac_input(g, "two", AC_I32, AC_SHAPE(1), AC_RATE_STEP);
    image_ = ac_add(g, image_, ac_select(g, linear(g, "c", t, 8, true), one));
    image_ = ac_add(g, image_, ac_select(g, linear(g, "d", t, 8, true), two));
    ac_output(g, image_, "y2");
}

/* ---- simplify, cse --------------------------------------------------------------------------- */

static void
no_ops(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = image(g, "x", 8), step = ac_input(g, "zero", AC_U8, AC_SHAPE(1), AC_RATE_STEP);
    ac_val y = ac_scale(g, ac_reshape(g, x, AC_SHAPE(2, 30, 8)), 1.0f, 0.0f);
    y = ac_reshape(g, ac_reshape(g, y, AC_SHAPE(60, 8)), AC_SHAPE(2, 5, 6, 8));
    y = ac_slice(g, ac_slice(g, ac_slice(g, y, 3, 0, 8), 3, 1, 6), 3, 2, 4);
    y = ac_slice(g, y, 1, 1, 3); /* another axis */
    y = ac_upsample(g, ac_concat(g, &y, 1, 3), 3, 6);
    ac_val table = ac_input(g, "table", AC_F32, AC_SHAPE(1, 2, 4), AC_RATE_SCHEDULE);
    y = ac_add(g, y, ac_select(g, table, step));
    ac_output(g, ac_scale(g, y, 2.0f, 0.0f), "y0");
    ac_output(g, ac_scale(g, x, 1.0f, 0.0f), "y1"); /* an output keeps a value of its own */
}

static void
equal_nodes(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = image(g, "x", 8);
    ac_val a = ac_activation(g, ac_scale(g, x, 2.0f, 1.0f), AC_ACT_SILU);
    ac_val b = ac_activation(g, ac_scale(g, x, 2.0f, 1.0f), AC_ACT_SILU);
    ac_val c = ac_activation(g, ac_scale(g, x, 2.0f, 1.5f), AC_ACT_SILU); /* other attribute */
    ac_val d = ac_activation(g, ac_scale(g, x, 2.0f, 1.0f), AC_ACT_RELU);
    ac_output(g, ac_add(g, ac_add(g, a, b), ac_add(g, c, d)), "y0");
    ac_output(g, a, "y1");
    ac_output(g, b, "y2"); /* equal, but two outputs */
}

/* ---- phase_upsample -------------------------------------------------------------------------- */

static void
upsample_exact(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_output(g, conv(g, "conv", ac_upsample(g, image(g, "x", 8), 10, 12), 6, 1), "y0");
}

/* forward_upsample_size's odd target, a stride, and a second reader. */
static void
upsample_other(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = image(g, "x", 8), up = ac_upsample(g, x, 10, 12);
    ac_output(g, conv(g, "a", ac_upsample(g, x, 9, 12), 6, 1), "y0");
    ac_output(g, conv(g, "b", ac_upsample(g, x, 10, 12), 6, 2), "y1");
    ac_output(g, conv(g, "c", up, 8, 1), "y2");
    ac_output(g, ac_scale(g, up, 3.0f, 0.0f), "y3");
}

/* ---- fuse_norm ------------------------------------------------------------------------------- */

static void
norm_shift_act(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(2, 8), AC_RATE_SCHEDULE);
    ac_val one = ac_input(g, "one", AC_F32, AC_SHAPE(1, 8), AC_RATE_SCHEDULE);
    ac_val x = ac_add(g, conv(g, "conv", image(g, "x", 8), 8, 1), t);
    x = ac_activation(g, group_norm(g, "norm1", x), AC_ACT_SILU);
    x = group_norm(g, "norm2", ac_add(g, x, one));
    ac_output(g, ac_activation(g, x, AC_ACT_GELU), "y0");
}

/* A sum and a norm that something else reads too. */
static void
norm_shared(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(2, 8), AC_RATE_SCHEDULE);
    ac_val sum = ac_add(g, image(g, "x", 8), t), norm = group_norm(g, "norm", sum);
    ac_output(g, ac_add(g, ac_activation(g, norm, AC_ACT_SILU), norm), "y0");
    ac_output(g, ac_scale(g, sum, 2.0f, 0.0f), "y1");
}

/* An up block: the concat feeds the norm and the shortcut. */
static void
concat_free(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val both = ac_concat(g, (ac_val[]){image(g, "a", 8), image(g, "b", 4)}, 2, 3);
    ac_val h = ac_activation(g, group_norm(g, "norm", both), AC_ACT_SILU);
    ac_output(g, conv(g, "conv1", h, 8, 1), "y0");
    ac_output(g, linear(g, "shortcut", both, 8, true), "y1");
    ac_output(g, conv(g, "conv2", both, 8, 2), "y2");
}

/* Three parts; a reader of the whole; another axis. */
static void
concat_stays(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val a = image(g, "a", 8), b = image(g, "b", 4);
    ac_val three = ac_concat(g, (ac_val[]){a, b, a}, 3, 3);
    ac_val two = ac_concat(g, (ac_val[]){a, b}, 2, 3);
    ac_val rows = ac_concat(g, (ac_val[]){a, a}, 2, 1);
    ac_output(g, group_norm(g, "n3", three), "y0");
    ac_output(g, ac_add(g, group_norm(g, "n2", two), two), "y1");
    ac_output(g, group_norm(g, "rows", rows), "y2");
}

/* ---- fuse_epilogue --------------------------------------------------------------------------- */

static void
epilogues(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP), y = image(g, "y", 8);
    ac_val h = ac_gate(g, linear(g, "proj", x, 20, true), AC_ACT_GELU);
    ac_output(g, ac_add(g, linear(g, "out", h, 12, true), x), "y0");
    h = ac_activation(g, linear(g, "fc", x, 12, false), AC_ACT_QUICK_GELU);
    ac_output(g, ac_add(g, x, h), "y1"); /* residual first */
    h = ac_activation(g, conv(g, "conv", y, 8, 1), AC_ACT_RELU);
    ac_output(g, ac_add(g, h, y), "y2");
}

/* conv2 and the shortcut of a resnet, and a transformer's residual behind a reshape. */
static void
residuals(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = image(g, "x", 8);
    ac_val h = ac_add(g, conv(g, "conv2", x, 12, 1), linear(g, "shortcut", x, 12, true));
    ac_val t = linear(g, "proj_out", ac_reshape(g, h, AC_SHAPE(2, 30, 12)), 12, true);
    h = ac_add(g, ac_reshape(g, t, AC_SHAPE(2, 5, 6, 12)), h);
    ac_output(g, group_norm(g, "norm", h), "y0");
}

/* A GEMM or a norm takes one activation and one residual; the next ones stay, and so does an
 * activation after a residual. */
static void
only_one(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP), y = image(g, "y", 8);
    ac_val h = ac_activation(g, linear(g, "a", x, 12, true), AC_ACT_SILU);
    ac_output(g, ac_activation(g, h, AC_ACT_RELU), "y0");
    ac_output(g, ac_add(g, ac_add(g, linear(g, "b", x, 12, true), x), x), "y1");
    ac_output(g, ac_activation(g, ac_add(g, linear(g, "c", x, 12, true), x), AC_ACT_GELU), "y2");
    h = ac_activation(g, group_norm(g, "norm", y), AC_ACT_SILU);
    ac_output(g, ac_activation(g, h, AC_ACT_QUICK_GELU), "y3");
}

/* The result is read twice; what is added is broadcast; a slow linear is added to fast values; a
 * gate has no residual; a slice with gaps has no reshape. */
static void
no_epilogues(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val x = tokens(g, "x", AC_RATE_STEP), slow = tokens(g, "slow", AC_RATE_PROMPT);
    ac_val twice = linear(g, "twice", x, 12, true);
    ac_output(g, ac_add(g, ac_activation(g, twice, AC_ACT_SILU), twice), "y0");
    ac_output(g, ac_add(g, linear(g, "slow_linear", slow, 12, true), x), "y1");
    ac_val rows = ac_input(g, "rows", AC_F32, AC_SHAPE(2, 12), AC_RATE_STEP);
    ac_output(g, ac_add(g, linear(g, "broadcast", x, 12, true), rows), "y2");
    ac_output(g, ac_add(g, ac_gate(g, linear(g, "gated", x, 24, true), AC_ACT_GELU), x), "y3");
    ac_val reshaped = ac_reshape(g, linear(g, "flat", x, 4, true), AC_SHAPE(2, 7, 1, 4));
    ac_val wide = ac_input(g, "wide", AC_F32, AC_SHAPE(2, 7, 1, 8), AC_RATE_STEP);
    ac_output(g, ac_add(g, reshaped, ac_slice(g, wide, 3, 2, 4)), "y4");
}

/* ---- the table ------------------------------------------------------------------------------- */

typedef struct op_count {
    ac_op op;
    int32_t before, after;
} op_count;

static const struct {
    const char *name;
    const char *on;   /* passes */
    little_build build;
    op_count count[4]; /* ends with before 0 */
} cases[] = {
    {"qkv", "merge_linears", self_attention, {{AC_OP_LINEAR, 4, 2}, {AC_OP_SLICE, 0, 3}}},
    {"qkv without bias", "merge_linears", self_attention_no_bias, {{AC_OP_LINEAR, 4, 2}}},
    {"k and v of a text", "merge_linears", cross_attention, {{AC_OP_LINEAR, 12, 7}}},
    {"time, one row", "cse,merge_linears", time_one_row,
     {{AC_OP_LINEAR, 3, 1}, {AC_OP_SELECT, 3, 1}, {AC_OP_ACTIVATION, 3, 1}}},
    {"time, a row an image", "cse,merge_linears", time_row_an_image,
     {{AC_OP_LINEAR, 3, 1}, {AC_OP_SELECT, 3, 1}}},
    {"time, reshaped", "merge_linears", time_reshaped,
     {{AC_OP_LINEAR, 2, 1}, {AC_OP_RESHAPE, 2, 1}}},
    {"not mergeable", "merge_linears", not_mergeable, {{AC_OP_LINEAR, 6, 6}}},
    {"no-ops", "simplify", no_ops,
     {{AC_OP_RESHAPE, 3, 1}, {AC_OP_SLICE, 4, 2}, {AC_OP_SCALE, 3, 2}, {AC_OP_SELECT, 1, 0}}},
    {"equal nodes", "cse", equal_nodes, {{AC_OP_SCALE, 4, 2}, {AC_OP_ACTIVATION, 4, 4}}},
    {"upsample by 2", "phase_upsample", upsample_exact,
     {{AC_OP_UPSAMPLE, 1, 0}, {AC_OP_CONV2D, 1, 0}, {AC_OP_UP_CONV2D, 0, 1}}},
    {"other upsamples", "phase_upsample", upsample_other, {{AC_OP_UPSAMPLE, 3, 3}}},
    {"norm", "fuse_norm", norm_shift_act, {{AC_OP_ADD, 2, 0}, {AC_OP_ACTIVATION, 2, 0}}},
    {"shared norm", "fuse_norm", norm_shared, {{AC_OP_ADD, 2, 2}, {AC_OP_ACTIVATION, 1, 1}}},
    {"concat", "fuse_norm", concat_free, {{AC_OP_CONCAT, 1, 0}, {AC_OP_ACTIVATION, 1, 0}}},
    {"concat stays", "fuse_norm", concat_stays, {{AC_OP_CONCAT, 3, 3}}},
    {"epilogues", "fuse_epilogue", epilogues,
     {{AC_OP_ADD, 3, 0}, {AC_OP_ACTIVATION, 2, 0}, {AC_OP_GATE, 1, 0}}},
    {"residuals", "fuse_epilogue", residuals, {{AC_OP_ADD, 2, 0}, {AC_OP_RESHAPE, 2, 3}}},
    {"only one epilogue", "fuse_norm,fuse_epilogue", only_one,
     {{AC_OP_ADD, 3, 1}, {AC_OP_ACTIVATION, 5, 3}}},
    {"no epilogues", "fuse_epilogue", no_epilogues,
     {{AC_OP_ADD, 5, 5}, {AC_OP_ACTIVATION, 1, 1}, {AC_OP_GATE, 1, 0}}},
};

static void
each_case(ac_dtype weights)
{
    for (size_t i = 0; i < AC_ARRAY_LEN(cases); i++) {
        little_result plain, fused, all;
        uint32_t off;
        CHECK_OK(ac_passes_off_from_text("all", &off));
        little_run(cases[i].build, 1, off, weights, &plain);
        little_run(cases[i].build, 1, little_only(cases[i].on), weights, &fused);
        little_run(cases[i].build, 1, 0, weights, &all);
        for (const op_count *c = cases[i].count; c < cases[i].count + 4; c++) {
            if (c->before == 0 && c->after == 0) {
                break;
            }
            if (plain.ops[c->op] != c->before || fused.ops[c->op] != c->after) {
                TEST_FAIL("%s: found %d and %d %s, expected %d and %d", cases[i].name,
                          plain.ops[c->op], fused.ops[c->op], ac_op_name(c->op), c->before,
                          c->after);
            }
        }
        if (!(little_error(&fused, &plain) <= TOLERANCE)) {
            TEST_FAIL("%s: off by %g", cases[i].name, little_error(&fused, &plain));
        }
        if (!(little_error(&all, &plain) <= TOLERANCE)) {
            TEST_FAIL("%s, all passes: off by %g", cases[i].name, little_error(&all, &plain));
        }
        little_result_free(&plain);
        little_result_free(&fused);
        little_result_free(&all);
    }
}

static void
fused_equals_unfused(void)
{
    printf("(ran on %s) ", little_device());
    each_case(AC_F32);
}

static void
with_half_weights(void)
{
    each_case(AC_F16);
}

/* A weight of another dtype is cast once, and a merged one is made in f32 at once. */
static void
casts(void)
{
    little_result r;
    little_run(self_attention, 1, little_only("merge_linears"), AC_BF16, &r);
    CHECK_INT(r.ops[AC_OP_CAST], 2); /* to_out's weight and bias */
    CHECK(strstr(r.text, "= concat attn.to_q.weight attn.to_k.weight attn.to_v.weight"));
    little_result_free(&r);
    little_run(self_attention, 1, little_only("merge_linears"), AC_F32, &r);
    CHECK_INT(r.ops[AC_OP_CAST], 0);
    little_result_free(&r);
}

static void
shared_weight(ac_graph *g, uint64_t seed)
{
    (void)seed;
    ac_val w = ac_weight(g, "w", AC_SHAPE(12, 12)), x = tokens(g, "x", AC_RATE_STEP);
    ac_output(g, ac_linear(g, ac_linear(g, x, w, AC_NONE), w, AC_NONE), "y0");
}

static void
one_cast_a_weight(void)
{
    little_result r;
    little_run(shared_weight, 1, 0, AC_F16, &r);
    CHECK_INT(r.ops[AC_OP_CAST], 1);
    little_result_free(&r);
}

static ac_graph *
fresh_graph(little_build build)
{
    ac_graph *g;
    CHECK_OK(ac_graph_new(AC_F32, &g));
    build(g, 1);
    return g;
}

/* Joining an f32 weight with an f16 one would round it: only those of one dtype are merged. */
static void
mixed_dtypes(void)
{
    int32_t linears = 0;
    ac_graph *g = fresh_graph(self_attention);
    g->values[ac_map_get(&g->weights, "attn.to_q.weight")].dtype = AC_F16;
    CHECK_OK(ac_passes_run(g, 0, NULL));
    for (int32_t i = 0; i < g->n_nodes; i++) {
        linears += g->nodes[i].op == AC_OP_LINEAR;
    }
    CHECK_INT(linears, 3); /* q, k with v, out */
    ac_graph_free(g);
}

/* Where the concat is in memory in any case, nothing reads two tensors. */
static void
concat_in_one_piece(void)
{
    ac_graph *g = fresh_graph(concat_stays);
    CHECK_OK(ac_passes_run(g, 0, NULL));
    for (int32_t i = 0; i < g->n_nodes; i++) {
        CHECK(g->nodes[i].op != AC_OP_GROUP_NORM || g->nodes[i].n_inputs == 3);
    }
    ac_graph_free(g);
}

/* Another weight gives another result, far beyond the tolerance: the runs do read them. */
static void
seeds_matter(void)
{
    little_result a, b;
    for (size_t i = 0; i < AC_ARRAY_LEN(cases); i++) {
        little_run(cases[i].build, 1, 0, AC_F32, &a);
        little_run(cases[i].build, 2, 0, AC_F32, &b);
        CHECK(little_error(&a, &b) > 100 * TOLERANCE);
        little_result_free(&a);
        little_result_free(&b);
    }
}

TEST_MAIN(TEST(fused_equals_unfused), TEST(with_half_weights), TEST(casts),
          TEST(one_cast_a_weight), TEST(mixed_dtypes), TEST(concat_in_one_piece),
          TEST(seeds_matter))
