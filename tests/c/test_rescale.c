/* rescale: a VAE with its residual stream times a power of two is the VAE; what is stored is that
 * much smaller, and f16, which the CPU's plain kernels round to as a GPU does, stays finite where
 * it was not. */
#include "../../csrc/models/models.h"
#include "little_graph.h"

static const char config_text[] =
    "{\"_class_name\": \"AutoencoderKL\", \"block_out_channels\": [8, 16], \"norm_num_groups\": 4,"
    "\"down_block_types\": [\"DownEncoderBlock2D\", \"DownEncoderBlock2D\"], \"layers_per_block\":"
    " 1, \"up_block_types\": [\"UpDecoderBlock2D\", \"UpDecoderBlock2D\"]}";

static ac_graph *
build_vae(const char *entry, ac_dtype dtype)
{
    ac_arena arena;
    ac_graph *g;
    const ac_json *json;
    const ac_model_class *cls;
    ac_build_args args = {.entry = entry, .batch = 2, .height = 6, .width = 8,
                          .io_dtype = AC_F32, .compute = dtype};
    ac_arena_init(&arena);
    CHECK_OK(ac_json_parse(&arena, config_text, strlen(config_text), "config", &json));
    CHECK_OK(ac_model_class_find(json, &cls));
    void *config = ac_calloc(1, cls->config_size);
    CHECK_OK(cls->parse(json, config));
    CHECK_OK(ac_graph_new(dtype, &g));
    cls->build(config, &args, g);
    CHECK_OK(ac_graph_status(g));
    ac_free(config);
    ac_arena_deinit(&arena);
    return g;
}

/* ---- a run that keeps everything ------------------------------------------------------------- */

typedef struct stored {
    const char *name;
    double largest;
} stored;

typedef struct vae_run {
    float *out; /* count, the graph's own output */
    int64_t count;
    stored *values; /* each stored activation, by name */
    int32_t n_values;
    double largest; /* of all */
    int32_t norms, scales; /* group norms with an exponent; SCALE nodes of activations */
} vae_run;

static void
vae_run_free(vae_run *r)
{
    for (int32_t i = 0; i < r->n_values; i++) {
        ac_free((void *)r->values[i].name);
    }
    ac_free(r->values);
    ac_free(r->out);
}

static char *
copy_text(const char *text)
{
    char *copy = ac_malloc(strlen(text) + 1);
    CHECK(copy);
    return strcpy(copy, text);
}

/* Every activation becomes an output, so that it can be looked at. */
static void
show_all(ac_graph *g, vae_run *r)
{
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        ac_value *value = &g->values[node->output];
        if (value->rate == AC_RATE_LOAD) {
            continue;
        }
        r->norms += node->op == AC_OP_GROUP_NORM && node->attr.group_norm.exponent != 0;
        r->scales += node->op == AC_OP_SCALE;
        if (!ac_op_is_view(node->op) && !value->output) {
            value->output = ac_arena_printf(&g->arena, "%d %s", i, node->name);
        }
    }
}

static void
look_at(const ac_value *value, const void *data, vae_run *r)
{
    int64_t count = ac_shape_count(&value->shape);
    double largest = 0.0;
    bool own = strcmp(value->output, "sample") == 0 || strcmp(value->output, "moments") == 0;
    if (own) {
        r->count = count;
        r->out = ac_malloc((size_t)count * sizeof *r->out);
        CHECK(r->out);
    }
    for (int64_t i = 0; i < count; i++) {
        double x = ac_element_get(data, value->dtype, i);
        largest = fabs(x) <= largest ? largest : fabs(x); /* keeps a NaN */
        if (own) {
            r->out[i] = (float)x;
        }
    }
    const char *name = strchr(value->output, ' ');
    r->values[r->n_values++] = (stored){copy_text(name ? name + 1 : value->output), largest};
    if (!own) {
        r->largest = largest <= r->largest ? r->largest : largest;
    }
}

/* The layers that write the residual stream write about `size`. */
static void
enlarge(const char *name, const ac_tensor *t, double size)
{
    static const char *const writers[] = {"conv_in.", "conv2.", "to_out.0."};
    for (size_t i = 0; i < AC_ARRAY_LEN(writers); i++) {
        if (strstr(name, writers[i])) {
            bool bias = t->shape.rank == 1;
            double by = bias && size > 1e4 ? 1e4 : size; /* f16 holds no bias of 1e5 */
            for (int64_t k = 0; k < ac_tensor_count(t); k++) {
                ac_element_set(t->data, t->dtype, k, ac_element_get(t->data, t->dtype, k) * by);
            }
        }
    }
}

static void
run_vae(const char *entry, ac_dtype dtype, int32_t exponent, const char *off, double size,
        vae_run *r)
{
    ac_graph *g = build_vae(entry, dtype);
    little_rig rig;
    uint32_t mask;
    *r = (vae_run){0};
    CHECK_INT(g->stream_exponent, dtype == AC_F16 ? -5 : 0);
    g->stream_exponent = exponent;
    CHECK_OK(ac_passes_off_from_text(off, &mask));
    CHECK_OK(ac_passes_run(g, mask, NULL));
    CHECK_OK(ac_cast_weights(g, dtype));
    show_all(g, r);
    CHECK_OK(ac_graph_verify(g));
    little_open(&rig, "cpu", g, 7);
    for (int32_t i = 0; i < ac_weights_count(rig.weights); i++) {
        const char *name = ac_weights_name(rig.weights, i);
        enlarge(name, ac_weights_find(rig.weights, name), size);
    }
    void **data = ac_calloc((size_t)g->n_values, sizeof *data);
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].output) {
            data[v] = little_alloc(&rig.memory, &g->values[v]);
            ac_tensor t = ac_tensor_of(data[v], g->values[v].dtype, g->values[v].shape);
            CHECK_OK(ac_exec_bind_output(rig.exec, g->values[v].output, &t));
        }
    }
    CHECK_OK(ac_exec_run(rig.exec, AC_RATE_PROMPT));
    r->values = ac_malloc((size_t)g->n_values * sizeof *r->values);
    for (ac_val v = 0; v < g->n_values; v++) {
        if (data[v]) {
            look_at(&g->values[v], data[v], r);
        }
    }
    ac_free(data);
    little_close(&rig);
}

static double
error_of(const vae_run *a, const vae_run *b)
{
    little_result x = {.data = a->out, .count = a->count}, y = {.data = b->out, .count = b->count};
    return little_error(&x, &y);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static const char *const entries[] = {"decode", "encode"};

/* Also where eps is as large as the variance: stream values about 1e-3 for an eps of 1e-6. */
static void
same_result(void)
{
    static const double sizes[] = {1.0, 1e-3, 3e4};
    static const char *const offs[] = {"", "fuse_norm", "fuse_epilogue", "phase_upsample",
                                       "simplify,cse,merge_linears,phase_upsample,fuse_norm,"
                                       "fuse_epilogue"};
    vae_run plain, scaled;
    for (int e = 0; e < 2; e++) {
        for (size_t s = 0; s < AC_ARRAY_LEN(sizes); s++) {
            for (size_t i = 0; i < AC_ARRAY_LEN(offs); i++) {
                run_vae(entries[e], AC_F32, 0, offs[i], sizes[s], &plain);
                run_vae(entries[e], AC_F32, -5, offs[i], sizes[s], &scaled);
                CHECK(error_of(&scaled, &plain) < TOLERANCE);
                CHECK_INT(plain.norms + plain.scales, 0);
                CHECK(scaled.norms + scaled.scales > 0);
                vae_run_free(&plain);
                vae_run_free(&scaled);
            }
        }
    }
}

/* Two SCALE nodes remain: of the model's input and of the attention's result. */
static void
stored_smaller(void)
{
    vae_run plain, scaled;
    for (int e = 0; e < 2; e++) {
        run_vae(entries[e], AC_F32, 0, "", 1e4, &plain);
        run_vae(entries[e], AC_F32, -5, "", 1e4, &scaled);
        CHECK_INT(scaled.scales, 2);
        CHECK(fabs(scaled.largest * 32.0 / plain.largest - 1.0) < 1e-5);
        int32_t large = 0;
        for (int32_t i = 0; i < plain.n_values; i++) {
            for (int32_t k = 0; plain.values[i].largest > 500.0 && k < scaled.n_values; k++) {
                if (strcmp(scaled.values[k].name, plain.values[i].name) == 0) {
                    double now = scaled.values[k].largest * 32.0 / plain.values[i].largest;
                    CHECK(fabs(now - 1.0) < 1e-4);
                    large++;
                }
            }
        }
        CHECK(large >= 8); /* conv_in, conv2 of all resnets, the attention, the resizing */
        vae_run_free(&plain);
        vae_run_free(&scaled);
    }
}

/* f16 with activations of 3e5. */
static void
f16_is_finite(void)
{
    vae_run truth, plain, scaled, small_truth, small;
    for (int e = 0; e < 2; e++) {
        run_vae(entries[e], AC_F32, 0, "", 8e4, &truth);
        run_vae(entries[e], AC_F16, 0, "", 8e4, &plain);
        run_vae(entries[e], AC_F16, -5, "", 8e4, &scaled);
        CHECK(truth.largest > 2.5e5 && truth.largest < 2e6);
        CHECK(!isfinite(plain.largest));
        CHECK(isfinite(scaled.largest) && scaled.largest < 65504.0);
        CHECK(error_of(&scaled, &truth) < 1e-2);
        /* And at home, among small activations, f16 is as good as it was. */
        run_vae(entries[e], AC_F32, 0, "", 0.1, &small_truth);
        vae_run_free(&plain);
        run_vae(entries[e], AC_F16, 0, "", 0.1, &plain);
        run_vae(entries[e], AC_F16, -5, "", 0.1, &small);
        CHECK(error_of(&small, &small_truth) < 1.2 * error_of(&plain, &small_truth) + 1e-4);
        vae_run_free(&truth);
        vae_run_free(&plain);
        vae_run_free(&scaled);
        vae_run_free(&small_truth);
        vae_run_free(&small);
    }
}

TEST_MAIN(TEST(same_result), TEST(stored_smaller), TEST(f16_is_finite))
