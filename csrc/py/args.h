/* args: ac_build_args and tensors by name, out of Python dicts. */
#ifndef AC_PY_ARGS_H
#define AC_PY_ARGS_H

#include "py.h"

/* {"entry": "forward", "batch": 2, ...}, all optional but "entry" where the class has several; a
 * key that is not there or a value out of range raises with its name.  0 or -1. */
int ac_py_build_args(ac_py_state *state, PyObject *dict, ac_build_args *out);

/* The tensors of a dict name -> array, borrowed with their names. */
typedef struct ac_py_named {
    PyObject *name;   /* str, owned */
    const char *text; /* its UTF-8 */
    ac_py_view view;
} ac_py_named;

typedef struct ac_py_dict {
    ac_py_named *item;
    Py_ssize_t count;
} ac_py_dict;

int ac_py_dict_import(ac_py_state *state, PyObject *dict, ac_py_dict *out);
void ac_py_dict_release(ac_py_dict *dict); /* with the GIL */

#endif
