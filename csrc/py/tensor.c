/* tensor: views of tensors that Python objects own, and DLPack capsules of our own.
 *
 * A view comes through __dlpack__ (PyTorch, NumPy, JAX, CuPy) or, where that refuses (read-only
 * arrays of old NumPy, memoryviews), through the buffer protocol.  Whoever passes the object keeps
 * ownership; we owe one release.  A tensor in a GPU's memory is never read here.
 */
#include "py.h"

#include "dlpack.h"


/* ---- DLPack in ------------------------------------------------------------------------------- */

static void
release_legacy(void *owner)
{
    DLManagedTensor *managed = owner;
    if (managed->deleter) {
        managed->deleter(managed);
    }
}

static void
release_versioned(void *owner)
{
    DLManagedTensorVersioned *managed = owner;
    if (managed->deleter) {
        managed->deleter(managed);
    }
}

static bool
dtype_from_dl(DLDataType t, ac_dtype *out)
{
    static const struct {
        uint8_t code, bits;
        ac_dtype dtype;
    } known[] = {
        {DL_FLOAT, 32, AC_F32}, {DL_FLOAT, 16, AC_F16}, {DL_BFLOAT, 16, AC_BF16},
        {DL_FLOAT, 64, AC_F64}, {DL_INT, 64, AC_I64},   {DL_INT, 32, AC_I32},
        {DL_INT, 16, AC_I16},   {DL_INT, 8, AC_I8},     {DL_UINT, 8, AC_U8},
        {DL_BOOL, 8, AC_BOOL},
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(known); i++) {
        if (known[i].code == t.code && known[i].bits == t.bits && t.lanes == 1) {
            *out = known[i].dtype;
            return true;
        }
    }
    return false;
}

/* Elements must lie where their type may be read, also after a byte offset of a sliced buffer. */
static int
check_data(ac_py_state *state, const ac_tensor *t, const char *what)
{
    int64_t count = ac_shape_count(&t->shape);
    if (count < 0) {
        ac_py_error(state, AC_E_SHAPE, "%s: its dimensions are negative or too large", what);
        return -1;
    }
    if (count > 0 && !t->data) {
        ac_py_error(state, AC_E_INVALID, "%s: found no data", what);
        return -1;
    }
    if ((uintptr_t)t->data % ac_dtype_size(t->dtype) != 0) {
        ac_py_error(state, AC_E_INVALID, "%s: found data at a misaligned address, expected a "
                                         "multiple of %zu", what, ac_dtype_size(t->dtype));
        return -1;
    }
    return 0;
}

static int
view_of_dl(ac_py_state *state, const DLTensor *dl, const char *what, ac_py_view *view)
{
    ac_tensor *out = &view->tensor;
    view->device = dl->device.device_type == DL_CUDA;
    view->device_index = view->device ? dl->device.device_id : 0;
    if (dl->ndim < 0 || dl->ndim > AC_MAX_RANK) {
        ac_py_error(state, AC_E_SHAPE, "%s: found %d dimensions, expected at most %d", what,
                    (int)dl->ndim, AC_MAX_RANK);
        return -1;
    }
    *out = (ac_tensor){.shape.rank = dl->ndim};
    if (!dtype_from_dl(dl->dtype, &out->dtype)) {
        ac_py_error(state, AC_E_DTYPE, "%s: found a dtype of kind %d with %d bits, expected a "
                                       "float, an integer of at most 64 bits or bool", what,
                    (int)dl->dtype.code, (int)dl->dtype.bits);
        return -1;
    }
    for (int32_t i = 0; i < dl->ndim; i++) {
        out->shape.dim[i] = dl->shape[i];
    }
    ac_shape_strides(&out->shape, out->stride);
    for (int32_t i = 0; dl->strides && i < dl->ndim; i++) {
        out->stride[i] = dl->strides[i];
    }
    out->data = dl->data ? (char *)dl->data + dl->byte_offset : NULL;
    return check_data(state, out, what);
}

static int
take(ac_py_state *state, DLManagedTensorVersioned *m, const char *what, ac_py_view *out)
{
    *out = (ac_py_view){.owner = m, .release = release_versioned};
    if (m->version.major != DL_MAJOR) {
        ac_py_error(state, AC_E_UNSUPPORTED, "%s: found DLPack version %u, expected %d", what,
                    (unsigned)m->version.major, DL_MAJOR);
        return -1;
    }
    out->readonly = (m->flags & DL_FLAG_READ_ONLY) != 0;
    return view_of_dl(state, &m->dl_tensor, what, out);
}

/* Takes the capsule's tensor over: from here on its deleter is ours to call. */
static int
consume(ac_py_state *state, PyObject *capsule, const char *what, ac_py_view *out)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        return PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0
                   ? -1
                   : take(state, m, what, out);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *m = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0) {
            return -1;
        }
        *out = (ac_py_view){.owner = m, .release = release_legacy};
        return view_of_dl(state, &m->dl_tensor, what, out);
    }
    ac_py_error(state, AC_E_INVALID, "%s: its __dlpack__ returned no DLPack capsule", what);
    return -1;
}

/* Asks for the device before the data, so that a tensor that lies elsewhere is refused untouched.
 * 1: on a GPU, and `any` memory will do; 0: in host memory. */
static int
check_device(ac_py_state *state, PyObject *object, const char *what, bool any)
{
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (!device) {
        return -1;
    }
    int type, index;
    int ok = PyArg_ParseTuple(device, "ii", &type, &index);
    Py_DECREF(device);
    if (!ok) {
        return -1;
    }
    if (type == DL_CPU || type == DL_CUDA_HOST) {
        return 0;
    }
    if (type == DL_CUDA && any) {
        return 1;
    }
    ac_py_error(state, AC_E_DEVICE, "%s: found a tensor on %s%d, expected one in host memory; move "
                                    "it there first", what,
                type == DL_CUDA ? "cuda:" : "DLPack's device type ", type == DL_CUDA ? index
                                                                                     : type);
    return -1;
}

const DLPackExchangeAPI *
ac_py_exchange_api(PyObject *capsule)
{
    DLPackExchangeAPIHeader *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    while (header && header->version.major != DL_MAJOR) {
        header = header->prev_api;
    }
    return (const DLPackExchangeAPI *)header;
}

/* The producer's own C function, where it publishes one.  PyTorch's __dlpack__ refuses tensors of
 * a GPU that is not the current one; this does not.  NULL, no exception: ask __dlpack__. */
static DLManagedTensorVersioned *
exchange(PyObject *object)
{
    DLManagedTensorVersioned *made = NULL;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)Py_TYPE(object),
                                               "__dlpack_c_exchange_api__");
    const DLPackExchangeAPI *api = capsule ? ac_py_exchange_api(capsule) : NULL;
    if (api && api->managed_tensor_from_py_object_no_sync &&
        api->managed_tensor_from_py_object_no_sync(object, &made) != 0) {
        made = NULL;
    }
    PyErr_Clear();
    Py_XDECREF(capsule);
    return made;
}

/* Stream -1: the producer shall not wait for anything; whoever runs knows the order. */
static PyObject *
call_dlpack(PyObject *object, bool gpu)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        return NULL;
    }
    PyObject *empty = PyTuple_New(0);
    PyObject *keywords = Py_BuildValue("{s(ii)}", "max_version", DL_MAJOR, 0);
    PyObject *old = PyDict_New();
    PyObject *capsule = NULL;
    PyObject *none = gpu ? PyLong_FromLong(-1) : NULL;
    if (none && (!old || !keywords || PyDict_SetItemString(keywords, "stream", none) < 0 ||
                 PyDict_SetItemString(old, "stream", none) < 0)) {
        Py_CLEAR(empty);
    }
    Py_XDECREF(none);
    if (empty && keywords && old) {
        capsule = PyObject_Call(method, empty, keywords);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear(); /* a producer from before DLPack 1.0 knows no max_version */
            capsule = PyObject_Call(method, empty, old);
        }
    }
    Py_XDECREF(empty);
    Py_XDECREF(old);
    Py_XDECREF(keywords);
    Py_DECREF(method);
    return capsule;
}

/* ---- buffers in ------------------------------------------------------------------------------ */

static void
release_buffer(void *owner)
{
    PyBuffer_Release(owner);
    PyMem_Free(owner);
}

static bool
dtype_from_format(const char *format, Py_ssize_t size, ac_dtype *out)
{
    if (!format) {
        format = "B";
    }
    if (*format == '@' || *format == '=' || *format == '<') {
        format++;
    }
    if (!format[0] || format[1]) {
        return false;
    }
    static const struct {
        const char *letters;
        Py_ssize_t size;
        ac_dtype dtype;
    } known[] = {
        {"f", 4, AC_F32}, {"e", 2, AC_F16},   {"d", 8, AC_F64}, {"qln", 8, AC_I64},
        {"il", 4, AC_I32}, {"h", 2, AC_I16},  {"b", 1, AC_I8},  {"Bc", 1, AC_U8},
        {"?", 1, AC_BOOL},
    };
    for (size_t i = 0; i < AC_ARRAY_LEN(known); i++) {
        if (known[i].size == size && strchr(known[i].letters, *format)) {
            *out = known[i].dtype;
            return true;
        }
    }
    return false;
}

static int
view_of_buffer(ac_py_state *state, const Py_buffer *b, const char *what, ac_tensor *out)
{
    *out = (ac_tensor){.data = b->buf, .shape.rank = b->ndim};
    if (b->ndim > AC_MAX_RANK) {
        ac_py_error(state, AC_E_SHAPE, "%s: found %d dimensions, expected at most %d", what,
                    b->ndim, AC_MAX_RANK);
        return -1;
    }
    if (!dtype_from_format(b->format, b->itemsize, &out->dtype)) {
        ac_py_error(state, AC_E_DTYPE, "%s: found the buffer format \"%.16s\", expected a native "
                                       "float, integer or bool", what, b->format ? b->format : "");
        return -1;
    }
    for (int32_t i = 0; i < b->ndim; i++) {
        out->shape.dim[i] = b->shape[i];
        if (b->strides[i] % b->itemsize != 0) {
            ac_py_error(state, AC_E_INVALID, "%s: its strides are no multiples of its elements",
                        what);
            return -1;
        }
        out->stride[i] = b->strides[i] / b->itemsize;
    }
    return check_data(state, out, what);
}

static int
import_buffer(ac_py_state *state, PyObject *object, const char *what, ac_py_view *out)
{
    Py_buffer *b = PyMem_Calloc(1, sizeof *b);
    if (!b) {
        PyErr_NoMemory();
        return -1;
    }
    if (PyObject_GetBuffer(object, b, PyBUF_RECORDS_RO) < 0) {
        PyMem_Free(b);
        return -1;
    }
    *out = (ac_py_view){.owner = b, .release = release_buffer, .readonly = b->readonly};
    return view_of_buffer(state, b, what, &out->tensor);
}

static int
import_object(ac_py_state *state, PyObject *object, const char *what, bool any, ac_py_view *out)
{
    int buffer = PyObject_CheckBuffer(object);
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        PyErr_Clear();
        if (buffer) {
            return import_buffer(state, object, what, out);
        }
        PyObject *type = PyType_GetName(Py_TYPE(object));
        const char *name = type ? PyUnicode_AsUTF8AndSize(type, NULL) : NULL;
        ac_py_error(state, AC_E_DTYPE, "%s: found %s, expected a tensor: an object with __dlpack__ "
                                       "or a NumPy array", what, name ? name : "an object");
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(method);
    int gpu = check_device(state, object, what, any);
    if (gpu < 0) {
        return -1;
    }
    DLManagedTensorVersioned *made = exchange(object);
    if (made) {
        return take(state, made, what, out);
    }
    PyObject *capsule = call_dlpack(object, gpu);
    if (!capsule) {
        if (!buffer) {
            return -1;
        }
        PyErr_Clear(); /* NumPy before 2.1 exports no read-only array through DLPack */
        return import_buffer(state, object, what, out);
    }
    int status = consume(state, capsule, what, out);
    Py_DECREF(capsule);
    return status;
}

static int
import(ac_py_state *state, PyObject *object, const char *what, bool any, ac_py_view *out)
{
    *out = (ac_py_view){0};
    if (import_object(state, object, what, any, out) < 0) {
        ac_py_view_release(out);
        return -1;
    }
    return 0;
}

int
ac_py_view_import(ac_py_state *state, PyObject *object, const char *what, ac_py_view *out)
{
    return import(state, object, what, false, out);
}

int
ac_py_view_import_any(ac_py_state *state, PyObject *object, const char *what, ac_py_view *out)
{
    return import(state, object, what, true, out);
}

/* A producer's deleter may run Python code; an exception on its way must survive that. */
void
ac_py_view_release(ac_py_view *view)
{
    if (view->release) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        view->release(view->owner);
        PyErr_Restore(type, value, traceback);
    }
    view->release = NULL;
}

/* ---- DLPack out ------------------------------------------------------------------------------ */

typedef struct exported {
    DLManagedTensor legacy; /* one of the two is used */
    DLManagedTensorVersioned versioned;
    int64_t shape[AC_MAX_RANK], stride[AC_MAX_RANK];
    PyObject *owner;
} exported;

/* Consumers may delete from any thread, also after the interpreter is gone: then the object leaks
 * with everything else. */
static void
drop(exported *e)
{
    if (!Py_IsInitialized()) {
        return;
    }
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(e->owner);
    PyMem_Free(e);
    PyGILState_Release(gil);
}

static void
delete_legacy(DLManagedTensor *self)
{
    drop(self->manager_ctx);
}

static void
delete_versioned(DLManagedTensorVersioned *self)
{
    drop(self->manager_ctx);
}

/* A capsule that nobody consumed still owns its tensor. */
static void
capsule_destructor(PyObject *capsule)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        release_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        release_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    }
    PyErr_Restore(type, value, traceback);
}

static DLDataType
dtype_to_dl(ac_dtype dtype)
{
    static const uint8_t codes[AC_DTYPE_COUNT] = {
        [AC_F32] = DL_FLOAT, [AC_F16] = DL_FLOAT, [AC_BF16] = DL_BFLOAT, [AC_F64] = DL_FLOAT,
        [AC_I64] = DL_INT,   [AC_I32] = DL_INT,   [AC_I16] = DL_INT,     [AC_I8] = DL_INT,
        [AC_U8] = DL_UINT,   [AC_BOOL] = DL_BOOL,
    };
    return (DLDataType){.code = codes[dtype], .bits = (uint8_t)(8 * ac_dtype_size(dtype)),
                        .lanes = 1};
}

PyObject *
ac_py_export_dlpack(PyObject *owner, const ac_tensor *tensor, int32_t gpu, bool versioned)
{
    exported *e = PyMem_Calloc(1, sizeof *e);
    if (!e) {
        return PyErr_NoMemory();
    }
    memcpy(e->shape, tensor->shape.dim, sizeof e->shape);
    memcpy(e->stride, tensor->stride, sizeof e->stride);
    DLTensor dl = {.data = tensor->data, .ndim = tensor->shape.rank,
                   .device = {gpu < 0 ? DL_CPU : DL_CUDA, gpu < 0 ? 0 : gpu},
                   .dtype = dtype_to_dl(tensor->dtype), .shape = e->shape, .strides = e->stride};
    e->owner = Py_NewRef(owner);
    e->legacy = (DLManagedTensor){.dl_tensor = dl, .manager_ctx = e, .deleter = delete_legacy};
    e->versioned = (DLManagedTensorVersioned){.version = {DL_MAJOR, 0}, .manager_ctx = e,
                                              .deleter = delete_versioned, .dl_tensor = dl};
    PyObject *capsule = versioned
        ? PyCapsule_New(&e->versioned, "dltensor_versioned", capsule_destructor)
        : PyCapsule_New(&e->legacy, "dltensor", capsule_destructor);
    if (!capsule) {
        drop(e);
    }
    return capsule;
}
