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

/* float32, as NumPy has no bfloat16; other dtypes come the same way. */
static PyObject *
tensor_array(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|OO:__array__", names, &dtype, &copy)) {
        return NULL;
    }
    if (copy == Py_False) {
        PyErr_SetString(PyExc_ValueError, "a Tensor becomes an array only by copying");
        return NULL;
    }
    const ac_tensor *t = &((tensor_object *)self)->tensor;
    if (!ac_dtype_is_float(t->dtype)) {
        return ac_py_error(ac_py_state_of(self), AC_E_DTYPE,
                           "__array__: found %s, expected a float", ac_dtype_name(t->dtype));
    }
    int64_t count = ac_tensor_count(t);
    PyObject *bytes = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(count * 4));
    PyObject *numpy = bytes ? PyImport_ImportModule("numpy") : NULL;
    PyObject *shape = numpy ? PyObject_GetAttrString(self, "shape") : NULL;
    PyObject *array = NULL;
    if (shape) {
        ac_convert(PyByteArray_AsString(bytes), AC_F32, t->data, t->dtype, count);
        PyObject *flat = PyObject_CallMethod(numpy, "frombuffer", "Os", bytes, "float32");
        array = flat ? PyObject_CallMethod(flat, "reshape", "O", shape) : NULL;
        Py_XDECREF(flat);
    }
    if (array && dtype != Py_None) {
        PyObject *cast = PyObject_CallMethod(array, "astype", "O", dtype);
        Py_DECREF(array);
        array = cast;
    }
    Py_XDECREF(shape);
    Py_XDECREF(numpy);
    Py_XDECREF(bytes);
    return array;
}

/* Values of any numeric array, strided too, into this tensor: how bfloat16 is made of float32. */
static PyObject *
tensor_fill(PyObject *self, PyObject *source)
{
    ac_py_state *state = ac_py_state_of(self);
    const ac_tensor *to = &((tensor_object *)self)->tensor;
    ac_py_view view;
    if (ac_py_view_import(state, source, "source", &view) < 0) {
        return NULL;
    }
    const ac_tensor *from = &view.tensor;
    if (!ac_shape_equal(&from->shape, &to->shape)) {
        char found[AC_SHAPE_TEXT], expected[AC_SHAPE_TEXT];
        ac_py_error(state, AC_E_SHAPE, "source: found %s, expected %s",
                    ac_shape_text(&from->shape, found), ac_shape_text(&to->shape, expected));
    } else if (ac_tensor_is_contiguous(from) && ac_dtype_is_float(from->dtype) &&
               ac_dtype_is_float(to->dtype)) {
        ac_convert(to->data, to->dtype, from->data, from->dtype, ac_tensor_count(to));
    } else {
        int64_t count = ac_tensor_count(to);
        for (int64_t i = 0; i < count; i++) {
            int64_t at = 0, rest = i;
            for (int32_t d = from->shape.rank - 1; d >= 0; d--) {
                at += rest % from->shape.dim[d] * from->stride[d];
                rest /= from->shape.dim[d];
            }
            ac_element_set(to->data, to->dtype, i, ac_element_get(from->data, from->dtype, at));
        }
    }
    ac_py_view_release(&view);
    if (PyErr_Occurred()) {
        return NULL;
    }
    Py_RETURN_NONE;
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
    {"__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("A NumPy array of the values, float32 unless told.")},
    {"fill", tensor_fill, METH_O,
     PyDoc_STR("fill(source)\n--\n\nTakes the values of a tensor of this shape and any dtype.")},
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
