/* tensor_type: Tensor, a contiguous array of our own, in host memory or a GPU's.
 *
 * On the host NumPy arrays are what accel returns; there this is for bfloat16, which NumPy lacks.
 * It exports itself through DLPack in its own dtype, and through __array__ as float32.
 * On a GPU it is a result that nobody has waited for: what writes it is in the legacy default
 * stream, and who asks for it by __dlpack__ names the stream that must come after that.
 */
#include "py.h"

#include "dlpack.h"

typedef struct tensor_object {
    PyObject_HEAD
    ac_tensor tensor;  /* contiguous */
    ac_device *device; /* NULL: data is from ac_malloc_aligned; else from this GPU, a reference */
} tensor_object;

static const ac_stream legacy = {.given = true, .handle = NULL};

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

/* The object with its memory: on the host zeroed, on a GPU whatever was there. */
static PyObject *
make(ac_py_state *state, ac_dtype dtype, const ac_shape *shape, ac_device *device)
{
    PyTypeObject *type = state->tensor;
    tensor_object *self = (tensor_object *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) {
        return NULL;
    }
    size_t bytes = AC_MAX((size_t)ac_shape_count(shape) * ac_dtype_size(dtype), 1);
    void *data = NULL;
    ac_status status = AC_OK;
    if (device) {
        Py_BEGIN_ALLOW_THREADS
        status = device->backend->alloc(device->self, bytes, &data);
        Py_END_ALLOW_THREADS
        self->device = status == AC_OK ? ac_device_ref(device) : NULL;
    } else {
        data = ac_malloc_aligned(bytes);
        status = data ? AC_OK : ac_no_memory(bytes);
        if (data) {
            memset(data, 0, bytes);
        }
    }
    if (status < 0) {
        Py_DECREF(self);
        return ac_py_raise(state, status);
    }
    self->tensor = ac_tensor_of(data, dtype, *shape);
    return (PyObject *)self;
}

/* "cpu": none.  0 or -1. */
static int
open_device(ac_py_state *state, const char *name, ac_device **out)
{
    *out = NULL;
    if (strcmp(name, "cpu") == 0) {
        return 0;
    }
    ac_device *device = ac_py_device_open(state, name);
    if (!device) {
        return -1;
    }
    if (!device->backend->lane_follow) {
        ac_device_unref(device);
        ac_py_error(state, AC_E_INVALID, "device: found \"%.64s\", expected \"cpu\", \"cuda\" or "
                                         "\"cuda:<n>\"", name);
        return -1;
    }
    *out = device;
    return 0;
}

static PyObject *
tensor_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"shape", "dtype", "device", NULL};
    PyObject *shape_object;
    const char *dtype_name = "float32", *device_name = "cpu";
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|ss:Tensor", names, &shape_object,
                                     &dtype_name, &device_name)) {
        return NULL;
    }
    ac_py_state *state = PyType_GetModuleState(type);
    ac_dtype dtype;
    ac_shape shape;
    ac_device *device;
    if (!ac_dtype_from_name(dtype_name, &dtype)) {
        return ac_py_error(state, AC_E_DTYPE, "dtype: found \"%.64s\", expected a name as "
                                              "\"bfloat16\"", dtype_name);
    }
    if (ac_py_shape_from(state, shape_object, "shape", &shape) < 0 ||
        open_device(state, device_name, &device) < 0) {
        return NULL;
    }
    PyObject *self = make(state, dtype, &shape, device);
    ac_device_unref(device);
    return self;
}

/* Whoever reads a GPU's memory elsewhere may have more to do there: freeing waits for the GPU. */
static void
tensor_dealloc(PyObject *object)
{
    tensor_object *self = (tensor_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->device) {
        Py_BEGIN_ALLOW_THREADS
        self->device->backend->free(self->device->self, self->tensor.data);
        ac_device_unref(self->device);
        Py_END_ALLOW_THREADS
    } else {
        ac_free_aligned(self->tensor.data);
    }
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* A Tensor of the same values in host memory; waits for the GPU. */
static PyObject *
host_copy(PyObject *object)
{
    const tensor_object *self = (const tensor_object *)object;
    ac_py_state *state = ac_py_state_of(object);
    PyObject *copy = make(state, self->tensor.dtype, &self->tensor.shape, NULL);
    if (!copy) {
        return NULL;
    }
    ac_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ac_device_read(self->device, legacy, ((tensor_object *)copy)->tensor.data,
                            self->tensor.data, ac_tensor_bytes(&self->tensor));
    Py_END_ALLOW_THREADS
    if (status < 0) {
        Py_DECREF(copy);
        return ac_py_raise(state, status);
    }
    return copy;
}

/* ---- DLPack ---------------------------------------------------------------------------------- */

/* The consumer's stream comes after what writes the tensor.  DLPack's numbers: none and 1 are the
 * legacy default stream, 2 that of the thread, -1 asks for no order, others are handles. */
static int
order_stream(PyObject *self, PyObject *object)
{
    ac_device *device = ((tensor_object *)self)->device;
    ac_py_state *state = ac_py_state_of(self);
    long long number = object == Py_None ? 1 : PyLong_AsLongLong(object);
    if (number == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (number == 0 || number < -1) {
        ac_py_error(state, AC_E_INVALID, "stream: found %lld, expected None, -1, 1, 2 or the "
                                         "handle of a stream", number);
        return -1;
    }
    if (number == -1 || number == 1) {
        return 0;
    }
    ac_stream stream = {.given = true, .handle = (void *)(uintptr_t)number};
    ac_status status = ac_device_order(device, legacy, stream);
    if (status < 0) {
        ac_py_raise(state, status);
        return -1;
    }
    return 0;
}

/* Where the consumer wants it: 1 another place than here, which is then the host; 0 here; -1. */
static int
wants_host(const tensor_object *self, PyObject *place, PyObject *copy)
{
    int type, index;
    if (place == Py_None) {
        return 0;
    }
    if (!PyArg_ParseTuple(place, "ii", &type, &index)) {
        return -1;
    }
    if (self->device ? type == DL_CUDA && index == self->device->index : type == DL_CPU) {
        return 0;
    }
    if (!self->device || type != DL_CPU || copy == Py_False) {
        PyErr_SetString(PyExc_BufferError, "a Tensor is exported where it is, or from a GPU to "
                                           "the host by copying");
        return -1;
    }
    return 1;
}

static PyObject *
tensor_dlpack(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *place = Py_None, *copy = Py_None;
    const tensor_object *self = (const tensor_object *)object;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO:__dlpack__", names, &stream, &version,
                                     &place, &copy)) {
        return NULL;
    }
    int host = wants_host(self, place, copy), major = 0, minor = 0;
    if (host < 0 || (version != Py_None && !PyArg_ParseTuple(version, "ii", &major, &minor))) {
        return NULL;
    }
    if (host) {
        PyObject *there = host_copy(object);
        PyObject *capsule = there ? ac_py_export_dlpack(there, &((tensor_object *)there)->tensor,
                                                        -1, major >= 1) : NULL;
        Py_XDECREF(there);
        return capsule;
    }
    if ((!self->device && stream != Py_None) || copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "a Tensor is not copied on export, and in host memory "
                                           "it has no stream");
        return NULL;
    }
    if (self->device && order_stream(object, stream) < 0) {
        return NULL;
    }
    return ac_py_export_dlpack(object, &self->tensor, self->device ? self->device->index : -1,
                               major >= 1);
}

static PyObject *
tensor_dlpack_device(PyObject *object, PyObject *unused)
{
    (void)unused;
    const ac_device *device = ((tensor_object *)object)->device;
    return Py_BuildValue("(ii)", device ? DL_CUDA : DL_CPU, device ? (int)device->index : 0);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* float32, as NumPy has no bfloat16; other dtypes come the same way. */
static PyObject *
array_of(PyObject *self, PyObject *dtype)
{
    const ac_tensor *t = &((tensor_object *)self)->tensor;
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

static PyObject *
tensor_array(PyObject *object, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    const tensor_object *self = (const tensor_object *)object;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|OO:__array__", names, &dtype, &copy)) {
        return NULL;
    }
    if (copy == Py_False) {
        PyErr_SetString(PyExc_ValueError, "a Tensor becomes an array only by copying");
        return NULL;
    }
    if (!ac_dtype_is_float(self->tensor.dtype)) {
        return ac_py_error(ac_py_state_of(object), AC_E_DTYPE,
                           "__array__: found %s, expected a float",
                           ac_dtype_name(self->tensor.dtype));
    }
    PyObject *host = self->device ? host_copy(object) : Py_NewRef(object);
    PyObject *array = host ? array_of(host, dtype) : NULL;
    Py_XDECREF(host);
    return array;
}

/* What is on a GPU into memory that the caller frees. */
static void *
download(ac_py_state *state, const ac_py_view *view)
{
    size_t bytes = ac_tensor_bytes(&view->tensor);
    char name[32];
    ac_device *device;
    if (!ac_tensor_is_contiguous(&view->tensor)) {
        ac_py_error(state, AC_E_INVALID, "source: found a strided tensor on a GPU, expected a "
                                         "contiguous one");
        return NULL;
    }
    PyOS_snprintf(name, sizeof name, "cuda:%d", (int)view->device_index);
    if (open_device(state, name, &device) < 0) {
        return NULL;
    }
    void *data = ac_malloc_aligned(AC_MAX(bytes, 1));
    ac_status status = data ? AC_OK : ac_no_memory(bytes);
    if (data) {
        Py_BEGIN_ALLOW_THREADS
        status = ac_device_read(device, legacy, data, view->tensor.data, bytes);
        Py_END_ALLOW_THREADS
    }
    ac_device_unref(device);
    if (status < 0) {
        ac_free_aligned(data);
        ac_py_raise(state, status);
        return NULL;
    }
    return data;
}

static void
convert(const ac_tensor *to, const ac_tensor *from)
{
    int64_t count = ac_tensor_count(to);
    if (ac_tensor_is_contiguous(from) && ac_dtype_is_float(from->dtype) &&
        ac_dtype_is_float(to->dtype)) {
        ac_convert(to->data, to->dtype, from->data, from->dtype, count);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t at = 0, rest = i;
        for (int32_t d = from->shape.rank - 1; d >= 0; d--) {
            at += rest % from->shape.dim[d] * from->stride[d];
            rest /= from->shape.dim[d];
        }
        ac_element_set(to->data, to->dtype, i, ac_element_get(from->data, from->dtype, at));
    }
}

/* Values of any numeric array, strided too, into this tensor: how bfloat16 is made of float32. */
static PyObject *
tensor_fill(PyObject *object, PyObject *source)
{
    ac_py_state *state = ac_py_state_of(object);
    const tensor_object *self = (const tensor_object *)object;
    ac_py_view view;
    void *downloaded = NULL;
    if (self->device) {
        return ac_py_error(state, AC_E_DEVICE, "fill: found a Tensor on cuda:%d, expected one in "
                                               "host memory", (int)self->device->index);
    }
    if (ac_py_view_import_any(state, source, "source", &view) < 0) {
        return NULL;
    }
    ac_tensor from = view.tensor;
    if (!ac_shape_equal(&from.shape, &self->tensor.shape)) {
        char found[AC_SHAPE_TEXT], expected[AC_SHAPE_TEXT];
        ac_py_error(state, AC_E_SHAPE, "source: found %s, expected %s",
                    ac_shape_text(&from.shape, found),
                    ac_shape_text(&self->tensor.shape, expected));
    } else if (!view.device || (downloaded = download(state, &view))) {
        from.data = downloaded ? downloaded : from.data;
        convert(&self->tensor, &from);
    }
    ac_free_aligned(downloaded);
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

static PyObject *
tensor_device(PyObject *self, void *unused)
{
    (void)unused;
    const ac_device *device = ((tensor_object *)self)->device;
    return device ? PyUnicode_FromFormat("%s:%d", device->backend->name, (int)device->index)
                  : PyUnicode_FromString("cpu");
}

static PyMethodDef methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("DLPack capsule of this tensor; zero copy.  On a GPU `stream` comes after what "
               "writes it; dl_device=(1, 0) copies to the host.")},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS,
     PyDoc_STR("(1, 0): host memory; (2, n): GPU n.")},
    {"__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("A NumPy array of the values, float32 unless told; from a GPU by waiting for it.")},
    {"fill", tensor_fill, METH_O,
     PyDoc_STR("fill(source)\n--\n\nTakes the values of a tensor of this shape and any dtype, "
               "from a GPU too, into host memory.")},
    {0},
};

static PyGetSetDef getters[] = {
    {"shape", tensor_shape, NULL, PyDoc_STR("Tuple of dimensions."), NULL},
    {"dtype", tensor_dtype, NULL, PyDoc_STR("Name of the dtype, \"bfloat16\"."), NULL},
    {"device", tensor_device, NULL, PyDoc_STR("\"cpu\" or \"cuda:0\"."), NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Tensor(shape, dtype=\"float32\", device=\"cpu\")\n--\n\n"
                                  "Contiguous memory with __dlpack__: zeroed in host memory; on a "
                                  "GPU a result of accel, freed with this object.")},
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
