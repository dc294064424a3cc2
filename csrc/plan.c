/* plan: orders nodes by rate, picks kernels, and ties the planner's parts together. */
#include "plan_internal.h"

#include <string.h>

static ac_tensor
operand_of(const ac_planner *p, ac_val v)
{
    ac_tensor tensor = {.shape = {.rank = -1}};
    if (v != AC_NONE) {
        tensor.dtype = p->g->values[v].dtype;
        tensor.shape = p->g->values[v].shape;
        memcpy(tensor.stride, p->places[v].stride, sizeof tensor.stride);
    }
    return tensor;
}

static ac_status
no_kernel(const ac_planner *p, const ac_step *step)
{
    const ac_node *node = &p->g->nodes[step->node];
    ac_text text = {0};
    char shape[AC_SHAPE_TEXT];
    for (int32_t k = 0; k < step->problem.n_inputs; k++) {
        const ac_tensor *t = &step->problem.input[k];
        ac_text_printf(&text, "%s%s", k ? ", " : "",
                       t->shape.rank < 0 ? "-" : ac_dtype_name(t->dtype));
        ac_text_printf(&text, "%s", t->shape.rank < 0 ? "" : ac_shape_text(&t->shape, shape));
    }
    char *operands = ac_text_take(&text);
    ac_status status = ac_error(AC_E_UNSUPPORTED, "%s: no %s kernel for %s (%s)", node->name,
                                p->plan->device->backend->name, ac_op_name(node->op),
                                operands ? operands : "");
    ac_free(operands);
    return status;
}

static ac_status
choose_kernel(const ac_planner *p, ac_step *step)
{
    const ac_device *device = p->plan->device;
    for (const ac_kernel *const *k = device->backend->kernels; *k; k++) {
        if ((*k)->op == step->problem.op && (*k)->supports(&step->problem, &device->caps)) {
            step->kernel = *k;
            return AC_OK;
        }
    }
    return no_kernel(p, step);
}

static double
operand_bytes(const ac_problem *problem)
{
    double bytes = (double)ac_tensor_bytes(&problem->output);
    for (int32_t k = 0; k < problem->n_inputs; k++) {
        if (problem->input[k].shape.rank >= 0) {
            bytes += (double)ac_tensor_bytes(&problem->input[k]);
        }
    }
    return bytes;
}

static double
node_flops(const ac_planner *p, const ac_node *node)
{
    ac_shape few[8] = {{0}};
    for (int32_t k = 0; k < AC_MIN(node->n_inputs, 8); k++) {
        few[k] = node->input[k] == AC_NONE ? (ac_shape){.rank = -1}
                                           : p->g->values[node->input[k]].shape;
    }
    return ac_op_flops(node->op, &node->attr, few, AC_MIN(node->n_inputs, 8),
                       &p->g->values[node->output].shape);
}

/* A 1x1 convolution that became a LINEAR is still one: its weight says so. */
static bool
allows_tf32(const ac_graph *g, const ac_problem *p)
{
    bool conv = p->op == AC_OP_CONV2D || p->op == AC_OP_UP_CONV2D ||
                (p->op == AC_OP_LINEAR && p->input[AC_LINEAR_W].shape.rank == 4);
    bool product = conv || p->op == AC_OP_LINEAR || p->op == AC_OP_ATTENTION;
    return product && p->output.dtype == AC_F32 &&
           (g->tf32 & (conv ? AC_TF32_CONV : AC_TF32_MATMUL)) != 0;
}

static ac_status
make_step(ac_planner *p, int32_t node_index, ac_step *step)
{
    const ac_node *node = &p->g->nodes[node_index];
    ac_plan *plan = p->plan;
    *step = (ac_step){.node = node_index, .rate = p->g->values[node->output].rate};
    size_t n = (size_t)AC_MAX(node->n_inputs, 1);
    step->input = ac_arena_alloc(&plan->memory, n * sizeof *step->input);
    step->problem = (ac_problem){.op = node->op, .attr = node->attr, .n_inputs = node->n_inputs};
    step->problem.input = ac_arena_alloc(&plan->memory, n * sizeof *step->problem.input);
    if (!step->input || !step->problem.input) {
        return ac_no_memory(n * sizeof *step->problem.input);
    }
    for (int32_t k = 0; k < node->n_inputs; k++) {
        step->problem.input[k] = operand_of(p, node->input[k]);
    }
    step->problem.output = operand_of(p, node->output);
    step->problem.tf32 = allows_tf32(p->g, &step->problem);
    AC_TRY(choose_kernel(p, step));
    const ac_caps *caps = &plan->device->caps;
    if (step->kernel->scratch) {
        step->scratch = step->kernel->scratch(&step->problem, caps);
    }
    if (step->kernel->worker_scratch) {
        plan->worker_scratch = AC_MAX(plan->worker_scratch,
                                      step->kernel->worker_scratch(&step->problem, caps));
    }
    step->flops = node_flops(p, node);
    step->bytes = operand_bytes(&step->problem);
    return AC_OK;
}

/* Slow sections first.  Stable, so it stays a topological order: a node is at least as fast as
 * what it reads. */
static ac_status
make_steps(ac_planner *p)
{
    ac_plan *plan = p->plan;
    const ac_graph *g = p->g;
    size_t n = (size_t)AC_MAX(g->n_nodes, 1);
    plan->steps = ac_arena_alloc(&plan->memory, n * sizeof *plan->steps);
    plan->step_of = ac_arena_alloc(&plan->memory, n * sizeof *plan->step_of);
    if (!plan->steps || !plan->step_of) {
        return ac_no_memory(n * sizeof *plan->steps);
    }
    for (int32_t rate = 0; rate < AC_RATE_COUNT; rate++) {
        plan->first[rate] = plan->n_steps;
        for (int32_t i = 0; i < g->n_nodes; i++) {
            if (g->values[g->nodes[i].output].rate != (ac_rate)rate) {
                continue;
            }
            plan->step_of[i] = AC_NONE;
            if (!ac_op_is_view(g->nodes[i].op)) {
                plan->step_of[i] = plan->n_steps;
                AC_TRY(make_step(p, i, &plan->steps[plan->n_steps]));
                plan->n_steps++;
            }
        }
    }
    plan->first[AC_RATE_COUNT] = plan->n_steps;
    return AC_OK;
}

static ac_status
make_plan(ac_planner *p)
{
    AC_TRY(ac_plan_copies(p));
    AC_TRY(ac_plan_views(p));
    AC_TRY(make_steps(p));
    return ac_plan_place(p);
}

ac_status
ac_plan_new(ac_graph *g, ac_device *device, ac_plan **out)
{
    ac_plan *plan = ac_calloc(1, sizeof *plan);
    if (!plan) {
        ac_graph_free(g);
        return ac_no_memory(sizeof *plan);
    }
    ac_arena_init(&plan->memory);
    plan->graph = g;
    plan->device = ac_device_ref(device);
    ac_planner planner = {.plan = plan, .g = g};
    ac_arena_init(&planner.work);
    ac_status status = make_plan(&planner);
    ac_arena_deinit(&planner.work);
    if (status < 0) {
        ac_plan_free(plan);
        return status;
    }
    *out = plan;
    return AC_OK;
}

void
ac_plan_free(ac_plan *plan)
{
    if (!plan) {
        return;
    }
    ac_graph_free(plan->graph);
    ac_device_unref(plan->device);
    ac_arena_deinit(&plan->memory);
    ac_free(plan);
}
