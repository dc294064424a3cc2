/* module: accel._core, its state and the functions that belong to no type.
 *
 * Multi-phase init; all state is in ac_py_state.  The engine below has process-wide devices, so one
 * interpreter only: a second one is refused by CPython itself (no Py_mod_multiple_interpreters).
 */
#include "py.h"

#include "../../kernels/cpu/pool.h"
#include "../backend_cuda.h"
#include "../models/models.h"

#ifndef ACCEL_VERSION
#define ACCEL_VERSION "0"
#endif

static PyObject *
py_set_num_threads(PyObject *module, PyObject *arg)
{
    ac_py_state *state = PyModule_GetState(module);
    PyObject *index = PyNumber_Index(arg);
    if (!index) {
        PyErr_Clear();
        return ac_py_error(state, AC_E_INVALID, "threads: expected an integer");
    }
    int overflow;
    long long threads = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow || threads < 0 || threads > 4096) {
        return ac_py_error(state, AC_E_INVALID, "threads: found %lld, expected 1 to 4096, or 0 for "
                                                "the default",
                           overflow ? overflow * (long long)INT64_MAX : threads);
    }
    ac_status status = ac_pool_set_threads((int32_t)threads);
    if (status < 0) {
        return ac_py_raise(state, status);
    }
    Py_RETURN_NONE;
}

static PyObject *
py_get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromLong(ac_pool_threads());
}

static PyObject *
kernel_names(const ac_device *device)
{
    PyObject *list = PyList_New(0);
    const ac_kernel *const *k = device->backend->kernels;
    for (; list && k && *k; k++) {
        PyObject *name = PyUnicode_FromString((*k)->name);
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

/* What the backend says of itself: all lines, or only those that say what is missed. */
static PyObject *
description(const ac_device *device, bool warnings)
{
    PyObject *list = PyList_New(0);
    char text[256];
    bool warning, more = device->backend->describe != NULL;
    for (int32_t i = 0; list && more; i++) {
        warning = false;
        Py_BEGIN_ALLOW_THREADS
        more = device->backend->describe(device->self, i, &warning, text, sizeof text);
        Py_END_ALLOW_THREADS
        if (more && (warning || !warnings)) {
            PyObject *line = PyUnicode_FromString(text);
            if (!line || PyList_Append(list, line) < 0) {
                Py_CLEAR(list);
            }
            Py_XDECREF(line);
        }
    }
    return list;
}

static PyObject *
device_entry(const ac_device *device)
{
    PyObject *kernels = kernel_names(device);
    PyObject *lines = kernels ? description(device, false) : NULL;
    PyObject *missed = lines ? description(device, true) : NULL;
    if (!missed) {
        Py_XDECREF(kernels);
        Py_XDECREF(lines);
        return NULL;
    }
    return Py_BuildValue("{sssisisisNsNsN}", "backend", device->backend->name, "index",
                         (int)device->index, "isa", (int)device->caps.isa, "workers",
                         (int)device->caps.workers, "kernels", kernels, "description", lines,
                         "missed", missed);
}

ac_device *
ac_py_device_open(ac_py_state *state, const char *name)
{
    ac_device *device;
    ac_status status;
    Py_BEGIN_ALLOW_THREADS
    status = ac_device_open(name, &device);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        ac_py_raise(state, status);
        return NULL;
    }
    return device;
}

/* The one that a function's arguments name. */
static ac_device *
open_device(PyObject *module, PyObject *args, const char *format)
{
    const char *name;
    return PyArg_ParseTuple(args, format, &name)
               ? ac_py_device_open(PyModule_GetState(module), name)
               : NULL;
}

static PyObject *
py_device(PyObject *module, PyObject *args)
{
    ac_device *device = open_device(module, args, "s:device");
    if (!device) {
        return NULL;
    }
    PyObject *result = device_entry(device);
    ac_device_unref(device);
    return result;
}

static PyObject *
py_trim(PyObject *module, PyObject *args)
{
    ac_device *device = open_device(module, args, "s:trim");
    if (!device) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    ac_device_trim(device);
    ac_device_unref(device);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
list_of(const char *const *names)
{
    PyObject *list = PyList_New(0);
    for (; list && *names; names++) {
        PyObject *name = PyUnicode_FromString(*names);
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *
py_model_classes(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (const ac_model_class *const *c = ac_model_classes; list && *c; c++) {
        PyObject *name = PyUnicode_FromString((*c)->name);
        if (!name || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *
py_scheduler_classes(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return list_of(ac_scheduler_names());
}

/* The class table is keyed by config; a config with the name alone is enough to find the row. */
static ac_status
find_class(const char *name, const ac_model_class **out)
{
    for (const ac_model_class *const *c = ac_model_classes; *c; c++) {
        if (strcmp((*c)->name, name) == 0) {
            *out = *c;
            return AC_OK;
        }
    }
    return ac_error(AC_E_UNSUPPORTED, "class: found \"%.64s\", which is no model of accel", name);
}

static PyObject *
py_weight_name(PyObject *module, PyObject *args)
{
    const char *class_name, *found;
    if (!PyArg_ParseTuple(args, "ss:weight_name", &class_name, &found)) {
        return NULL;
    }
    const ac_model_class *cls = NULL;
    ac_status status = find_class(class_name, &cls);
    if (status < 0) {
        return ac_py_raise(PyModule_GetState(module), status);
    }
    char name[AC_WEIGHT_NAME];
    ac_model_weight_name(cls, found, name);
    return PyUnicode_DecodeUTF8(name, (Py_ssize_t)strlen(name), "replace");
}

static PyObject *
py_set_library_folder(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *path;
    if (!PyArg_ParseTuple(args, "O&:set_library_folder", PyUnicode_FSConverter, &path)) {
        return NULL;
    }
    ac_backend_cuda_set_folder(PyBytes_AsString(path));
    Py_DECREF(path);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_num_threads", py_set_num_threads, METH_O,
     PyDoc_STR("set_num_threads(n)\n--\n\nThreads of the CPU backend, 0: the default.")},
    {"get_num_threads", py_get_num_threads, METH_NOARGS,
     PyDoc_STR("get_num_threads()\n--\n\nThreads of the CPU backend.")},
    {"device", py_device, METH_VARARGS,
     PyDoc_STR("device(name)\n--\n\nOpens a device: backend, index, isa, workers, kernels; in "
               "words what it is and uses (description), and of that what is missed.")},
    {"trim", py_trim, METH_VARARGS,
     PyDoc_STR("trim(device)\n--\n\nFrees the memory for activations that no run is using.")},
    {"model_classes", py_model_classes, METH_NOARGS,
     PyDoc_STR("model_classes()\n--\n\nClass names of the models there are.")},
    {"scheduler_classes", py_scheduler_classes, METH_NOARGS,
     PyDoc_STR("scheduler_classes()\n--\n\nClass names of the schedulers there are.")},
    {"weight_name", py_weight_name, METH_VARARGS,
     PyDoc_STR("weight_name(class_name, found)\n--\n\nThe name under which the model asks for a "
               "weight found under another one.")},
    {"set_library_folder", py_set_library_folder, METH_VARARGS,
     PyDoc_STR("set_library_folder(path)\n--\n\nWhere libaccel_cuda.so is looked for.")},
    {0},
};

static int
module_exec(PyObject *module)
{
    if (ac_py_add_errors(module) < 0 || ac_py_add_tensor(module) < 0 ||
        ac_py_add_weights(module) < 0 || ac_py_add_model(module) < 0 ||
        ac_py_add_scheduler(module) < 0 || ac_py_add_loop(module) < 0 ||
        PyModule_AddFunctions(module, functions) < 0 ||
        PyModule_AddStringConstant(module, "version", ACCEL_VERSION) < 0) {
        return -1;
    }
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ac_py_state *state = PyModule_GetState(module);
    for (size_t i = 0; i < AC_PY_ERRORS; i++) {
        Py_VISIT(state->errors[i]);
    }
    Py_VISIT(state->base_error);
    Py_VISIT(state->tensor);
    Py_VISIT(state->weights);
    Py_VISIT(state->model);
    Py_VISIT(state->cancel);
    Py_VISIT(state->schedule);
    Py_VISIT(state->rng);
    return 0;
}

static int
module_clear(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    for (size_t i = 0; i < AC_PY_ERRORS; i++) {
        Py_CLEAR(state->errors[i]);
    }
    Py_CLEAR(state->base_error);
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->weights);
    Py_CLEAR(state->model);
    Py_CLEAR(state->cancel);
    Py_CLEAR(state->schedule);
    Py_CLEAR(state->rng);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "accel._core",
    .m_doc = PyDoc_STR("The engine of accel and its CPU kernels."),
    .m_size = sizeof(ac_py_state),
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
