/* Random little graphs: every pass alone, and all together, leave what is computed as it was. */
#include "little_graph.h"

enum { POOL = 8 };

typedef struct random_graph {
    ac_graph *g;
    uint64_t state;
    ac_val pool[POOL], t, step, text;
    int32_t n, names;
} random_graph;

static uint32_t
pick(random_graph *r, uint32_t count)
{
    return (uint32_t)(test_random(&r->state) >> 20) % count;
}

static const char *
fresh(random_graph *r, char name[16])
{
    snprintf(name, 16, "n%d", r->names++);
    return name;
}

static ac_val
like(random_graph *r, ac_val x)
{
    for (int i = 0; i < POOL; i++) {
        ac_val y = r->pool[pick(r, (uint32_t)r->n)];
        if (ac_shape_equal(&r->g->values[y].shape, &r->g->values[x].shape)) {
            return y;
        }
    }
    return x;
}

static ac_val
random_attention(random_graph *r, ac_val x, const char *name)
{
    ac_graph *g = r->g;
    ac_shape s = g->values[x].shape;
    ac_val h = ac_reshape(g, x, AC_SHAPE(s.dim[0], s.dim[1] * s.dim[2], s.dim[3]));
    ac_val context = pick(r, 2) ? r->text : h, y;
    ac_push(g, "%s", name);
    ac_val q = linear(g, "q", h, 8, pick(r, 2)), k = linear(g, "k", context, 8, pick(r, 2));
    ac_val v = linear(g, "v", context, 8, pick(r, 2));
    y = ac_attention(g, q, k, v, AC_NONE, (ac_attention_attr){.heads = 2, .scale = 0.5f});
    y = linear(g, "out", y, s.dim[3], true);
    ac_pop(g);
    y = pick(r, 2) ? ac_add(g, y, h) : y;
    y = ac_reshape(g, y, s);
    return pick(r, 2) ? ac_add(g, y, like(r, x)) : y;
}

static ac_val
random_time(random_graph *r, ac_val x, const char *name)
{
    ac_val t = linear(r->g, name, ac_activation(r->g, r->t, AC_ACT_SILU), channels(r->g, x),
                      pick(r, 2));
    return ac_add(r->g, x, ac_select(r->g, t, r->step));
}

static ac_val
random_op(random_graph *r, ac_val x)
{
    char name[16];
    ac_graph *g = r->g;
    const ac_shape s = g->values[x].shape;
    fresh(r, name);
    switch (pick(r, 15)) {
    case 0:
        return conv(g, name, x, 8, 1);
    case 1:
        return linear(g, name, x, 8, pick(r, 2));
    case 2:
    case 3:
        return group_norm(g, name, x);
    case 4:
    case 5:
        return ac_activation(g, x, 1 + pick(r, AC_ACT_COUNT - 1));
    case 6:
    case 7:
        return ac_add(g, x, like(r, x));
    case 8:
        return random_time(r, x, name);
    case 9:
        return ac_gate(g, pick(r, 2) ? x : linear(g, name, x, 16, true), AC_ACT_GELU);
    case 10: {
        ac_val y = like(r, x);
        ac_val both = ac_concat(g, (ac_val[]){x, y}, 2, 3);
        return s.dim[3] > 16 ? x : both;
    }
    case 11: {
        int64_t height = 2 * s.dim[1] - pick(r, 2);
        bool large = s.dim[1] > 4 || s.dim[2] > 4;
        return large ? x : conv(g, name, ac_upsample(g, x, height, 2 * s.dim[2]), 8, 1);
    }
    case 12:
        return random_attention(r, x, name);
    case 13:
        return ac_scale(g, x, pick(r, 2) ? 1.0f : -0.5f, 0.0f);
    default:
        return s.dim[3] < 8 ? x : ac_slice(g, x, 3, 4 * pick(r, 2), s.dim[3] - 4);
    }
}

static void
random_build(ac_graph *g, uint64_t seed)
{
    random_graph r = {.g = g, .state = seed * UINT64_C(0x9e3779b97f4a7c15) | 1};
    int64_t b = 1 + pick(&r, 2);
    g->stream_exponent = -4;
    r.t = ac_input(g, "t", AC_F32, AC_SHAPE(3, pick(&r, 2) ? b : 1, 6), AC_RATE_SCHEDULE);
    r.step = ac_input(g, "step", AC_I32, AC_SHAPE(1), AC_RATE_STEP);
    r.text = ac_input(g, "text", AC_F32, AC_SHAPE(b, 3, 5), AC_RATE_PROMPT);
    r.pool[r.n++] = ac_input(g, "x", AC_F32, AC_SHAPE(b, 2, 3, 8), AC_RATE_STEP);
    r.pool[r.n++] = ac_input(g, "z", AC_F32, AC_SHAPE(b, 2, 3, 8), AC_RATE_PROMPT);
    for (int i = 0; i < 40; i++) {
        ac_val y = random_op(&r, r.pool[pick(&r, 2) ? (uint32_t)r.n - 1 : pick(&r, (uint32_t)r.n)]);
        bool usable = channels(g, y) % 4 == 0; /* four groups */
        r.pool[!usable ? 0 : r.n < POOL ? r.n : (int32_t)pick(&r, POOL)] = usable ? y : r.pool[0];
        r.n += usable && r.n < POOL;
    }
    int outputs = 0;
    for (int i = 0; i < r.n; i++) {
        const ac_value *value = &g->values[r.pool[i]];
        if (value->kind == AC_VALUE_TEMP && !value->output) {
            char name[16];
            snprintf(name, sizeof name, "y%d", outputs++);
            ac_output(g, r.pool[i], name);
        }
    }
}

static void
random_graphs(void)
{
    uint32_t all;
    int changed[33] = {0};
    CHECK_OK(ac_passes_off_from_text("all", &all));
    const uint64_t seeds = little_far() ? 80 : 300; /* opening a GPU takes its time */
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        little_result plain, fused;
        little_run(random_build, seed, all, AC_F32, &plain);
        for (int i = -1; i < 0 || ac_passes[i]; i++) {
            uint32_t off = i < 0 ? 0 : all & ~(UINT32_C(1) << i);
            little_run(random_build, seed, off, AC_F32, &fused);
            changed[i + 1] += strcmp(plain.text, fused.text) != 0;
            if (!(little_error(&fused, &plain) <= TOLERANCE)) {
                TEST_FAIL("seed %d, %s: off by %g", (int)seed,
                          i < 0 ? "all passes" : ac_passes[i]->name,
                          little_error(&fused, &plain));
            }
            little_result_free(&fused);
        }
        little_result_free(&plain);
    }
    for (int i = 0; i == 0 || ac_passes[i - 1]; i++) {
        CHECK(changed[i] > (int)(seeds / 30)); /* every pass had something to do in some graphs */
    }
}

TEST_MAIN(TEST(random_graphs))
