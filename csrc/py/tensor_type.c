/* tensor_type: Tensor, a contiguous array of our own in host memory.
 *
 * NumPy arrays are what accel returns; this is for bfloat16, which NumPy lacks.  It exports itself
 * through DLPack in its own dtype, and through __array__ as float32.
 */
#include "py.h"


typedef struct tensor_object {
    PyObject_HEAD
    ac_tensor tensor; /* contiguous; data from ac_malloc_aligned */
} tensor_object;

/* Sizes come from callers: nobody has more memory than this, and products stay in int64. */
#define MAX_BYTES (INT64_C(1) << 46)

int
ac_py_shape_from(ac_py_state *state, PyObject *object, const char *what, ac_shape *out)
{
    PyObject *items = PySequence_Tuple(object);
    if (!items) {
        return -1;
    }
    Py_ssize_t rank = PyTuple_Size(items);
    *out = (ac_shape){.rank = (int32_t)AC_MIN(rank, AC_MAX_RANK)};
    for (Py_ssize_t i = 0; i < out->rank; i++) {
        out->dim[i] = PyLong_AsLongLong(PyTuple_GetItem(items, i));
        if (out->dim[i] == -1 && PyErr_Occurred()) {
            Py_DECREF(items);
            return -1;
        }
    }
    Py_DECREF(items);
    int64_t count = ac_shape_count(out);
    if (rank > AC_MAX_RANK || count < 0 || count > MAX_BYTES / 8) {
        ac_py_error(state, AC_E_SHAPE, "%s: found a shape of %zd dimensions with a negative or too "
                                       "large size", what, rank);
        return -1;
    }
    return 0;
}

static PyObject *
tensor_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"shape", "dtype", NULL};
    PyObject *shape_object;
    const char *dtype_name = "float32";
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|s:Tensor", names, &shape_object,
                                     &dtype_name)) {
        return NULL;
    }
    ac_py_state *state = PyType_GetModuleState(type);
    ac_dtype dtype;
    ac_shape shape;
    if (!ac_dtype_from_name(dtype_name, &dtype)) {
        return ac_py_error(state, AC_E_DTYPE, "dtype: found \"%.64s\", expected a name as "
                                              "\"bfloat16\"", dtype_name);
    }
    if (ac_py_shape_from(state, shape_object, "shape", &shape) < 0) {
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    tensor_object *self = (tensor_object *)alloc(type, 0);
    if (!self) {
        return NULL;
    }
    size_t bytes = (size_t)ac_shape_count(&shape) * ac_dtype_size(dtype);
    void *data = ac_malloc_aligned(AC_MAX(bytes, 1));
    if (!data) {
        Py_DECREF(self);
        return ac_py_raise(state, ac_no_memory(bytes));
    }
    memset(data, 0, AC_MAX(bytes, 1));
    self->tensor = ac_tensor_of(data, dtype, shape);
    return (PyObject *)self;
}

static void
tensor_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    ac_free_aligned(((tensor_object *)object)->tensor.data);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *
tensor_dlpack(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", names, &stream, &version,
                                     &device, &copy)) {
        return NULL;
    }
    if (stream != Py_None || copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "a Tensor in host memory has no stream and is not "
                                           "copied on export");
        return NULL;
    }
    int major = 0, minor = 0;
    if (version != Py_None && !PyArg_ParseTuple(version, "ii", &major, &minor)) {
        return NULL;
    }
    return ac_py_export_dlpack(self, &((tensor_object *)self)->tensor, major >= 1);
}

static PyObject *
tensor_dlpack_device(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return Py_BuildValue("(ii)", 1, 0);
}

/* float32 bytes of any float Tensor: what __array__ in python/accel makes an array of. */
static PyObject *
tensor_float32(PyObject *self, PyObject *unused)
{
    (void)unused;
    const ac_tensor *t = &((tensor_object *)self)->tensor;
    if (!ac_dtype_is_float(t->dtype)) {
        return ac_py_error(ac_py_state_of(self), AC_E_DTYPE, "float32: found %s, expected a float",
                           ac_dtype_name(t->dtype));
    }
    int64_t count = ac_tensor_count(t);
    PyObject *bytes = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(count * 4));
    if (bytes) {
        ac_convert(PyByteArray_AsString(bytes), AC_F32, t->data, t->dtype, count);
    }
    return bytes;
}

static PyObject *
tensor_shape(PyObject *self, void *unused)
{
    (void)unused;
    const ac_shape *shape = &((tensor_object *)self)->tensor.shape;
    PyObject *tuple = PyTuple_New(shape->rank);
    for (int32_t i = 0; tuple && i < shape->rank; i++) {
        PyObject *dim = PyLong_FromLongLong(shape->dim[i]);
        if (!dim || PyTuple_SetItem(tuple, i, dim) < 0) {
            Py_DECREF(tuple);
            return NULL;
        }
    }
    return tuple;
}

static PyObject *
tensor_dtype(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(ac_dtype_name(((tensor_object *)self)->tensor.dtype));
}

static PyMethodDef methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("DLPack capsule of this tensor; zero copy.")},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, PyDoc_STR("(1, 0): host memory.")},
    {"float32", tensor_float32, METH_NOARGS, PyDoc_STR("The values as float32 bytes.")},
    {0},
};

static PyGetSetDef getters[] = {
    {"shape", tensor_shape, NULL, PyDoc_STR("Tuple of dimensions."), NULL},
    {"dtype", tensor_dtype, NULL, PyDoc_STR("Name of the dtype, \"bfloat16\"."), NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Tensor(shape, dtype=\"float32\")\n--\n\nZeroed contiguous host "
                                  "memory with __dlpack__.")},
    {Py_tp_new, tensor_new},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "accel._core.Tensor",
    .basicsize = sizeof(tensor_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int
ac_py_add_tensor(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    state->tensor = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (!state->tensor) {
        return -1;
    }
    return PyModule_AddObjectRef(module, "Tensor", (PyObject *)state->tensor);
}
