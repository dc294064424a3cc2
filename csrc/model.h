/* model: a config and its weights on a device; plans made when a new shape first comes, a small
 * LRU of them.  What csrc/py and denoise.c call.
 *
 * Thread safe: any number of threads may run one model; each run takes an exec of its own.
 */
#ifndef AC_MODEL_H
#define AC_MODEL_H

#include "exec.h"
#include "models/models.h"

typedef struct ac_model ac_model;

/* `config` is read and not kept.  `passes_off`: "" or names of passes ("cse,phase_upsample").
 * Raises what parse and ac_model_check_weights raise.  Refers to the weights.
 * weights NULL: a model without weights, for plans and explain on the null device. */
ac_status ac_model_new(const ac_json *config, ac_weights *weights, const char *device,
                       const char *passes_off, ac_model **out);
ac_model *ac_model_ref(ac_model *model);
void ac_model_unref(ac_model *model);

const char *ac_model_class_name(const ac_model *model);
ac_device *ac_model_device(ac_model *model); /* borrowed */

/* An exec for this shape, for the caller alone until it is given back.  `prompt`: the one whose
 * cached prompt section has this token is preferred (0: none). */
ac_status ac_model_take(ac_model *model, const ac_build_args *args, uint64_t prompt,
                        ac_exec **out);
void ac_model_give(ac_model *model, ac_exec *exec);

/* Before a run of this shape, where memory is somebody else's: ac_device_make_room for it. */
ac_status ac_model_make_room(ac_model *model, const ac_build_args *args, size_t *freed);

/* Outputs of the graph for this shape, in order; the caller frees *out with ac_free.  Names live
 * as long as the plan: copy them. */
typedef struct ac_io {
    const char *name;
    ac_dtype dtype;
    ac_shape shape;
    bool output;
} ac_io;
ac_status ac_model_io(ac_model *model, const ac_build_args *args, ac_io **out, int32_t *count);

/* Text or JSON of the plan for this shape, with `dumps` the graph after each pass before it; the
 * JSON is {"passes": [{"pass", "why", "graph": as ac_graph_json}], "plan"} then. */
ac_status ac_model_explain(ac_model *model, const ac_build_args *args, bool json, bool dumps,
                           ac_text *text);

typedef struct ac_model_stats {
    int64_t runs;         /* completed runs of any exec */
    int32_t plans, execs; /* in the cache now */
    size_t arena_bytes;   /* of the largest cached plan */
    size_t bound_bytes;   /* live-range lower bound of that plan */
    size_t keep_bytes;    /* held by execs */
    double plan_ms;       /* time to build, rewrite and plan the newest graph */
    char unrecorded[256]; /* why some exec launches its steps one by one, see ac_exec_unrecorded */
} ac_model_stats;
void ac_model_get_stats(ac_model *model, ac_model_stats *out);

/* Weights were re-bound to another dtype or moved: plans that do not fit are dropped by
 * themselves; this drops everything now, with the arenas that models of the device share (offload).
 */
void ac_model_drop_plans(ac_model *model);

#endif
