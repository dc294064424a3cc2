/* merge_linears: linears that read the same x become one, over their weights joined by row.
 *
 *     linear(x, w1, b1), linear(x, w2, b2) -> y = linear(x, [w1; w2], [b1; b2]), two slices of y
 *
 * QKV of self-attention; K and V of all cross-attentions (one GEMM a prompt); the time projections
 * of all resnets (one GEMM a schedule).  The joined weight is LOAD rate, so it is made once.
 *
 * A slice by column is a view with gaps between its rows, so only linears whose readers take such
 * views are merged.  That also leaves alone what would gain more from an epilogue of its own: a
 * linear before an activation, a gate or a residual.  Between a linear and its readers may stand
 * selects and reshapes that keep the columns, the same in all members: they are done once, on y.
 */
#include "edit.h"

/* What may stand between a linear and its slice: a select, and a reshape on either side. */
#define MAX_STEPS 3

typedef struct member {
    int32_t linear;          /* node */
    ac_val x;
    int32_t step[MAX_STEPS]; /* nodes between it and `end`, in order */
    int32_t n_steps;
    ac_val end;              /* what its readers read */
    int32_t next;            /* member with the same x, or AC_NONE */
    bool merged;
} member;

typedef struct merger {
    ac_graph *g;
    ac_uses uses;
    int32_t *strided; /* per value: uses that take rows with gaps */
    member *members;
    int32_t n_members;
    int32_t *last; /* per value: last member that reads it */
} merger;

static bool
reads_strided(const ac_graph *g, const ac_node *node, int32_t slot)
{
    switch (node->op) {
    case AC_OP_ATTENTION:
        return slot != AC_ATTN_MASK;
    case AC_OP_ADD: /* the broadcast operand: a few rows */
        return slot == 1 && g->values[node->input[1]].shape.rank <
                                g->values[node->input[0]].shape.rank;
    case AC_OP_GROUP_NORM:
        return slot == AC_GN_SHIFT;
    default:
        return false;
    }
}

static int32_t
last_axis(const ac_graph *g, ac_val v)
{
    return g->values[v].shape.rank - 1;
}

static int64_t
columns(const ac_graph *g, ac_val v)
{
    return g->values[v].shape.dim[last_axis(g, v)];
}

/* ---- members --------------------------------------------------------------------------------- */

static bool
is_plain_linear(const ac_graph *g, const ac_node *node)
{
    return node->op == AC_OP_LINEAR && !node->attr.linear.gated &&
           ac_node_operand(node, AC_LINEAR_RESIDUAL) == AC_NONE &&
           ac_node_operand(node, AC_LINEAR_X2) == AC_NONE &&
           g->values[node->input[AC_LINEAR_W]].rate == AC_RATE_LOAD &&
           g->values[node->input[AC_LINEAR_X]].rate > AC_RATE_LOAD;
}

static bool
is_step(const ac_graph *g, const ac_node *node)
{
    bool reshape = node->op == AC_OP_RESHAPE && g->values[node->output].shape.rank > 0;
    return (reshape || node->op == AC_OP_SELECT) &&
           columns(g, node->output) == columns(g, node->input[0]);
}

/* Follows a linear's result to where it is read.  False when a reader needs packed rows. */
static bool
find_member(const merger *m, int32_t at, member *out)
{
    const ac_graph *g = m->g;
    *out = (member){.linear = at, .x = g->nodes[at].input[AC_LINEAR_X],
                    .end = g->nodes[at].output, .next = AC_NONE};
    int32_t user = ac_sole_user(g, &m->uses, out->end);
    while (user != AC_NONE && out->n_steps < MAX_STEPS && is_step(g, &g->nodes[user])) {
        out->step[out->n_steps++] = user;
        out->end = g->nodes[user].output;
        user = ac_sole_user(g, &m->uses, out->end);
    }
    int32_t count = m->uses.count[out->end];
    return count > 0 && count == m->strided[out->end] && !g->values[out->end].output;
}

static bool
same_dtype(const ac_graph *g, ac_val a, ac_val b)
{
    return a == AC_NONE || b == AC_NONE || g->values[a].dtype == g->values[b].dtype;
}

static bool
same_step(const ac_graph *g, const ac_node *a, const ac_node *b)
{
    if (a->op != b->op) {
        return false;
    }
    if (a->op == AC_OP_SELECT) {
        return a->input[1] == b->input[1];
    }
    ac_shape x = g->values[a->output].shape, y = g->values[b->output].shape;
    x.dim[x.rank - 1] = y.dim[y.rank - 1] = 0;
    return ac_shape_equal(&x, &y);
}

static bool
can_join(const ac_graph *g, const member *a, const member *b)
{
    const ac_node *x = &g->nodes[a->linear], *y = &g->nodes[b->linear];
    bool same = x->attr.linear.act == y->attr.linear.act && a->n_steps == b->n_steps &&
                g->values[x->input[AC_LINEAR_W]].shape.rank ==
                    g->values[y->input[AC_LINEAR_W]].shape.rank &&
                same_dtype(g, x->input[AC_LINEAR_W], y->input[AC_LINEAR_W]) &&
                same_dtype(g, ac_node_operand(x, AC_LINEAR_B), ac_node_operand(y, AC_LINEAR_B)) &&
                same_dtype(g, x->output, y->output);
    for (int32_t i = 0; same && i < a->n_steps; i++) {
        same = same_step(g, &g->nodes[a->step[i]], &g->nodes[b->step[i]]);
    }
    return same;
}

/* ---- groups ---------------------------------------------------------------------------------- */

typedef struct group {
    const member **member;
    int32_t n;
    ac_val *part; /* n, for the operands of a concat */
    const char *name;
} group;

static ac_val
join(ac_graph *g, const group *s, ac_dtype dtype, const char *what)
{
    const char *name = ac_arena_printf(&g->arena, "%s.%s", s->name, what);
    ac_attr attr = {.axis = {.axis = 0}};
    return ac_graph_node(g, AC_OP_CONCAT, &attr, s->part, s->n, dtype, NULL, name ? name : what);
}

static ac_val
join_weights(ac_graph *g, const group *s)
{
    for (int32_t i = 0; i < s->n; i++) {
        s->part[i] = g->nodes[s->member[i]->linear].input[AC_LINEAR_W];
    }
    return join(g, s, g->values[s->part[0]].dtype, "weight");
}

/* AC_NONE when no member has a bias; a member without one adds zeros where others have one. */
static ac_val
join_biases(ac_graph *g, const group *s)
{
    ac_val some = AC_NONE;
    for (int32_t i = 0; i < s->n; i++) {
        s->part[i] = ac_node_operand(&g->nodes[s->member[i]->linear], AC_LINEAR_B);
        some = s->part[i] == AC_NONE ? some : s->part[i];
    }
    if (some == AC_NONE) {
        return AC_NONE;
    }
    ac_dtype dtype = g->values[some].dtype;
    for (int32_t i = 0; i < s->n; i++) {
        if (s->part[i] == AC_NONE) {
            ac_shape shape = AC_SHAPE(columns(g, g->nodes[s->member[i]->linear].output));
            s->part[i] = ac_graph_node(g, AC_OP_FILL, NULL, NULL, 0, dtype, &shape, s->name);
        }
    }
    return join(g, s, dtype, "bias");
}

/* The first member's steps, on the joined result. */
static ac_val
redo_steps(ac_graph *g, const member *first, ac_val y)
{
    for (int32_t i = 0; i < first->n_steps && y != AC_NONE; i++) {
        const ac_node step = g->nodes[first->step[i]];
        const ac_value result = g->values[step.output];
        ac_shape wanted = result.shape;
        wanted.dim[wanted.rank - 1] = columns(g, y);
        ac_val input[] = {y, ac_node_operand(&step, 1)};
        y = ac_graph_node(g, step.op, &step.attr, input, 2, result.dtype, &wanted, step.name);
    }
    return y;
}

static ac_status
merge(ac_graph *g, const group *s)
{
    const member *first = s->member[0];
    const ac_node linear = g->nodes[first->linear];
    ac_val w = join_weights(g, s), b = join_biases(g, s);
    AC_TRY(ac_graph_status(g));
    ac_val input[] = {linear.input[AC_LINEAR_X], w, b};
    ac_val y = ac_graph_node(g, AC_OP_LINEAR, &linear.attr, input, 3,
                             g->values[linear.output].dtype, NULL, s->name);
    y = redo_steps(g, first, y);
    AC_TRY(ac_graph_status(g));
    ac_attr slice = {.axis = {.axis = last_axis(g, y)}};
    for (int32_t i = 0; i < s->n; i++) {
        ac_val end = s->member[i]->end;
        AC_TRY(ac_node_become(g, g->values[end].node, AC_OP_SLICE, &slice, &y, 1));
        slice.axis.start += columns(g, end);
    }
    return AC_OK;
}

/* Merges `first` and the members after it that read the same x and go with it. */
static ac_status
merge_with(merger *m, int32_t first, group *s)
{
    ac_graph *g = m->g;
    s->n = 0;
    for (int32_t i = first; i != AC_NONE; i = m->members[i].next) {
        member *next = &m->members[i];
        if (!next->merged && can_join(g, &m->members[first], next)) {
            next->merged = true;
            s->member[s->n++] = next;
        }
    }
    if (s->n < 2) {
        return AC_OK;
    }
    s->name = ac_arena_printf(&g->arena, "%s (+%d)", g->nodes[s->member[0]->linear].name, s->n - 1);
    return s->name ? merge(g, s) : ac_no_memory(0);
}

/* ---- pass ------------------------------------------------------------------------------------ */

static void
count_strided(merger *m)
{
    const ac_graph *g = m->g;
    for (int32_t i = 0; i < g->n_nodes; i++) {
        const ac_node *node = &g->nodes[i];
        for (int32_t k = 0; k < node->n_inputs; k++) {
            if (node->input[k] != AC_NONE) {
                m->strided[node->input[k]] += reads_strided(g, node, k);
            }
        }
    }
}

static void
find_members(merger *m)
{
    const ac_graph *g = m->g;
    for (ac_val v = 0; v < g->n_values; v++) {
        m->last[v] = AC_NONE;
    }
    for (int32_t i = 0; i < g->n_nodes; i++) {
        member *next = &m->members[m->n_members];
        if (!is_plain_linear(g, &g->nodes[i]) || !find_member(m, i, next)) {
            continue;
        }
        int32_t *last = &m->last[next->x];
        if (*last != AC_NONE) {
            m->members[*last].next = m->n_members;
        }
        *last = m->n_members++;
    }
}

static ac_status
run(ac_graph *g)
{
    ac_arena work;
    ac_arena_init(&work);
    merger m = {.g = g};
    ac_status status = ac_uses_init(g, &m.uses);
    size_t values = (size_t)g->n_values, nodes = (size_t)g->n_nodes;
    m.strided = ac_arena_alloc(&work, values * sizeof *m.strided);
    m.last = ac_arena_alloc(&work, values * sizeof *m.last);
    m.members = ac_arena_alloc(&work, (nodes + 1) * sizeof *m.members);
    group s = {.member = ac_arena_alloc(&work, nodes * sizeof(member *)),
               .part = ac_arena_alloc(&work, nodes * sizeof(ac_val))};
    if (status == AC_OK && (!m.strided || !m.last || !m.members || !s.member || !s.part)) {
        status = ac_no_memory(nodes * sizeof *m.members);
    }
    if (status == AC_OK) {
        count_strided(&m);
        find_members(&m);
    }
    for (int32_t i = 0; i < m.n_members && status == AC_OK; i++) {
        if (!m.members[i].merged) {
            status = merge_with(&m, i, &s);
        }
    }
    ac_uses_deinit(&m.uses);
    ac_arena_deinit(&work);
    return status;
}

const ac_pass ac_pass_merge_linears = {
    .name = "merge_linears",
    .why = "linears of one input become one, cut by views",
    .run = run,
};
