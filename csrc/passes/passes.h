/* passes: the ordered list of graph rewrites.
 *
 *     models/ -> graph -> [passes] -> graph -> plan
 *
 * Every pass computes the same function as before, with fewer or cheaper nodes, and leaves a graph
 * that ac_graph_verify accepts.  Each can be switched off and dumped.  All are deterministic and
 * linear in the number of nodes.
 */
#ifndef AC_PASSES_H
#define AC_PASSES_H

#include "../graph.h"

typedef struct ac_pass {
    const char *name; /* "merge_linears" */
    const char *why;  /* one line for dumps and explain */
    /* Edits g; may leave dead nodes and any order, ac_passes_run sorts after it. */
    ac_status (*run)(ac_graph *g);
} ac_pass;

/* In the order they run, NULL at the end; passes.c says why that order. */
extern const ac_pass *const ac_passes[];

/* Where dumps go: the graph as built and after each pass. */
typedef struct ac_dumps {
    ac_text *text; /* appended to */
    bool json;     /* {"pass", "why", "graph": as ac_graph_json} with commas between, else text */
} ac_dumps;

/* Runs the passes whose bit in `off` is 0 (bit i: ac_passes[i]).  `dumps` NULL: none. */
ac_status ac_passes_run(ac_graph *g, uint32_t off, const ac_dumps *dumps);

/* "merge_linears,fuse_norm", "all" or "" (nothing off) to the mask of ac_passes_run; an unknown
 * name is INVALID and lists the known ones.  NULL is "". */
ac_status ac_passes_off_from_text(const char *text, uint32_t *off);

/* Float weights of other dtypes get a LOAD-rate CAST, and derived weights are made in `dtype` at
 * once, because fast kernels take weights of the dtype they compute in.  After ac_passes_run. */
ac_status ac_cast_weights(ac_graph *g, ac_dtype dtype);

#endif
