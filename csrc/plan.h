/* plan: a flat, printable program.  Pure: no device memory, no addresses, only offsets.
 *
 *     graph -> [plan] -> exec
 *
 * Picks a kernel for every node, turns views into offsets and strides, orders the steps by rate and
 * places every buffer.  A plan never changes once made and may be shared by any number of execs.
 */
#ifndef AC_PLAN_H
#define AC_PLAN_H

#include "device.h"
#include "graph.h"

/* Where an operand's bytes are. */
typedef enum ac_space {
    AC_SPACE_NONE,    /* absent optional operand */
    AC_SPACE_INPUT,   /* index: graph value; the caller's tensor */
    AC_SPACE_OUTPUT,  /* index: graph value; the caller's result */
    AC_SPACE_WEIGHT,  /* index: graph value; bound from ac_weights */
    AC_SPACE_DERIVED, /* index: into plan->derived */
    AC_SPACE_ARENA,   /* the lane's: lives within one section of one run */
    AC_SPACE_KEEP     /* the exec's own: crosses rates, so it outlives a run */
} ac_space;

typedef struct ac_ref {
    ac_space space;
    int32_t index;
    size_t offset; /* bytes, from the start of the space's memory or of the tensor */
} ac_ref;

typedef struct ac_step {
    int32_t node;
    const ac_kernel *kernel;
    ac_rate rate;
    ac_problem problem;  /* shapes and strides; data is NULL */
    ac_ref *input;       /* problem.n_inputs of them */
    ac_ref output;
    size_t scratch, scratch_offset; /* bytes; in the arena */
    int32_t prepared;    /* index into plan->derived, or AC_NONE */
    double flops;
    double bytes;        /* each operand once */
} ac_step;

/* A weight that accel makes: the result of a LOAD-rate node that slower code needs, or the form
 * that a kernel prepares.  Two plans that need the same one share it through `key`. */
typedef struct ac_plan_derived {
    const char *key;
    ac_val value;            /* what is made, or prepared from */
    const ac_step *prepare;  /* the step whose kernel prepares it, or NULL */
    size_t bytes;
    const char *const *source; /* weights it comes from */
    int32_t n_sources;
} ac_plan_derived;

typedef struct ac_plan {
    ac_graph *graph;     /* owned */
    ac_arena memory;     /* of everything below */
    ac_device *device;   /* referenced */
    ac_step *steps;      /* LOAD rate first, then prompt, schedule, step */
    int32_t n_steps;
    int32_t *step_of;    /* graph node -> step, AC_NONE for views */
    int32_t first[AC_RATE_COUNT + 1]; /* steps of rate r are first[r] .. first[r+1]-1 */
    ac_plan_derived *derived;
    int32_t n_derived;
    size_t arena_bytes, keep_bytes;
    size_t bound_bytes;  /* most bytes live at once: no arena can be smaller */
    size_t worker_scratch;
} ac_plan;

/* Takes the graph over, also on failure; it is sorted and passes have run. */
ac_status ac_plan_new(ac_graph *g, ac_device *device, ac_plan **out);
void ac_plan_free(ac_plan *plan);

/* The plan as text or JSON: kernel, shapes, offsets, FLOPs, bytes, node name; then the totals. */
void ac_plan_explain(const ac_plan *plan, bool json, ac_text *text);

#endif
