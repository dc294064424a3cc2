/* plan_internal: what the files of the planner share; nothing else includes it.
 *
 *     plan.c    order, kernels, steps        plan_views.c  where values live, strides of views
 *     plan_place.c  blocks and offsets       explain.c     the plan as text and JSON
 */
#ifndef AC_PLAN_INTERNAL_H
#define AC_PLAN_INTERNAL_H

#include "plan.h"

/* One a graph value: where its bytes are and how they are spaced. */
typedef struct ac_place {
    ac_val base;                   /* the value whose buffer holds it: itself unless a view */
    int64_t offset;                /* elements from the base's start */
    int64_t stride[AC_MAX_RANK];
    int32_t first, last;           /* steps of the base: made, last read; last -1: never */
    ac_rate last_rate;             /* fastest reader of the base */
    ac_ref ref;                    /* of the base, offset 0 */
} ac_place;

typedef struct ac_planner {
    ac_plan *plan;
    ac_graph *g;
    ac_place *places;  /* g->n_values */
    ac_arena work;     /* goes when planning ends */
} ac_planner;

/* Puts copies where a view cannot be one, and where an output needs a buffer of its own. */
ac_status ac_plan_copies(ac_planner *p);
/* Fills base, offset and strides of every value. */
ac_status ac_plan_views(ac_planner *p);
/* Decides the space of every base and places arena and keep; fills ref and scratch offsets. */
ac_status ac_plan_place(ac_planner *p);
/* Strides that give `shape` over the same bytes as (from, stride); false when there are none. */
bool ac_reshape_strides(const ac_shape *from, const int64_t *stride, const ac_shape *shape,
                        int64_t *out);

#endif
