/* The list of passes: names, masks, dumps, memory running out, what is left of the real models and
 * how long it takes.  test_fused.c checks what each pass computes. */
#include "test.h"

#include "../../csrc/models/models.h"
#include "../../csrc/passes/passes.h"

#include <time.h>

static int32_t
pass_count(void)
{
    int32_t n = 0;
    while (ac_passes[n]) {
        n++;
    }
    return n;
}

static void
masks(void)
{
    uint32_t off = 99, all = (UINT32_C(1) << pass_count()) - 1;
    CHECK_OK(ac_passes_off_from_text("", &off));
    CHECK_INT(off, 0);
    CHECK_OK(ac_passes_off_from_text("all", &off));
    CHECK_INT(off, all);
    CHECK_OK(ac_passes_off_from_text(NULL, &off));
    CHECK_INT(off, 0);
    for (int32_t i = 0; ac_passes[i]; i++) {
        CHECK_OK(ac_passes_off_from_text(ac_passes[i]->name, &off));
        CHECK_INT(off, 1 << i);
        CHECK(ac_passes[i]->why && ac_passes[i]->run);
    }
    CHECK_OK(ac_passes_off_from_text("cse,simplify", &off));
    CHECK_INT(off, 3);
    off = 7;
    CHECK_STATUS(ac_passes_off_from_text("cse,fuse", &off), AC_E_INVALID,
                 "found \"fuse\", expected some of simplify, cse,");
    CHECK_STATUS(ac_passes_off_from_text("alls", &off), AC_E_INVALID, "found \"alls\"");
    CHECK_STATUS(ac_passes_off_from_text(",cse", &off), AC_E_INVALID, "found \"\"");
    CHECK_INT(off, 7);
}

/* ---- real models ----------------------------------------------------------------------------- */

typedef struct model {
    ac_arena arena;
    const ac_model_class *cls;
    void *config;
} model;

static void
model_read(model *m, const char *name)
{
    static char text[1 << 16];
    char path[200];
    const ac_json *json;
    *m = (model){0};
    ac_arena_init(&m->arena);
    snprintf(path, sizeof path, "tests/configs/%s.json", name);
    FILE *file = fopen(path, "rb");
    if (!file) {
        TEST_FAIL("%s: cannot be opened; run from the repository's root", path);
    }
    size_t size = fread(text, 1, sizeof text, file);
    fclose(file);
    CHECK_OK(ac_json_parse(&m->arena, text, size, path, &json));
    CHECK_OK(ac_model_class_find(json, &m->cls));
    m->config = ac_arena_alloc(&m->arena, m->cls->config_size);
    CHECK_OK(m->cls->parse(json, m->config));
}

static ac_graph *
build(const model *m, const ac_build_args *args)
{
    ac_graph *g;
    CHECK_OK(ac_graph_new(AC_F32, &g));
    m->cls->build(m->config, args, g);
    CHECK_OK(ac_graph_status(g));
    return g;
}

/* Nodes of an op at a rate; rate AC_RATE_COUNT: at any but LOAD. */
static int32_t
count(const ac_graph *g, ac_op op, ac_rate rate)
{
    int32_t n = 0;
    for (int32_t i = 0; i < g->n_nodes; i++) {
        ac_rate found = g->values[g->nodes[i].output].rate;
        n += g->nodes[i].op == op && (rate == AC_RATE_COUNT ? found > AC_RATE_LOAD : found == rate);
    }
    return n;
}

static const ac_build_args unet_loop = {.entry = "forward", .batch = 2, .height = 64, .width = 64,
                                        .tokens = 77, .timesteps = 20, .loop = true};
static const ac_build_args unet_call = {.entry = "forward", .batch = 2, .height = 64, .width = 64,
                                        .tokens = 77, .timesteps = 1};

/* What is said in every UNet, in our loop and called from outside. */
static void
check_unet(const char *name, const ac_build_args *args, bool text_time)
{
    model m;
    model_read(&m, name);
    ac_graph *g = build(&m, args);
    CHECK_OK(ac_graph_sort(g));
    int32_t attention = count(g, AC_OP_ATTENTION, AC_RATE_STEP), before = g->n_nodes;
    int32_t slow = count(g, AC_OP_LINEAR, AC_RATE_PROMPT);
    CHECK_OK(ac_passes_run(g, 0, NULL));
    CHECK_OK(ac_graph_verify(g));
    int32_t extra = text_time ? 2 : 0; /* add_embedding's two */
    CHECK_INT(slow, attention + extra);  /* two for each cross-attention, half of all */
    CHECK_INT(count(g, AC_OP_LINEAR, AC_RATE_PROMPT), 1 + extra);   /* K and V of all layers */
    CHECK_INT(count(g, AC_OP_LINEAR, AC_RATE_SCHEDULE), 2 + 1);     /* time MLP; all projections */
    CHECK_INT(count(g, AC_OP_SELECT, AC_RATE_STEP), args->loop);
    CHECK_INT(count(g, AC_OP_CONCAT, AC_RATE_STEP), 0);
    CHECK_INT(count(g, AC_OP_ACTIVATION, AC_RATE_STEP), 0);
    CHECK_INT(count(g, AC_OP_ADD, AC_RATE_STEP), 0);
    CHECK_INT(count(g, AC_OP_GATE, AC_RATE_COUNT), 0);
    CHECK_INT(count(g, AC_OP_UPSAMPLE, AC_RATE_COUNT), 0);
    CHECK(count(g, AC_OP_UP_CONV2D, AC_RATE_STEP) > 0);
    CHECK(count(g, AC_OP_ACTIVATION, AC_RATE_COUNT) <= 1); /* silu(temb), once */
    printf("\n    %-18s %s %4d nodes, %4d after ", name, args->loop ? "loop" : "call", before,
           g->n_nodes);
    ac_graph_free(g);
    ac_arena_deinit(&m.arena);
}

static void
unets(void)
{
    static const char *const names[] = {"sd15_unet", "sd21_unet", "sdxl_base_unet",
                                        "sdxl_refiner_unet"};
    for (size_t i = 0; i < AC_ARRAY_LEN(names); i++) {
        check_unet(names[i], &unet_loop, i > 1);
        check_unet(names[i], &unet_call, i > 1);
    }
}

static void
vae_and_clip(void)
{
    model m;
    model_read(&m, "sd_vae");
    ac_graph *g = build(&m, &(ac_build_args){.entry = "decode", .batch = 1, .height = 64,
                                             .width = 64});
    CHECK_OK(ac_passes_run(g, 0, NULL));
    CHECK_INT(count(g, AC_OP_UP_CONV2D, AC_RATE_STEP), 3);
    CHECK_INT(count(g, AC_OP_LINEAR, AC_RATE_STEP), 5); /* post_quant, QKV, out, 2 shortcuts */
    CHECK_INT(count(g, AC_OP_ADD, AC_RATE_STEP) + count(g, AC_OP_ACTIVATION, AC_RATE_STEP) +
                  count(g, AC_OP_UPSAMPLE, AC_RATE_STEP), 0);
    ac_graph_free(g);
    ac_arena_deinit(&m.arena);
    model_read(&m, "clip_l");
    g = build(&m, &(ac_build_args){.entry = "forward", .batch = 2, .tokens = 77});
    CHECK_OK(ac_passes_run(g, 0, NULL));
    CHECK_INT(count(g, AC_OP_LINEAR, AC_RATE_PROMPT), 4 * 12);
    CHECK_INT(count(g, AC_OP_ACTIVATION, AC_RATE_PROMPT), 0);
    CHECK_INT(count(g, AC_OP_ADD, AC_RATE_PROMPT), 1); /* token and position */
    ac_graph_free(g);
    ac_arena_deinit(&m.arena);
}

/* Every pass off, on alone, and every size: verify holds, two runs give the same text. */
static void
every_pass_alone(void)
{
    model m;
    model_read(&m, "sd15_unet");
    for (int32_t i = 0; i <= pass_count(); i++) {
        char *text[2];
        for (int again = 0; again < 2; again++) {
            ac_text dump = {0};
            ac_build_args args = i % 2 ? unet_loop : unet_call;
            args.height = 61;
            ac_graph *g = build(&m, &args);
            CHECK_OK(ac_passes_run(g, ~(UINT32_C(1) << i), NULL));
            CHECK_OK(ac_graph_verify(g));
            CHECK_OK(ac_cast_weights(g, AC_F16));
            CHECK_OK(ac_graph_verify(g));
            CHECK(count(g, AC_OP_UPSAMPLE, AC_RATE_STEP) > 0); /* odd: some stay in any case */
            ac_graph_dump(g, &dump);
            text[again] = ac_text_take(&dump);
            ac_graph_free(g);
        }
        CHECK_STRING(text[0], text[1]);
        ac_free(text[0]);
        ac_free(text[1]);
    }
    ac_arena_deinit(&m.arena);
}

static void
dumps(void)
{
    model m;
    ac_text text = {0};
    model_read(&m, "sd15_unet");
    ac_graph *g = build(&m, &unet_loop);
    CHECK_OK(ac_passes_run(g, 1u << 1, &(ac_dumps){.text = &text}));
    char *dump = ac_text_take(&text);
    CHECK(dump && strstr(dump, "== built: "));
    for (int32_t i = 0; ac_passes[i]; i++) {
        char title[64];
        snprintf(title, sizeof title, "== %s: ", ac_passes[i]->name);
        CHECK_INT(strstr(dump, title) != NULL, i != 1);
    }
    ac_free(dump);
    ac_graph_free(g);
    ac_arena_deinit(&m.arena);
}

/* SDXL has the largest graph; planning it has 50 ms in all, of which passes may take a tenth. */
static void
fast_enough(void)
{
    model m;
    double best = 1e9;
    model_read(&m, "sdxl_base_unet");
    for (int round = 0; round < 5; round++) {
        ac_graph *g = build(&m, &unet_loop);
        double start = ac_now_ms();
        CHECK_OK(ac_passes_run(g, 0, NULL));
        CHECK_OK(ac_cast_weights(g, AC_F16));
        best = fmin(best, ac_now_ms() - start);
        ac_graph_free(g);
    }
    printf("(%.2f ms) ", best);
    ac_arena_deinit(&m.arena);
#ifndef __SANITIZE_ADDRESS__
    CHECK(best < 5.0);
#endif
}

/* ---- memory running out ---------------------------------------------------------------------- */

/* A resnet and an attention: every pass has something to do. */
static void
build_block(ac_graph *g)
{
    ac_conv2d_attr attr = {1, 1, 1, 1, 1, AC_ACT_NONE};
    ac_val x = ac_input(g, "x", AC_F32, AC_SHAPE(1, 4, 4, 8), AC_RATE_STEP);
    ac_val y = ac_input(g, "y", AC_F32, AC_SHAPE(1, 4, 4, 8), AC_RATE_STEP);
    ac_val t = ac_input(g, "t", AC_F32, AC_SHAPE(1, 8), AC_RATE_SCHEDULE);
    ac_val w = ac_weight(g, "w", AC_SHAPE(8, 8)), c = ac_weight(g, "c", AC_SHAPE(8, 8, 3, 3));
    ac_val gamma = ac_weight(g, "gamma", AC_SHAPE(16)), b = ac_weight(g, "b", AC_SHAPE(8));
    ac_val both = ac_concat(g, (ac_val[]){x, ac_scale(g, y, 1.0f, 0.0f)}, 2, 3);
    ac_val h = ac_activation(g, ac_group_norm(g, both, gamma, gamma, 2, 1e-5f), AC_ACT_SILU);
    h = ac_slice(g, h, 3, 0, 8);
    h = ac_add(g, ac_conv2d(g, h, c, b, attr),
               ac_linear(g, ac_activation(g, t, AC_ACT_SILU), w, b));
    h = ac_add(g, h, ac_linear(g, ac_activation(g, t, AC_ACT_SILU), ac_weight(g, "w2",
                                                                    AC_SHAPE(8, 8)), AC_NONE));
    h = ac_conv2d(g, ac_upsample(g, h, 8, 8), c, b, attr);
    ac_val z = ac_reshape(g, h, AC_SHAPE(1, 64, 8));
    z = ac_reshape(g, ac_linear(g, z, w, b), AC_SHAPE(1, 8, 8, 8));
    ac_output(g, ac_add(g, z, h), "out");
}

static ac_status
oom_scenario(void *context)
{
    ac_graph *g;
    ac_text text = {0};
    AC_TRY(ac_graph_new(AC_F32, &g));
    build_block(g);
    ac_status status = ac_graph_status(g);
    status = status < 0 ? status
                        : ac_passes_run(g, 0, &(ac_dumps){.text = &text, .json = context != NULL});
    status = status < 0 ? status : ac_cast_weights(g, AC_F16);
    ac_text_free(&text);
    ac_graph_free(g);
    return status;
}

static void
out_of_memory(void)
{
    test_oom(oom_scenario, NULL);
    test_oom(oom_scenario, &(bool){true}); /* dumps as JSON */
}

TEST_MAIN(TEST(masks), TEST(unets), TEST(vae_and_clip), TEST(every_pass_alone), TEST(dumps),
          TEST(fast_enough), TEST(out_of_memory))
