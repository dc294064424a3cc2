/* dnn: cuDNN's graphs, as far as convolutions and attention need them.
 *
 *     ac_dnn_call -> known problem? run its plan : describe -> heuristic's configurations -> tune.c
 *
 * A problem is described once for a device; of the configurations that the library proposes, those
 * with sums or inputs of less precision than asked for, or other bits in another run, are left out.
 * One that cannot be made after all is skipped.  Plans are made when they are first tried, so a
 * known choice makes one.
 */
#ifndef AC_CUDA_DNN_H
#define AC_CUDA_DNN_H

#include "library.h"

#include <cudnn_backend.h>

typedef cudnnBackendDescriptor_t ac_dnn_descriptor;

/* What a description makes; all is freed with it.  Errors stick: later calls do nothing. */
typedef struct ac_dnn_graph {
    ac_dnn_descriptor made[40], operation[4];
    int32_t n_made, n_operations;
    cudnnStatus_t status;
} ac_dnn_graph;

typedef struct ac_dnn_tensor {
    int64_t id; /* of its address in a call; another one for each tensor */
    ac_dtype dtype;
    int64_t dim[4], stride[4];
    bool inner;    /* between two operations: has no address */
    bool by_value; /* its address is the host's */
} ac_dnn_tensor;

ac_dnn_descriptor ac_dnn_tensor_new(ac_dnn_graph *g, const ac_dnn_tensor *tensor);
/* Begin, set attributes, end; an operation is added to the graph when it ends. */
ac_dnn_descriptor ac_dnn_begin(ac_dnn_graph *g, cudnnBackendDescriptorType_t type);
void ac_dnn_set(ac_dnn_graph *g, ac_dnn_descriptor d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t count, const void *values);
void ac_dnn_set_part(ac_dnn_graph *g, ac_dnn_descriptor d, cudnnBackendAttributeName_t name,
                     ac_dnn_descriptor part);
void ac_dnn_end(ac_dnn_graph *g, ac_dnn_descriptor d, bool operation);
void ac_dnn_add(ac_dnn_graph *g, ac_dnn_descriptor a, ac_dnn_descriptor b, ac_dnn_descriptor y);

enum { AC_DNN_CONV = 1, AC_DNN_ATTENTION, AC_DNN_OPERANDS = 6, AC_DNN_OWN = 3 };

/* Everything that a description depends on; compared byte by byte. */
typedef struct ac_dnn_key {
    int32_t kind, dtype;
    int32_t tf32, pad; /* bool: f32 factors may be rounded to TF32 */
    int64_t value[20];
} ac_dnn_key;

/* A way of our own to do the whole problem. */
typedef struct ac_dnn_own {
    const char *name;
    ac_status (*run)(ac_lane *lane, const void *context);
} ac_dnn_own;

typedef struct ac_dnn_call {
    ac_lane *lane;
    ac_dnn_key key;
    void (*describe)(ac_dnn_graph *g, const ac_dnn_key *key);
    int32_t n_operands;
    int64_t id[AC_DNN_OPERANDS];
    const void *address[AC_DNN_OPERANDS];
    void *workspace;
    size_t workspace_bytes; /* configurations that want more are left out */
    ac_dnn_own own[AC_DNN_OWN]; /* the last ones, n_slow, only where nothing else does it */
    int32_t n_own, n_slow;
    const void *context; /* of them */
    bool without; /* the library: it is slow at this, or not there */
} ac_dnn_call;

/* True when there is a cuDNN 9 (at least 9.minor); looked for once. */
bool ac_dnn_found(int32_t minor);
/* Locks by itself. */
ac_status ac_dnn_run(const ac_dnn_call *call);

/* cudnn_store.c: a plan's JSON under a title of one line.  The caller frees *json. */
bool ac_dnn_store_read(const char *folder, const char *title, char **json, size_t *length);
void ac_dnn_store_write(const char *folder, const char *title, const char *json, size_t length);

#endif
