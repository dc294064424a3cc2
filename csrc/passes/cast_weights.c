/* cast_weights: float weights of another dtype become `dtype`, once, as derived weights.
 *
 * Fast kernels read one dtype: f32 files computed in f16 on a GPU, f16 parameters computed in f32
 * on a CPU, and modules of mixed dtypes all end here.  Runs after the passes: a weight that only
 * derived weights are made from (a merged GEMM's parts, phase sums) is read as it is, and the
 * result is made in `dtype` at once, so no converted copy of the parts is ever in memory.
 */
#include "edit.h"

#include <string.h>

static bool
is_foreign(const ac_graph *g, ac_val v, ac_dtype dtype)
{
    return g->values[v].rate == AC_RATE_LOAD && ac_dtype_is_float(g->values[v].dtype) &&
           g->values[v].dtype != dtype;
}

/* Ops that read any float dtype and round to that of their result. */
static bool
converts(ac_op op)
{
    return op == AC_OP_CONCAT || op == AC_OP_PHASE_WEIGHT || op == AC_OP_CAST || op == AC_OP_FILL;
}

/* The value to read instead of weight `v`; one cast a weight. */
static ac_val
cast_of(ac_graph *g, ac_val v, ac_dtype dtype, ac_val *casts)
{
    if (casts[v] == AC_NONE) {
        casts[v] = ac_graph_node(g, AC_OP_CAST, NULL, &v, 1, dtype, NULL, g->values[v].name);
    }
    return casts[v];
}

static ac_status
cast_operands(ac_graph *g, ac_dtype dtype, ac_val *casts)
{
    for (int32_t i = 0, n = g->n_nodes; i < n; i++) {
        ac_val result = g->nodes[i].output;
        bool derived = g->values[result].rate == AC_RATE_LOAD;
        if (derived && is_foreign(g, result, dtype)) {
            g->values[result].dtype = dtype;
        }
        if (derived && converts(g->nodes[i].op)) {
            continue;
        }
        for (int32_t k = 0; k < g->nodes[i].n_inputs; k++) {
            ac_val v = g->nodes[i].input[k];
            if (v != AC_NONE && g->values[v].kind == AC_VALUE_WEIGHT &&
                is_foreign(g, v, dtype)) {
                ac_val cast = cast_of(g, v, dtype, casts);
                AC_TRY(ac_graph_status(g));
                g->nodes[i].input[k] = cast;
            }
        }
    }
    return AC_OK;
}

ac_status
ac_cast_weights(ac_graph *g, ac_dtype dtype)
{
    size_t bytes = (size_t)AC_MAX(g->n_values, 1) * sizeof(ac_val);
    ac_val *casts = ac_malloc(bytes);
    if (!casts) {
        return ac_no_memory(bytes);
    }
    memset(casts, 0xff, bytes); /* AC_NONE */
    ac_status status = cast_operands(g, dtype, casts);
    ac_free(casts);
    return status < 0 ? status : ac_graph_sort(g);
}
