/* args: reads what Python passes for one call, before the engine sees any of it. */
#include "args.h"


/* Far above every real size; keeps products of three of them within int64. */
#define MAX_EXTENT (INT64_C(1) << 20)

typedef struct field {
    const char *name;
    size_t offset;
    int64_t least;
    char kind; /* 'l' int64, 'i' int32, 'b' bool, 'd' dtype, 's' entry */
} field;

static const field fields[] = {
    {"entry", offsetof(ac_build_args, entry), 0, 's'},
    {"batch", offsetof(ac_build_args, batch), 1, 'l'},
    {"height", offsetof(ac_build_args, height), 1, 'l'},
    {"width", offsetof(ac_build_args, width), 1, 'l'},
    {"tokens", offsetof(ac_build_args, tokens), 1, 'l'},
    {"timesteps", offsetof(ac_build_args, timesteps), 1, 'l'},
    {"time_ids", offsetof(ac_build_args, time_ids), 0, 'l'},
    {"loop", offsetof(ac_build_args, loop), 0, 'b'},
    {"masked", offsetof(ac_build_args, masked), 0, 'b'},
    {"hidden_states", offsetof(ac_build_args, hidden_states), 0, 'b'},
    {"clip_skip", offsetof(ac_build_args, clip_skip), 0, 'i'},
    {"io_dtype", offsetof(ac_build_args, io_dtype), 0, 'd'},
    {"compute", offsetof(ac_build_args, compute), 0, 'd'},
    {"tf32", offsetof(ac_build_args, tf32), 0, 'i'},
};

/* The engine compares entries by text before it keeps its own; the strings here live for ever. */
static const char *
static_entry(const char *text)
{
    static const char *const known[] = {"forward", "encode", "decode"};
    for (size_t i = 0; text && i < AC_ARRAY_LEN(known); i++) {
        if (strcmp(known[i], text) == 0) {
            return known[i];
        }
    }
    return NULL;
}

static int
read_integer(ac_py_state *state, const field *f, PyObject *value, void *to)
{
    PyObject *index = PyNumber_Index(value);
    if (!index) {
        PyErr_Clear();
        ac_py_error(state, AC_E_INVALID, "%s: expected an integer", f->name);
        return -1;
    }
    int overflow;
    int64_t number = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow || number < f->least || number > MAX_EXTENT) {
        ac_py_error(state, AC_E_INVALID, "%s: found %lld, expected %lld to %lld", f->name,
                    overflow ? overflow * (long long)INT64_MAX : (long long)number,
                    (long long)f->least, (long long)MAX_EXTENT);
        return -1;
    }
    if (f->kind == 'l') {
        *(int64_t *)to = number;
    } else {
        *(int32_t *)to = (int32_t)number;
    }
    return 0;
}

static int
read_text(ac_py_state *state, const field *f, PyObject *value, void *to)
{
    const char *text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, NULL) : NULL;
    PyErr_Clear();
    if (f->kind == 's') {
        const char *entry = static_entry(text);
        if (!entry) {
            ac_py_error(state, AC_E_INVALID, "%s: found \"%.64s\", expected \"forward\", "
                                             "\"encode\" or \"decode\"", f->name, text ? text : "");
            return -1;
        }
        *(const char **)to = entry;
        return 0;
    }
    ac_dtype dtype;
    if (!text || !ac_dtype_from_name(text, &dtype) || !ac_dtype_is_float(dtype) ||
        dtype == AC_F64) {
        ac_py_error(state, AC_E_DTYPE, "%s: found \"%.64s\", expected \"float32\", \"float16\" or "
                                       "\"bfloat16\"", f->name, text ? text : "");
        return -1;
    }
    *(ac_dtype *)to = dtype;
    return 0;
}

static int
read_field(ac_py_state *state, const field *f, PyObject *value, ac_build_args *out)
{
    void *to = (char *)out + f->offset;
    if (f->kind == 's' || f->kind == 'd') {
        return read_text(state, f, value, to);
    }
    if (f->kind == 'b') {
        int truth = PyObject_IsTrue(value);
        *(bool *)to = truth > 0;
        return truth < 0 ? -1 : 0;
    }
    return read_integer(state, f, value, to);
}

static const field *
find_field(const char *name)
{
    for (size_t i = 0; name && i < AC_ARRAY_LEN(fields); i++) {
        if (strcmp(fields[i].name, name) == 0) {
            return &fields[i];
        }
    }
    return NULL;
}

int
ac_py_build_args(ac_py_state *state, PyObject *dict, ac_build_args *out)
{
    *out = (ac_build_args){.entry = "forward", .batch = 1, .io_dtype = AC_F32, .compute = AC_F32};
    if (!PyDict_Check(dict)) {
        ac_py_error(state, AC_E_INVALID, "args: expected a dict");
        return -1;
    }
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(dict, &at, &key, &value)) {
        const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
        PyErr_Clear();
        const field *f = find_field(name);
        if (!f) {
            ac_py_error(state, AC_E_INVALID, "args: found the key \"%.64s\", which is not known",
                        name ? name : "");
            return -1;
        }
        if (read_field(state, f, value, out) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- tensors by name ------------------------------------------------------------------------- */

void
ac_py_dict_release(ac_py_dict *dict)
{
    for (Py_ssize_t i = 0; i < dict->count; i++) {
        ac_py_view_release(&dict->item[i].view);
        Py_XDECREF(dict->item[i].name);
    }
    PyMem_Free(dict->item);
    *dict = (ac_py_dict){0};
}

static int
import_item(ac_py_state *state, PyObject *pair, ac_py_dict *out)
{
    ac_py_named *item = &out->item[out->count];
    PyObject *name = PyTuple_GetItem(pair, 0);
    if (!PyUnicode_Check(name)) {
        ac_py_error(state, AC_E_INVALID, "tensors: expected a dict with names as keys");
        return -1;
    }
    item->name = Py_NewRef(name);
    out->count++; /* from here on it is released with the others */
    item->text = PyUnicode_AsUTF8AndSize(item->name, NULL);
    if (!item->text) {
        return -1;
    }
    return ac_py_view_import_any(state, PyTuple_GetItem(pair, 1), item->text, &item->view);
}

int
ac_py_dict_import(ac_py_state *state, PyObject *dict, ac_py_dict *out)
{
    *out = (ac_py_dict){0};
    if (!PyDict_Check(dict)) {
        ac_py_error(state, AC_E_INVALID, "tensors: expected a dict of names and tensors");
        return -1;
    }
    PyObject *items = PyDict_Items(dict); /* a snapshot: importing runs Python code */
    if (!items) {
        return -1;
    }
    Py_ssize_t count = PyList_Size(items);
    out->item = PyMem_Calloc((size_t)AC_MAX(count, 1), sizeof *out->item);
    int status = out->item ? 0 : -1;
    if (!out->item) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; status == 0 && i < count; i++) {
        status = import_item(state, PyList_GetItem(items, i), out);
    }
    Py_DECREF(items);
    if (status < 0) {
        ac_py_dict_release(out);
    }
    return status;
}
