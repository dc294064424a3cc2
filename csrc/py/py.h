/* py: what the files of the CPython boundary share.  Only csrc/py includes Python.h.
 *
 * Conventions: a function that can fail returns NULL or -1 with a Python exception set.  Engine
 * calls that may take longer than a microsecond run without the GIL.  Types are heap types, not
 * subclassable, so that a type's module state is always ours.
 */
#ifndef AC_PY_H
#define AC_PY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../device.h"
#include "../model.h"
#include "../rng.h"
#include "../scheduler.h"
#include "../weights.h"

#include <stdatomic.h>
#include <string.h>

#define AC_PY_ERRORS 12 /* rows of AC_STATUS_MAP; errors.c checks it */

typedef struct ac_py_state {
    PyObject *base_error;             /* AccelError */
    PyObject *errors[AC_PY_ERRORS];   /* in the order of AC_STATUS_MAP */
    PyTypeObject *tensor, *weights, *model, *cancel, *schedule, *rng;
} ac_py_state;

static inline ac_py_state *
ac_py_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

/* A device by name, for the caller to unref; NULL with an exception set. */
ac_device *ac_py_device_open(ac_py_state *state, const char *name);

int ac_py_shape_from(ac_py_state *state, PyObject *object, const char *what, ac_shape *out);

/* ---- errors.c -------------------------------------------------------------------------------- */

int ac_py_add_errors(PyObject *module);
/* Raises the class of `status` with the thread's engine message; returns NULL.  An exception that
 * is already set (a callback's) stays. */
PyObject *ac_py_raise(ac_py_state *state, ac_status status);
/* Raises with an own message: ac_py_error(state, AC_E_INVALID, "n: found %d, expected ..."). */
PyObject *ac_py_error(ac_py_state *state, ac_status status, const char *format, ...)
    AC_PRINTF(3, 4);

/* ---- tensor.c, dlpack.c ---------------------------------------------------------------------- */

/* Somebody's tensor, borrowed until ac_py_view_release. */
typedef struct ac_py_view {
    ac_tensor tensor;
    bool device;          /* in the memory of a GPU, not the host's */
    int32_t device_index; /* of that GPU */
    bool readonly;
    void *owner;   /* DLManagedTensor, DLManagedTensorVersioned or Py_buffer; see tensor.c */
    void (*release)(void *owner);
} ac_py_view;

/* Reads an object with __dlpack__ or the buffer protocol; `what` names it in errors.  0 or -1.
 * The first refuses tensors that are not in host memory; with the second the caller looks. */
int ac_py_view_import(ac_py_state *state, PyObject *object, const char *what, ac_py_view *out);
int ac_py_view_import_any(ac_py_state *state, PyObject *object, const char *what, ac_py_view *out);
void ac_py_view_release(ac_py_view *view); /* with the GIL; twice is fine */

int ac_py_add_tensor(PyObject *module);
/* __dlpack__ of a Tensor object, and what its deleter needs; gpu: of that number, -1: the host. */
PyObject *ac_py_export_dlpack(PyObject *owner, const ac_tensor *tensor, int32_t gpu,
                              bool versioned);

/* ---- weights.c ------------------------------------------------------------------------------- */

int ac_py_add_weights(PyObject *module);
/* Borrowed; -1 with TypeError for another type. */
int ac_py_weights_of(ac_py_state *state, PyObject *object, ac_weights **out);
/* Runs and checks hold this while they are without the GIL: bindings must not move then. */
void ac_py_weights_busy(PyObject *weights, int by);

/* ---- memory.c -------------------------------------------------------------------------------- */

/* The allocator of a DLPack exchange API in a capsule: 1, or 0 for a version that we do not know,
 * or -1. */
int ac_py_memory_of(PyObject *capsule, ac_memory *out);

/* ---- model.c, loop.c ------------------------------------------------------------------------- */

int ac_py_add_model(PyObject *module);
int ac_py_add_loop(PyObject *module);
/* None: the model's own; an int: a cudaStream_t, 0 the legacy default stream.  0 or -1. */
int ac_py_stream_of(ac_py_state *state, PyObject *object, ac_stream *out);
typedef struct ac_py_model {
    PyObject_HEAD
    ac_model *model;
    PyObject *weights; /* Weights or NULL */
} ac_py_model;

/* ---- scheduler.c ----------------------------------------------------------------------------- */

/* Adds the types Schedule and Rng. */
int ac_py_add_scheduler(PyObject *module);
/* What the objects hold, borrowed while `object` lives; NULL with TypeError for another type. */
const ac_schedule *ac_py_schedule_of(PyObject *module, PyObject *object);
ac_rng *ac_py_rng_of(PyObject *module, PyObject *object);

#endif
