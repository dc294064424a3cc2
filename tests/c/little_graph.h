/* little_graph: builds a small graph, runs passes over it and runs it on the CPU, or on the device
 * that ACCEL_TEST_DEVICE names (cuda: `make test-gpu`), with weights and inputs that depend on
 * their names and a seed alone.  So the same graph with a pass on and off reads the same numbers
 * and must give the same result. */
#ifndef AC_TEST_LITTLE_GRAPH_H
#define AC_TEST_LITTLE_GRAPH_H

#include "../../csrc/backend_cuda.h"
#include "../../csrc/exec.h"
#include "../../csrc/passes/passes.h"
#include "test.h"

typedef void (*little_build)(ac_graph *g, uint64_t seed);

static inline const char *
little_device(void)
{
    const char *name = getenv("ACCEL_TEST_DEVICE");
    return name ? name : "cpu";
}

static inline bool
little_far(void)
{
    return strcmp(little_device(), "cpu") != 0;
}

/* Of the largest value; f32 rounding in another order gives about 1e-6, and a GPU's exponentials a
 * few times that. */
#define TOLERANCE (little_far() ? 5e-5 : 1e-5)

/* ---- layers, with weights of their own ------------------------------------------------------- */

static inline int64_t
channels(const ac_graph *g, ac_val x)
{
    return x == AC_NONE ? 1 : g->values[x].shape.dim[g->values[x].shape.rank - 1];
}

static inline ac_val
linear(ac_graph *g, const char *name, ac_val x, int64_t n, bool bias)
{
    ac_push(g, "%s", name);
    ac_val w = ac_weight(g, "weight", AC_SHAPE(n, channels(g, x)));
    ac_val b = bias ? ac_weight(g, "bias", AC_SHAPE(n)) : AC_NONE;
    ac_pop(g);
    ac_name(g, name);
    return ac_linear(g, x, w, b);
}

static inline ac_val
conv(ac_graph *g, const char *name, ac_val x, int64_t n, int32_t stride)
{
    ac_push(g, "%s", name);
    ac_val w = ac_weight(g, "weight", AC_SHAPE(n, channels(g, x), 3, 3));
    ac_val b = ac_weight(g, "bias", AC_SHAPE(n));
    ac_pop(g);
    ac_name(g, name);
    return ac_conv2d(g, x, w, b, (ac_conv2d_attr){stride, 1, 1, 1, 1, AC_ACT_NONE});
}

static inline ac_val
group_norm(ac_graph *g, const char *name, ac_val x)
{
    ac_push(g, "%s", name);
    ac_val gamma = ac_weight(g, "weight", AC_SHAPE(channels(g, x)));
    ac_val beta = ac_weight(g, "bias", AC_SHAPE(channels(g, x)));
    ac_pop(g);
    ac_name(g, name);
    return ac_group_norm(g, x, gamma, beta, 4, 1e-3f);
}

/* ---- runs ------------------------------------------------------------------------------------ */

/* One result of a graph, all outputs "y0", "y1" ... one after the other. */
typedef struct little_result {
    float *data; /* count of them; ac_free */
    int64_t count;
    int32_t ops[AC_OP_COUNT]; /* nodes of each op after the passes */
    int32_t nodes;
    char *text; /* dump after the passes; ac_free */
} little_result;

static inline void
little_result_free(little_result *r)
{
    ac_free(r->data);
    ac_free(r->text);
    *r = (little_result){0};
}

/* The mask that leaves on only the passes named in `on`. */
static inline uint32_t
little_only(const char *on)
{
    uint32_t all, some;
    CHECK_OK(ac_passes_off_from_text("all", &all));
    CHECK_OK(ac_passes_off_from_text(on, &some));
    return all & ~some;
}

/* Random content of a value: weights about 1/sqrt(fan in), integers 0 .. 2. */
static inline void
little_fill(void *data, const ac_value *value, uint64_t seed)
{
    uint64_t state = ac_hash(value->name, strlen(value->name), AC_HASH_SEED ^ seed) | 1;
    int64_t count = ac_shape_count(&value->shape);
    int64_t rows = value->shape.rank ? value->shape.dim[0] : 1;
    bool matrix = value->kind == AC_VALUE_WEIGHT && value->shape.rank > 1;
    double scale = matrix ? sqrt(3.0 * (double)rows / (double)count) : 1.0;
    for (int64_t i = 0; i < count; i++) {
        double x = ac_dtype_is_float(value->dtype) ? test_uniform(&state, -scale, scale)
                                                   : (double)(test_random(&state) % 3);
        ac_element_set(data, value->dtype, i, x);
    }
}

/* All data of one run; one allocation each, freed together. */
typedef struct little_memory {
    void *block[1024];
    int32_t count;
} little_memory;

static inline void *
little_alloc(little_memory *m, const ac_value *value)
{
    void *data = ac_malloc_aligned((size_t)ac_shape_count(&value->shape) *
                                   ac_dtype_size(value->dtype));
    CHECK(data && m->count < (int32_t)AC_ARRAY_LEN(m->block));
    return m->block[m->count++] = data;
}

static inline void
little_bind(little_memory *m, const ac_plan *plan, ac_exec *exec, ac_weights *weights,
            uint64_t seed)
{
    const ac_graph *g = plan->graph;
    for (ac_val v = 0; v < g->n_values; v++) {
        const ac_value *value = &g->values[v];
        if (value->kind == AC_VALUE_TEMP) {
            continue;
        }
        ac_tensor t = ac_tensor_of(little_alloc(m, value), value->dtype, value->shape);
        little_fill(t.data, value, seed);
        if (value->kind == AC_VALUE_WEIGHT) {
            CHECK_OK(ac_weights_set(weights, value->name, &t, NULL, NULL));
        } else {
            CHECK_OK(ac_exec_bind_host(exec, value->name, &t));
        }
    }
}

/* Elements of outputs "y0", "y1" ..., and how many outputs there are. */
static inline int64_t
little_outputs(const ac_graph *g, int32_t *found)
{
    int64_t elements = 0;
    for (*found = 0;; ++*found) {
        char name[16];
        snprintf(name, sizeof name, "y%d", *found);
        ac_val v = ac_graph_find_output(g, name);
        if (v == AC_NONE) {
            break;
        }
        CHECK_INT(g->values[v].dtype, AC_F32);
        elements += ac_shape_count(&g->values[v].shape);
    }
    return elements;
}

static inline void
little_bind_outputs(const ac_graph *g, ac_exec *exec, little_result *out)
{
    int32_t outputs;
    int64_t at = 0;
    out->count = little_outputs(g, &outputs);
    out->data = ac_malloc((size_t)out->count * sizeof *out->data);
    CHECK(out->data && outputs > 0);
    for (int32_t i = 0; i < outputs; i++) {
        char name[16];
        snprintf(name, sizeof name, "y%d", i);
        ac_shape shape = g->values[ac_graph_find_output(g, name)].shape;
        ac_tensor t = ac_tensor_of(out->data + at, AC_F32, shape);
        CHECK_OK(ac_exec_bind_output_host(exec, name, &t));
        at += ac_shape_count(&shape);
    }
}

/* A graph on a device, with its weights and inputs. */
typedef struct little_rig {
    ac_device *device;
    ac_plan *plan;
    ac_exec *exec;
    ac_weights *weights;
    little_memory memory;
} little_rig;

/* Takes g over. */
static inline void
little_open(little_rig *r, const char *device, ac_graph *g, uint64_t seed)
{
    r->memory.count = 0;
    ac_backend_cuda_set_folder("python/accel");
    CHECK_OK(ac_device_open(device, &r->device));
    CHECK_OK(ac_plan_new(g, r->device, &r->plan));
    CHECK_OK(ac_weights_new(&r->weights));
    CHECK_OK(ac_weights_set_release(r->weights, r->device->backend->free, r->device->self));
    CHECK_OK(ac_exec_new(r->plan, r->weights, &r->exec));
    little_bind(&r->memory, r->plan, r->exec, r->weights, seed);
}

static inline void
little_close(little_rig *r)
{
    ac_exec_free(r->exec);
    ac_plan_free(r->plan);
    ac_weights_drop_derived(r->weights);
    ac_weights_unref(r->weights);
    ac_device_unref(r->device);
    for (int32_t i = 0; i < r->memory.count; i++) {
        ac_free_aligned(r->memory.block[i]);
    }
}

/* Plans g (and takes it over), runs it and fills out->data. */
static inline void
little_execute(ac_graph *g, uint64_t seed, little_result *out)
{
    little_rig rig;
    little_open(&rig, little_device(), g, seed);
    little_bind_outputs(rig.plan->graph, rig.exec, out);
    CHECK_OK(ac_exec_run(rig.exec, AC_RATE_PROMPT));
    little_close(&rig);
}

/* Builds, gives all weights `weight_dtype`, runs the passes that are not off, casts, runs. */
static inline void
little_run(little_build build, uint64_t seed, uint32_t off, ac_dtype weight_dtype,
           little_result *out)
{
    ac_graph *g;
    ac_text text = {0};
    *out = (little_result){0};
    CHECK_OK(ac_graph_new(AC_F32, &g));
    build(g, seed);
    CHECK_OK(ac_graph_status(g));
    for (ac_val v = 0; v < g->n_values; v++) {
        if (g->values[v].kind == AC_VALUE_WEIGHT) {
            g->values[v].dtype = weight_dtype;
        }
    }
    CHECK_OK(ac_passes_run(g, off, NULL));
    CHECK_OK(ac_cast_weights(g, AC_F32));
    CHECK_OK(ac_graph_verify(g));
    ac_graph_dump(g, &text);
    out->text = ac_text_take(&text);
    out->nodes = g->n_nodes;
    for (int32_t i = 0; i < g->n_nodes; i++) {
        out->ops[g->nodes[i].op]++;
    }
    little_execute(g, seed, out);
}

/* Largest difference, relative to the largest value. */
static inline double
little_error(const little_result *a, const little_result *b)
{
    double worst = 0.0, largest = 0.0;
    CHECK_INT(a->count, b->count);
    for (int64_t i = 0; i < a->count; i++) {
        double difference = fabs((double)a->data[i] - b->data[i]);
        worst = difference <= worst ? worst : difference; /* keeps a NaN */
        largest = fmax(largest, fabs((double)b->data[i]));
    }
    CHECK(largest > 0.0);
    return worst / largest;
}

#endif
