/* errors: the engine's statuses as Python exceptions.  Only this file knows the classes.
 *
 * Each class derives from AccelError and from the builtin a caller would catch anyway.
 */
#include "py.h"

#include <stdarg.h>

typedef struct error_class {
    ac_status status;
    const char *name; /* "accel.InvalidArgument" */
    const char *doc;
} error_class;

static const error_class classes[] = {
#define X(name, code, text, exception) {code, "accel." exception, text "."},
    AC_STATUS_MAP(X)
#undef X
};
_Static_assert(AC_ARRAY_LEN(classes) == AC_PY_ERRORS, "ac_py_state.errors has another length");

static PyObject *
builtin_of(ac_status status)
{
    switch (status) {
    case AC_E_INVALID:
    case AC_E_SHAPE:
    case AC_E_FORMAT:
    case AC_E_WEIGHTS:
        return PyExc_ValueError;
    case AC_E_DTYPE:
        return PyExc_TypeError;
    case AC_E_UNSUPPORTED:
        return PyExc_NotImplementedError;
    case AC_E_IO:
        return PyExc_OSError;
    case AC_E_MEMORY:
        return PyExc_MemoryError;
    case AC_E_NUMERIC:
        return PyExc_ArithmeticError;
    default:
        return PyExc_RuntimeError;
    }
}

static int
add_class(PyObject *module, ac_py_state *state, size_t i)
{
    PyObject *bases = PyTuple_Pack(2, state->base_error, builtin_of(classes[i].status));
    if (!bases) {
        return -1;
    }
    state->errors[i] = PyErr_NewExceptionWithDoc(classes[i].name, classes[i].doc, bases, NULL);
    Py_DECREF(bases);
    if (!state->errors[i]) {
        return -1;
    }
    return PyModule_AddObjectRef(module, classes[i].name + strlen("accel."), state->errors[i]);
}

int
ac_py_add_errors(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    state->base_error = PyErr_NewExceptionWithDoc(
        "accel.AccelError", "Base of all errors that accel raises.", PyExc_Exception, NULL);
    if (!state->base_error || PyModule_AddObjectRef(module, "AccelError", state->base_error) < 0) {
        return -1;
    }
    for (size_t i = 0; i < AC_ARRAY_LEN(classes); i++) {
        if (add_class(module, state, i) < 0) {
            return -1;
        }
    }
    return 0;
}

/* The engine's messages quote names from files: whatever is no UTF-8 there is shown as "?". */
static void
set_message(PyObject *type, const char *message)
{
    PyObject *text = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
    if (text) {
        PyErr_SetObject(type, text);
        Py_DECREF(text);
    }
}

static PyObject *
class_of(ac_py_state *state, ac_status status)
{
    for (size_t i = 0; i < AC_ARRAY_LEN(classes); i++) {
        if (classes[i].status == status) {
            return state->errors[i];
        }
    }
    return state->base_error;
}

PyObject *
ac_py_raise(ac_py_state *state, ac_status status)
{
    if (!PyErr_Occurred()) {
        set_message(class_of(state, status), ac_error_message());
    }
    return NULL;
}

PyObject *
ac_py_error(ac_py_state *state, ac_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    ac_verror(status, format, args);
    va_end(args);
    return ac_py_raise(state, status);
}
