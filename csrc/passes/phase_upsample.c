/* phase_upsample: nearest 2x upsampling and a 3x3 convolution become four 2x2 convolutions.
 *
 * After doubling, a 3x3 window covers only 2x2 source pixels, and which taps fall on the same
 * pixel depends on the parity of row and column alone.  Summing those taps once gives a 2x2 kernel
 * for each of the four phases: 16 multiplications where there were 36, and no large intermediate.
 * Exact when both axes are doubled exactly; for odd targets (forward_upsample_size) the last row
 * and column would differ, so those stay.  Costs derived memory of 16/9 of the weight.
 */
#include "edit.h"

static bool
is_plain_3x3(const ac_graph *g, const ac_node *node)
{
    const ac_conv2d_attr *a = &node->attr.conv2d;
    const ac_value *w = &g->values[node->input[AC_CONV_W]];
    return w->shape.dim[2] == 3 && w->shape.dim[3] == 3 && a->stride == 1 && a->pad_top == 1 &&
           a->pad_left == 1 && a->pad_bottom == 1 && a->pad_right == 1 &&
           w->rate == AC_RATE_LOAD && ac_node_operand(node, AC_CONV_X2) == AC_NONE;
}

static bool
doubles(const ac_graph *g, const ac_node *up)
{
    const ac_shape *from = &g->values[up->input[0]].shape, *to = &g->values[up->output].shape;
    return to->dim[1] == 2 * from->dim[1] && to->dim[2] == 2 * from->dim[2];
}

static ac_status
rewrite(ac_graph *g, int32_t at, ac_val x)
{
    const ac_node conv = g->nodes[at];
    ac_val w = conv.input[AC_CONV_W];
    ac_val phases = ac_graph_node(g, AC_OP_PHASE_WEIGHT, NULL, &w, 1, g->values[w].dtype, NULL,
                                  g->values[w].name);
    AC_TRY(ac_graph_status(g));
    ac_attr attr = {.up_conv2d = {.act = conv.attr.conv2d.act}};
    ac_val input[] = {x, phases, ac_node_operand(&conv, AC_CONV_B),
                      ac_node_operand(&conv, AC_CONV_RESIDUAL)};
    return ac_node_become(g, at, AC_OP_UP_CONV2D, &attr, input, AC_ARRAY_LEN(input));
}

static ac_status
run(ac_graph *g)
{
    ac_uses uses;
    AC_TRY(ac_uses_init(g, &uses));
    ac_status status = AC_OK;
    for (int32_t i = 0, n = g->n_nodes; i < n && status == AC_OK; i++) {
        const ac_node *node = &g->nodes[i];
        if (node->op != AC_OP_CONV2D || !is_plain_3x3(g, node)) {
            continue;
        }
        int32_t up = ac_sole_producer(g, &uses, node->input[AC_CONV_X], AC_OP_UPSAMPLE);
        if (up != AC_NONE && doubles(g, &g->nodes[up])) {
            status = rewrite(g, i, g->nodes[up].input[0]);
        }
    }
    ac_uses_deinit(&uses);
    return status;
}

const ac_pass ac_pass_phase_upsample = {
    .name = "phase_upsample",
    .why = "2x upsample and 3x3 convolution as four 2x2 phase convolutions",
    .run = run,
};
