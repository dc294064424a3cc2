/* exec: a plan bound to weights and memory; runs it.
 *
 * The run path allocates nothing, opens nothing and reads no environment.  An exec serves one run
 * at a time; two at once are two execs, on two lanes, over one set of weights.
 */
#ifndef AC_EXEC_H
#define AC_EXEC_H

#include "plan.h"
#include "weights.h"

typedef struct ac_exec ac_exec;

/* Refers to the plan and the weights; both must outlive it. */
ac_status ac_exec_new(const ac_plan *plan, ac_weights *weights, ac_exec **out);
void ac_exec_free(ac_exec *exec);

/* Graph input (output) `name` is this tensor in the coming runs.  Shape and dtype must be the
 * plan's; an input that only layout kernels read may have any strides, all else is contiguous. */
ac_status ac_exec_bind(ac_exec *exec, const char *name, const ac_tensor *tensor);
ac_status ac_exec_bind_output(ac_exec *exec, const char *name, const ac_tensor *tensor);
/* Forgets all inputs and outputs: they are the caller's and may be gone. */
void ac_exec_unbind(ac_exec *exec);

/* Runs the sections from `from` to STEP.  Sections below are taken from an earlier run of this
 * exec; when there was none, or weights changed since, it starts at PROMPT by itself.  Derived
 * weights that are missing or invalid are made first. */
ac_status ac_exec_run(ac_exec *exec, ac_rate from);

/* The caller's mark of what the last PROMPT section was computed from; 0: nothing. */
uint64_t ac_exec_prompt(const ac_exec *exec);
void ac_exec_set_prompt(ac_exec *exec, uint64_t token);

#endif
