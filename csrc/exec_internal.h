/* exec_internal: what the files of the exec share; nothing else includes it.
 *
 *     exec.c          life, the caller's tensors, a run       exec_edges.c   slots and copies
 *     exec_weights.c  where weights are, derived weights      exec_record.c  the recorded section
 */
#ifndef AC_EXEC_INTERNAL_H
#define AC_EXEC_INTERNAL_H

#include "exec.h"

/* A graph input or output. */
typedef struct ac_edge {
    ac_tensor caller;   /* what was bound; data NULL: nothing */
    bool host;          /* bound with _host, and the device cannot read there */
    bool any_strides;   /* an input whose readers take any strides */
    bool is_edge;       /* false: a value inside the graph */
    bool output;
    bool step;          /* a step of STEP rate reads or writes it: a recording holds its address */
    bool slotted;       /* this run goes through the slot */
    size_t slot;        /* offset in `slots` */
} ac_edge;

struct ac_exec {
    const ac_plan *plan;
    ac_weights *weights;
    ac_device_lane *lane;    /* of the last run: preferred in the next, for warm caches */
    void *keep;              /* plan->keep_bytes of device memory, from the first run on */
    void *slots;             /* slot_bytes of device memory, NULL until needed */
    size_t slot_bytes;
    void *extra;             /* ac_exec_memory */
    size_t extra_bytes;
    ac_edge *edges;          /* one a graph value */
    ac_val *edge_at;         /* the values that are edges */
    int32_t n_edges;
    ac_tensor *bound;        /* one a graph value: what launches see of edges and weights */
    ac_problem *problems;    /* plan->n_steps, with tensors of their own */

    /* exec_weights.c */
    ac_derived **derived;    /* plan->n_derived, owned by the weights */
    ac_derived **copies;     /* one a graph value: of a weight in host memory, or NULL */
    bool *on_host;           /* one a graph value: a weight that the device cannot read */
    bool *resident;          /* one a graph value: a weight that steps beyond LOAD read */
    bool *passing;           /* one a derived: only prepared forms are made of it */
    bool *fresh;             /* one a derived, then one a graph value: allocated by this run */
    uint8_t *needed;         /* one a LOAD step: must run to derive */
    void *staging;           /* while deriving: sources that are not resident */
    uint64_t generation;     /* of the weights when `bound` was filled */
    bool weights_bound;

    bool ran;                /* slow sections hold results */
    uint64_t prompt;

    /* exec_record.c */
    bool can_record;
    ac_recording *recording; /* NULL: none */
    uint64_t recorded;       /* key of `recording` */
    uint64_t seen;           /* key of the last eager step section, 0: none */
    int32_t failed_recordings; /* in a row */
    char unrecorded[256];    /* why recording was given up; empty: it was not */

    ac_arena memory;         /* of the arrays above */
};

static inline bool
ac_exec_on_host(const ac_exec *e)
{
    return e->plan->device->backend->host_memory;
}

/* ---- exec.c ---------------------------------------------------------------------------------- */

/* Puts addresses into the step's problem. */
void ac_exec_resolve(ac_exec *e, const ac_device_lane *lane, int32_t s);
ac_status ac_exec_launch(ac_exec *e, ac_device_lane *lane, int32_t s);
/* The backend's tail instead of the last two steps. */
ac_status ac_exec_launch_tail(ac_exec *e, ac_device_lane *lane, const ac_sampler_job *job);
/* before, the step section, tail, after. */
ac_status ac_exec_launch_step(ac_exec *e, ac_device_lane *lane, const ac_run *run);

/* ---- exec_edges.c ---------------------------------------------------------------------------- */

/* Finds the edges of the plan, and what reads them. */
ac_status ac_exec_find_edges(ac_exec *e);
/* Decides which edges go through slots in this run, and fills `bound` for all of them. */
ac_status ac_exec_place_edges(ac_exec *e, const ac_run *run);
/* What sections from `start` on read. */
ac_status ac_exec_copy_in(ac_exec *e, ac_device_lane *lane, ac_rate start);
ac_status ac_exec_copy_out(ac_exec *e, ac_device_lane *lane);
bool ac_exec_has_host_output(const ac_exec *e);

/* ---- exec_weights.c -------------------------------------------------------------------------- */

ac_status ac_exec_find_weights(ac_exec *e);
/* Binds weights that moved, uploads and derives what is missing.  On failure what this call
 * allocated is freed. */
ac_status ac_exec_derive(ac_exec *e, ac_device_lane *lane);

/* ---- exec_record.c --------------------------------------------------------------------------- */

/* The step section: replayed, recorded or launched. */
ac_status ac_exec_step(ac_exec *e, ac_device_lane *lane, const ac_run *run);
void ac_exec_forget_recording(ac_exec *e);

#endif
