/* exec: a plan bound to weights and memory; runs it.
 *
 * After its first runs the run path allocates nothing, opens nothing and reads no environment.  An
 * exec serves one run at a time; two at once are two execs, on two lanes, over one set of weights.
 */
#ifndef AC_EXEC_H
#define AC_EXEC_H

#include "plan.h"
#include "weights.h"

typedef struct ac_exec ac_exec;

/* Refers to the plan and the weights; both must outlive it. */
ac_status ac_exec_new(const ac_plan *plan, ac_weights *weights, ac_exec **out);
void ac_exec_free(ac_exec *exec);

/* Graph input (output) `name` is this tensor in the coming runs, in the device's memory.  Shape and
 * dtype must be the plan's; an input that only layout kernels read may have any strides, all else
 * is contiguous. */
ac_status ac_exec_bind(ac_exec *exec, const char *name, const ac_tensor *tensor);
ac_status ac_exec_bind_output(ac_exec *exec, const char *name, const ac_tensor *tensor);
/* The same for host memory: a run uploads inputs, downloads outputs and waits for them. */
ac_status ac_exec_bind_host(ac_exec *exec, const char *name, const ac_tensor *tensor);
ac_status ac_exec_bind_output_host(ac_exec *exec, const char *name, const ac_tensor *tensor);
/* Forgets all inputs and outputs: they are the caller's and may be gone. */
void ac_exec_unbind(ac_exec *exec);

/* Launches more work in the lane of a run. */
typedef ac_status (*ac_exec_fn)(void *arg, ac_device_lane *lane);

typedef struct ac_run {
    ac_rate from;      /* first section; see ac_exec_run */
    ac_stream stream;  /* given: work is queued there and the run does not wait for it, except to
                          download outputs.  Not given: the run is over when it returns. */
    bool queue;        /* never wait, whatever the stream */
    bool fixed;        /* the device tensors bound for STEP-rate inputs and outputs will be the same
                          in the next runs: recorded launches may use them as they are */
    ac_event *done;    /* NULL, or marks the end of the run for the host */
    /* NULL, or what goes before and after the step section, and is recorded with it: launches on
     * the device alone.  `key` stands for all that they pass by value. */
    ac_exec_fn before, after;
    void *arg;
    const ac_sampler_job *tail; /* NULL, or the backend's tail with this job is launched instead of
                                   the last two steps: ac_exec_has_tail; `key` stands for it too */
    uint64_t key;
} ac_run;

/* Runs the sections from `from` to STEP.  Sections below are taken from an earlier run of this
 * exec; when there was none, or weights changed since, it starts at PROMPT by itself.  Derived
 * weights that are missing or invalid are made first.
 * Where the backend records, the step section is recorded at the second run over the same
 * addresses and replayed from then on (ACCEL_GRAPH=off when the exec was made: never).
 * Out of memory leaves nothing of this run allocated. */
ac_status ac_exec_run_with(ac_exec *exec, const ac_run *run);
/* Whether the plan ends with a convolution whose result the last step brings to the only output in
 * NCHW, and the backend has a tail for it and this job. */
bool ac_exec_has_tail(const ac_exec *exec, const ac_sampler_job *job);
/* Calls `fn` in the order of this exec's runs; `wait` for what it queued. */
ac_status ac_exec_visit(ac_exec *exec, ac_stream stream, bool wait, ac_exec_fn fn, void *arg);
ac_status ac_exec_run_on(ac_exec *exec, ac_rate from, ac_stream stream);
ac_status ac_exec_run(ac_exec *exec, ac_rate from);

/* Device memory that the caller keeps with the exec: at least `bytes`, at the same address until
 * more is asked for or a run was out of memory.  What it held is lost when it moves. */
ac_status ac_exec_memory(ac_exec *exec, size_t bytes, void **out);

/* Why the step section, which the device could record, is launched step by step; empty: it is not,
 * or recording was switched off. */
const char *ac_exec_unrecorded(const ac_exec *exec);

/* The caller's mark of what the last PROMPT section was computed from; 0: nothing. */
uint64_t ac_exec_prompt(const ac_exec *exec);
void ac_exec_set_prompt(ac_exec *exec, uint64_t token);

#endif
