/* weights: the Weights object, named tensors that others own.
 *
 * Bindings must not move while a run or a checksum reads them without the GIL: `busy` counts those,
 * and what would move a binding raises meanwhile.  The count changes only with the GIL held, and
 * begins anew in a child of fork, where those runs do not go on.
 */
#include "../lock.h"
#include "py.h"

typedef struct weights_object {
    PyObject_HEAD
    ac_weights *weights;
    int busy;
    uint32_t generation; /* of forks, when `busy` was counted */
} weights_object;

static ac_weights *
of(PyObject *self)
{
    return ((weights_object *)self)->weights;
}

int
ac_py_weights_of(ac_py_state *state, PyObject *object, ac_weights **out)
{
    if (!Py_IS_TYPE(object, state->weights)) {
        PyErr_SetString(PyExc_TypeError, "weights: expected a Weights object");
        return -1;
    }
    *out = of(object);
    return 0;
}

static int *
busy_of(PyObject *self)
{
    weights_object *w = (weights_object *)self;
    if (w->generation != ac_fork_generation()) {
        w->generation = ac_fork_generation();
        w->busy = 0;
    }
    return &w->busy;
}

void
ac_py_weights_busy(PyObject *weights, int by)
{
    if (weights) {
        int *busy = busy_of(weights);
        *busy = AC_MAX(*busy + by, 0); /* a run whose callback forked ends twice */
    }
}

/* 0 when bindings may move now. */
static int
check_idle(PyObject *self)
{
    if (*busy_of(self)) {
        ac_py_error(ac_py_state_of(self), AC_E_INVALID, "weights: a run is using them; change them "
                                                        "when it is over");
        return -1;
    }
    return 0;
}

static PyObject *
weights_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, ":Weights", names)) {
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    weights_object *self = (weights_object *)alloc(type, 0);
    if (!self) {
        return NULL;
    }
    ac_status status = ac_weights_new(&self->weights);
    if (status < 0) {
        self->weights = NULL;
        Py_DECREF(self);
        return ac_py_raise(PyType_GetModuleState(type), status);
    }
    return (PyObject *)self;
}

static void
weights_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (of(self)) {
        Py_BEGIN_ALLOW_THREADS /* derived weights on a device go with it; see model.c */
        ac_weights_unref(of(self));
        Py_END_ALLOW_THREADS
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* ---- adding ---------------------------------------------------------------------------------- */

static PyObject *
weights_add_file(PyObject *self, PyObject *args)
{
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:add_file", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    ac_status status = AC_OK;
    int idle = check_idle(self);
    if (idle == 0) {
        status = ac_weights_add_file(of(self), PyBytes_AsString(path));
    }
    Py_DECREF(path);
    if (idle < 0 || status < 0) {
        return idle < 0 ? NULL : ac_py_raise(ac_py_state_of(self), status);
    }
    Py_RETURN_NONE;
}

static PyObject *
weights_add_folder(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"folder", "stem", "variant", NULL};
    PyObject *folder;
    const char *stem, *variant = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O&s|z:add_folder", names,
                                     PyUnicode_FSConverter, &folder, &stem, &variant)) {
        return NULL;
    }
    ac_status status = AC_OK;
    int idle = check_idle(self);
    if (idle == 0) {
        status = ac_weights_add_folder(of(self), PyBytes_AsString(folder), stem, variant);
    }
    Py_DECREF(folder);
    if (idle < 0 || status < 0) {
        return idle < 0 ? NULL : ac_py_raise(ac_py_state_of(self), status);
    }
    Py_RETURN_NONE;
}

/* The engine calls this once, from whichever thread lets go of the binding. */
static void
release_view(void *cookie)
{
    if (!Py_IsInitialized()) {
        return;
    }
    PyGILState_STATE gil = PyGILState_Ensure();
    ac_py_view_release(cookie);
    PyMem_Free(cookie);
    PyGILState_Release(gil);
}

static PyObject *
weights_set(PyObject *self, PyObject *args)
{
    const char *name;
    PyObject *array;
    if (!PyArg_ParseTuple(args, "sO:set", &name, &array) || check_idle(self) < 0) {
        return NULL;
    }
    ac_py_view *view = PyMem_Calloc(1, sizeof *view);
    if (!view) {
        return PyErr_NoMemory();
    }
    if (ac_py_view_import_any(ac_py_state_of(self), array, name, view) < 0) {
        PyMem_Free(view);
        return NULL;
    }
    ac_status status = (view->device ? ac_weights_set_device : ac_weights_set)(
        of(self), name, &view->tensor, release_view, view);
    if (status < 0) {
        return ac_py_raise(ac_py_state_of(self), status);
    }
    Py_RETURN_NONE;
}

/* ---- looking --------------------------------------------------------------------------------- */

static PyObject *
decode(const char *text)
{
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *
weights_names(PyObject *self, PyObject *unused)
{
    (void)unused;
    int32_t count = ac_weights_count(of(self));
    PyObject *list = PyList_New(count);
    for (int32_t i = 0; list && i < count; i++) {
        PyObject *name = decode(ac_weights_name(of(self), i));
        if (!name || PyList_SetItem(list, i, name) < 0) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

/* {dtype: elements}: what a model of these weights computes in where nobody says. */
static PyObject *
weights_dtypes(PyObject *self, PyObject *unused)
{
    (void)unused;
    int64_t elements[AC_DTYPE_COUNT] = {0};
    for (int32_t i = 0; i < ac_weights_count(of(self)); i++) {
        const ac_tensor *t = ac_weights_find(of(self), ac_weights_name(of(self), i));
        elements[t->dtype] += ac_tensor_count(t);
    }
    PyObject *dict = PyDict_New();
    for (int i = 0; dict && i < AC_DTYPE_COUNT; i++) {
        PyObject *count = elements[i] ? PyLong_FromLongLong(elements[i]) : NULL;
        if (elements[i] &&
            (!count || PyDict_SetItemString(dict, ac_dtype_name((ac_dtype)i), count) < 0)) {
            Py_CLEAR(dict);
        }
        Py_XDECREF(count);
    }
    return dict;
}

static PyObject *
weights_generation(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(ac_weights_generation(of(self)));
}

static PyObject *
describe(const ac_derived *d)
{
    PyObject *sources = PyList_New(d->n_sources);
    for (int32_t i = 0; sources && i < d->n_sources; i++) {
        PyObject *name = decode(d->source[i]);
        if (!name || PyList_SetItem(sources, i, name) < 0) {
            Py_DECREF(sources);
            return NULL;
        }
    }
    if (!sources) {
        return NULL;
    }
    return Py_BuildValue("{sNsnsNsNsN}", "key", decode(d->key), "bytes",
                         d->data && !d->borrowed ? (Py_ssize_t)d->bytes : 0, "sources", sources,
                         "valid", PyBool_FromLong(d->valid), "borrowed",
                         PyBool_FromLong(d->borrowed));
}

static PyObject *
weights_derived(PyObject *self, PyObject *unused)
{
    (void)unused;
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list && i < ac_weights_derived_count(of(self)); i++) {
        PyObject *entry = describe(ac_weights_derived_at(of(self), i));
        if (!entry || PyList_Append(list, entry) < 0) {
            Py_XDECREF(entry);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(entry);
    }
    return list;
}

/* ---- following changes ----------------------------------------------------------------------- */

static PyObject *
weights_check(PyObject *self, PyObject *unused)
{
    (void)unused;
    int32_t changed;
    ac_py_weights_busy(self, 1);
    Py_BEGIN_ALLOW_THREADS
    changed = ac_weights_check(of(self));
    Py_END_ALLOW_THREADS
    ac_py_weights_busy(self, -1);
    return PyLong_FromLong(changed);
}

static PyObject *
weights_checksum(PyObject *self, PyObject *args)
{
    PyObject *names;
    if (!PyArg_ParseTuple(args, "O!:checksum", &PyTuple_Type, &names)) {
        return NULL;
    }
    Py_ssize_t count = PyTuple_Size(names);
    const char **list = PyMem_Malloc((size_t)AC_MAX(count, 1) * sizeof *list);
    if (!list) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        list[i] = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names, i), NULL);
        if (!list[i]) {
            PyMem_Free(list);
            return NULL;
        }
        if (!ac_weights_find(of(self), list[i])) {
            ac_py_error(ac_py_state_of(self), AC_E_INVALID, "%.128s: no such weight", list[i]);
            PyMem_Free(list);
            return NULL;
        }
    }
    uint64_t sum;
    ac_py_weights_busy(self, 1);
    Py_BEGIN_ALLOW_THREADS
    sum = ac_weights_checksum(of(self), list, (int32_t)count);
    Py_END_ALLOW_THREADS
    ac_py_weights_busy(self, -1);
    PyMem_Free(list);
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *
weights_invalidate(PyObject *self, PyObject *args)
{
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|z:invalidate", &name)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* it waits for who makes derived weights */
    ac_weights_invalidate(of(self), name);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
weights_drop_derived(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (check_idle(self) < 0) {
        return NULL;
    }
    ac_py_weights_busy(self, 1);
    Py_BEGIN_ALLOW_THREADS
    ac_weights_drop_derived(of(self));
    Py_END_ALLOW_THREADS
    ac_py_weights_busy(self, -1);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add_file", weights_add_file, METH_VARARGS,
     PyDoc_STR("add_file(path)\n--\n\nMaps one safetensors file and adds its tensors.")},
    {"add_folder", (PyCFunction)(void (*)(void))weights_add_folder, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("add_folder(folder, stem, variant=None)\n--\n\nAdds <stem>.safetensors or its "
               "shards.")},
    {"set", weights_set, METH_VARARGS,
     PyDoc_STR("set(name, array)\n--\n\nBorrows a contiguous tensor, or on a GPU a channels_last "
               "one; binds the name anew if it is there.")},
    {"names", weights_names, METH_NOARGS, PyDoc_STR("names()\n--\n\nNames in order of addition.")},
    {"dtypes", weights_dtypes, METH_NOARGS,
     PyDoc_STR("dtypes()\n--\n\nElements by dtype.")},
    {"derived", weights_derived, METH_NOARGS,
     PyDoc_STR("derived()\n--\n\nWhat accel made of them: key, bytes (0: none of its own), "
               "sources, valid, borrowed (the sources' memory has this form).")},
    {"check", weights_check, METH_NOARGS,
     PyDoc_STR("check()\n--\n\nNotices sources changed in place; how many derived weights that "
               "concerns.")},
    {"checksum", weights_checksum, METH_VARARGS,
     PyDoc_STR("checksum(names)\n--\n\nSum over the bytes of these weights.")},
    {"invalidate", weights_invalidate, METH_VARARGS,
     PyDoc_STR("invalidate(name=None)\n--\n\nWhat was made of it is made again.")},
    {"drop_derived", weights_drop_derived, METH_NOARGS,
     PyDoc_STR("drop_derived()\n--\n\nFrees what was made; made again when needed.")},
    {0},
};

static PyGetSetDef getters[] = {
    {"generation", weights_generation, NULL, PyDoc_STR("Counts bindings."), NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Weights()\n--\n\nNamed tensors, borrowed from files or from "
                                  "DLPack and buffer producers.")},
    {Py_tp_new, weights_new},
    {Py_tp_dealloc, weights_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "accel._core.Weights",
    .basicsize = sizeof(weights_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int
ac_py_add_weights(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    state->weights = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (!state->weights) {
        return -1;
    }
    return PyModule_AddObjectRef(module, "Weights", (PyObject *)state->weights);
}
