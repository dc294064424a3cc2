/* Plans of real and random models on the null device.
 *
 * The check replays a plan's addresses: every write marks its bytes with the step that wrote them,
 * every read must find the marks of the step that made its operand.  Two live buffers that
 * overlapped would leave the wrong mark.  */
#include "../../csrc/model.h"
#include "../../csrc/passes/passes.h"
#include "../../csrc/plan.h"
#include "test.h"

#define GRAIN 64 /* bytes a mark; offsets are multiples of 256, views of one element's size */

static uint64_t seed = 20240229;

static int64_t
between(int64_t low, int64_t high)
{
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return low + (int64_t)((seed >> 33) % (uint64_t)(high - low + 1));
}

/* ---- replay ---------------------------------------------------------------------------------- */

typedef struct replay {
    const ac_plan *plan;
    int32_t *arena, *keep; /* the step that wrote each grain, -1: nobody */
    int32_t *maker;        /* graph value -> step that writes its buffer */
} replay;

static int32_t *
marks(replay *r, ac_ref ref)
{
    return ref.space == AC_SPACE_ARENA ? r->arena : ref.space == AC_SPACE_KEEP ? r->keep : NULL;
}

static void
mark(int32_t *grains, size_t offset, size_t bytes, size_t limit, int32_t step)
{
    CHECK(offset + bytes <= limit);
    for (size_t g = offset / GRAIN; g <= (offset + bytes - 1) / GRAIN; g++) {
        grains[g] = step;
    }
}

static ac_val
base_of(const ac_graph *g, ac_val v)
{
    for (const ac_node *n = ac_producer(g, v); n && ac_op_is_view(n->op); n = ac_producer(g, v)) {
        v = n->input[0];
    }
    return v;
}

static void
replay_step(replay *r, int32_t s)
{
    const ac_plan *plan = r->plan;
    const ac_step *step = &plan->steps[s];
    const ac_node *node = &plan->graph->nodes[step->node];
    if (step->scratch) {
        mark(r->arena, step->scratch_offset, step->scratch, plan->arena_bytes, s);
    }
    int32_t *out = marks(r, step->output);
    if (out) {
        size_t limit = out == r->arena ? plan->arena_bytes : plan->keep_bytes;
        mark(out, step->output.offset, test_extent(&step->problem.output), limit, s);
    }
    r->maker[node->output] = s;
    for (int32_t k = 0; k < node->n_inputs; k++) {
        int32_t *in = marks(r, step->input[k]);
        if (!in) {
            continue;
        }
        int32_t maker = r->maker[base_of(plan->graph, node->input[k])];
        size_t first = step->input[k].offset / GRAIN;
        size_t last = (step->input[k].offset + test_extent(&step->problem.input[k]) - 1) / GRAIN;
        for (size_t g = first; g <= last; g++) {
            if (in[g] != maker) {
                TEST_FAIL("step %d (%s) reads operand %d where step %d wrote, expected step %d", s,
                          node->name, k, in[g], maker);
            }
        }
    }
}

static void
check_addresses(const ac_plan *plan)
{
    size_t arena = plan->arena_bytes / GRAIN + 1, keep = plan->keep_bytes / GRAIN + 1;
    replay r = {.plan = plan};
    r.arena = malloc(arena * sizeof *r.arena);
    r.keep = malloc(keep * sizeof *r.keep);
    r.maker = malloc((size_t)plan->graph->n_values * sizeof *r.maker);
    CHECK(r.arena && r.keep && r.maker);
    memset(r.arena, 0xff, arena * sizeof *r.arena);
    memset(r.keep, 0xff, keep * sizeof *r.keep);
    for (int32_t s = 0; s < plan->n_steps; s++) {
        replay_step(&r, s);
    }
    free(r.arena);
    free(r.keep);
    free(r.maker);
}

/* ---- building -------------------------------------------------------------------------------- */

static ac_plan *
plan_of(const char *json, const ac_build_args *args, uint32_t off)
{
    ac_arena arena;
    ac_arena_init(&arena);
    const ac_json *config;
    const ac_model_class *cls;
    CHECK_OK(ac_json_parse(&arena, json, strlen(json), "config", &config));
    CHECK_OK(ac_model_class_find(config, &cls));
    void *parsed = ac_calloc(1, cls->config_size);
    CHECK_OK(cls->parse(config, parsed));
    ac_graph *g;
    CHECK_OK(ac_graph_new(AC_F32, &g));
    cls->build(parsed, args, g);
    CHECK_OK(ac_graph_status(g));
    CHECK_OK(ac_passes_run(g, off, NULL));
    CHECK_OK(ac_graph_verify(g));
    ac_device *device;
    CHECK_OK(ac_device_open("null", &device));
    ac_plan *plan;
    CHECK_OK(ac_plan_new(g, device, &plan));
    ac_device_unref(device);
    ac_free(parsed);
    ac_arena_deinit(&arena);
    return plan;
}

static char *
read_config(const char *name)
{
    static char text[16384];
    char path[256];
    snprintf(path, sizeof path, "tests/configs/%s.json", name);
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = '\0';
    return text;
}

static void
check_real(const char *name, ac_build_args args)
{
    args.io_dtype = args.compute = AC_F32;
    ac_plan *plan = plan_of(read_config(name), &args, 0);
    check_addresses(plan);
    double ratio = (double)plan->arena_bytes / (double)plan->bound_bytes;
    printf("(%s: %d steps, arena %.1f MB, %.3f x bound) ", name, plan->n_steps,
           (double)plan->arena_bytes / 1e6, ratio);
    CHECK(ratio <= 1.2);
    ac_plan_free(plan);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void
sd15_and_sdxl_stay_near_the_bound(void)
{
    check_real("sd15_unet", (ac_build_args){.entry = "forward", .batch = 2, .height = 64,
                                            .width = 64, .tokens = 77, .timesteps = 1});
    check_real("sdxl_base_unet", (ac_build_args){.entry = "forward", .batch = 2, .height = 128,
                                                 .width = 128, .tokens = 77, .timesteps = 30,
                                                 .loop = true});
    check_real("sd_vae", (ac_build_args){.entry = "decode", .batch = 1, .height = 64,
                                         .width = 64});
    check_real("clip_l", (ac_build_args){.entry = "forward", .batch = 2, .tokens = 77});
}

static const char *
random_unet(void)
{
    static char json[1024];
    static const char *const down[] = {"DownBlock2D", "CrossAttnDownBlock2D"};
    static const char *const up[] = {"UpBlock2D", "CrossAttnUpBlock2D"};
    int blocks = (int)between(1, 4), at;
    char downs[200] = "", ups[200] = "", channels[64] = "";
    for (int i = 0; i < blocks; i++) {
        int kind = (int)between(0, 1);
        at = (int)strlen(downs);
        snprintf(downs + at, sizeof downs - (size_t)at, "%s\"%s\"", i ? "," : "", down[kind]);
        at = (int)strlen(channels);
        snprintf(channels + at, sizeof channels - (size_t)at, "%s%d", i ? "," : "",
                 8 * (int)between(1, 6));
        at = (int)strlen(ups);
        snprintf(ups + at, sizeof ups - (size_t)at, "%s\"%s\"", i ? "," : "",
                 up[between(0, 1)]);
    }
    snprintf(json, sizeof json,
             "{\"_class_name\":\"UNet2DConditionModel\",\"in_channels\":4,\"out_channels\":4,"
             "\"down_block_types\":[%s],\"up_block_types\":[%s],\"block_out_channels\":[%s],"
             "\"layers_per_block\":%d,\"norm_num_groups\":4,\"attention_head_dim\":%d,"
             "\"cross_attention_dim\":%d,\"use_linear_projection\":%s}",
             downs, ups, channels, (int)between(1, 3), 1 << between(0, 2), (int)between(8, 40),
             between(0, 1) ? "true" : "false");
    return json;
}

static void
random_models_never_overlap(void)
{
    for (int round = 0; round < 100; round++) {
        ac_build_args args = {.entry = "forward", .batch = between(1, 4),
                              .height = between(8, 70), .width = between(8, 70),
                              .tokens = between(1, 160), .loop = between(0, 1),
                              .io_dtype = AC_F32, .compute = AC_F32};
        args.timesteps = args.loop ? between(1, 50) : 1;
        ac_plan *plan = plan_of(random_unet(), &args, (uint32_t)between(0, 127));
        check_addresses(plan);
        CHECK(plan->arena_bytes >= plan->bound_bytes);
        ac_plan_free(plan);
    }
}

static void
two_plans_are_the_same(void)
{
    char first[16384];
    snprintf(first, sizeof first, "%s", read_config("sd15_unet"));
    ac_build_args args = {.entry = "forward", .batch = 2, .height = 63, .width = 65,
                          .tokens = 77, .timesteps = 1, .io_dtype = AC_F32, .compute = AC_F32};
    ac_text a = {0}, b = {0};
    ac_plan *one = plan_of(first, &args, 0), *two = plan_of(first, &args, 0);
    ac_plan_explain(one, true, &a);
    ac_plan_explain(two, true, &b);
    CHECK(a.length == b.length && memcmp(a.data, b.data, a.length) == 0);
    ac_text_free(&a);
    ac_text_free(&b);
    ac_plan_free(one);
    ac_plan_free(two);
}

TEST_MAIN(TEST(sd15_and_sdxl_stay_near_the_bound), TEST(random_models_never_overlap),
          TEST(two_plans_are_the_same))
