/* profile: how long each step of a plan takes, and how far that is from what the device could do.
 *
 * A step's bound is max(FLOPs / peak, bytes / bandwidth), each operand moved once; what a step
 * takes beyond it is lost to its kernel.
 */
#ifndef AC_PROFILE_H
#define AC_PROFILE_H

#include "model.h"

typedef struct ac_profile_args {
    int32_t repeats;   /* timed runs, the best of each step counts; 0: 10 */
    double flops;      /* FLOP/s that the device reaches; 0: what its caps say */
    double bandwidth;  /* bytes/s; 0: what its caps say */
    double tf32_flops; /* of steps that may use TF32; 0: where flops is given, that */
} ac_profile_args;

/* Times of one exec in milliseconds. */
typedef struct ac_profile_times {
    double *step;                   /* one a step of the plan; 0 at LOAD rate */
    double section[AC_RATE_COUNT];  /* launched without anything in between */
    double sampler[2];              /* before and after the step section of a loop, else 0 */
    double tail;                    /* what a loop launches instead of both and of the section's
                                       last two steps; 0: its backend has none */
} ac_profile_times;

/* Runs the exec, whose edges are bound, and times it.  On a GPU by events around each launch of a
 * recording, so that the host's pace is not in the numbers; an event costs a microsecond or so,
 * which `section` shows.  The sampler's row is a linear one with guidance where the batch is even,
 * without noise, rescale or thresholds. */
ac_status ac_exec_profile(ac_exec *exec, int32_t repeats, ac_profile_times *times);

/* The plan for this shape over random inputs, as tables or JSON: by section, class of op, kernel,
 * step. */
ac_status ac_model_profile(ac_model *model, const ac_build_args *build,
                           const ac_profile_args *args, bool json, ac_text *text);

/* profile_text.c */
void ac_profile_report(const ac_plan *plan, const char *model, const ac_profile_args *args,
                       const ac_profile_times *times, bool json, ac_text *text);

#endif
