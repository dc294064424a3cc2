/* model: the Model object: a config and weights on a device, run one call at a time.
 *
 * Any number of threads may call one Model.  Between taking an exec and giving it back the GIL is
 * released; everything the engine then reads is held by the views of the call.
 */
#include "../profile.h"
#include "args.h"


static ac_model *
of(PyObject *self)
{
    return ((ac_py_model *)self)->model;
}

/* What takes the model's lock or frees what is on a device goes without the GIL: a run holds that
 * lock while it waits for the device, or for an allocator that takes the GIL.  Around what reads
 * bindings, which stay meanwhile: */
static PyThreadState *
leave_python(PyObject *self)
{
    ac_py_weights_busy(((ac_py_model *)self)->weights, 1);
    return PyEval_SaveThread();
}

static void
enter_python(PyObject *self, PyThreadState *thread)
{
    PyEval_RestoreThread(thread);
    ac_py_weights_busy(((ac_py_model *)self)->weights, -1);
}

static ac_status
parse_and_make(const char *config, size_t size, ac_weights *weights, const char *device,
               const char *passes_off, ac_model **out)
{
    ac_arena arena;
    ac_arena_init(&arena);
    const ac_json *json;
    ac_status status = ac_json_parse(&arena, config, size, "config.json", &json);
    if (status == AC_OK) {
        status = ac_model_new(json, weights, device, passes_off, out);
    }
    ac_arena_deinit(&arena);
    return status;
}

static PyObject *
model_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"config", "weights", "device", "passes_off", NULL};
    const char *config, *device = "cpu", *passes_off = "";
    Py_ssize_t size;
    PyObject *weights_object = Py_None;
    ac_weights *weights = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "s#|Oss:Model", names, &config, &size,
                                     &weights_object, &device, &passes_off)) {
        return NULL;
    }
    ac_py_state *state = PyType_GetModuleState(type);
    if (weights_object == Py_None) {
        weights_object = NULL;
    } else if (ac_py_weights_of(state, weights_object, &weights) < 0) {
        return NULL;
    }
    ac_py_model *self = (ac_py_model *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) {
        return NULL;
    }
    /* With the GIL: names of weights are changed here, and nobody may bind meanwhile. */
    ac_status status = parse_and_make(config, (size_t)size, weights, device, passes_off,
                                      &self->model);
    if (status < 0) {
        self->model = NULL;
        Py_DECREF(self);
        return ac_py_raise(state, status);
    }
    self->weights = Py_XNewRef(weights_object);
    return (PyObject *)self;
}

static void
model_dealloc(PyObject *object)
{
    ac_py_model *self = (ac_py_model *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->model) {
        Py_BEGIN_ALLOW_THREADS
        ac_model_unref(self->model);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->weights);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* ---- io -------------------------------------------------------------------------------------- */

static PyObject *
describe(const ac_io *io)
{
    PyObject *shape = PyTuple_New(io->shape.rank);
    for (int32_t i = 0; shape && i < io->shape.rank; i++) {
        PyObject *dim = PyLong_FromLongLong(io->shape.dim[i]);
        if (!dim || PyTuple_SetItem(shape, i, dim) < 0) {
            Py_DECREF(shape);
            return NULL;
        }
    }
    if (!shape) {
        return NULL;
    }
    return Py_BuildValue("(sNsN)", io->name, shape, ac_dtype_name(io->dtype),
                         PyBool_FromLong(io->output));
}

static PyObject *
model_io(PyObject *self, PyObject *arg)
{
    ac_py_state *state = ac_py_state_of(self);
    ac_build_args args;
    if (ac_py_build_args(state, arg, &args) < 0) {
        return NULL;
    }
    ac_io *io = NULL;
    int32_t count = 0;
    PyThreadState *thread = leave_python(self);
    ac_status status = ac_model_io(of(self), &args, &io, &count);
    enter_python(self, thread);
    if (status < 0) {
        return ac_py_raise(state, status);
    }
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list && i < count; i++) {
        PyObject *entry = describe(&io[i]);
        if (!entry || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    ac_free(io);
    return list;
}

/* ---- run ------------------------------------------------------------------------------------- */

typedef struct call {
    ac_model *model;
    ac_build_args args;
    ac_py_dict inputs, outputs;
    unsigned long long prompt; /* token, 0: none */
    ac_stream stream;
} call;

/* Tensors of the model's own device are used where they lie, those of the host copied by the exec
 * where the device cannot read there. */
static ac_status
bind_one(const call *c, ac_exec *exec, const ac_py_named *item, bool output)
{
    const ac_device *device = ac_model_device(c->model);
    const ac_py_view *view = &item->view;
    if (!view->device) {
        return (output ? ac_exec_bind_output_host : ac_exec_bind_host)(exec, item->text,
                                                                       &view->tensor);
    }
    if (device->backend->host_memory) {
        return ac_error(AC_E_DEVICE, "%.128s: found a tensor on cuda:%d, expected one in host "
                                     "memory", item->text, view->device_index);
    }
    if (view->device_index != device->index) {
        return ac_error(AC_E_DEVICE, "%.128s: found a tensor on cuda:%d, expected one on cuda:%d",
                        item->text, view->device_index, device->index);
    }
    return (output ? ac_exec_bind_output : ac_exec_bind)(exec, item->text, &view->tensor);
}

static ac_status
bind_all(const call *c, ac_exec *exec)
{
    for (Py_ssize_t i = 0; i < c->inputs.count; i++) {
        AC_TRY(bind_one(c, exec, &c->inputs.item[i], false));
    }
    for (Py_ssize_t i = 0; i < c->outputs.count; i++) {
        AC_TRY(bind_one(c, exec, &c->outputs.item[i], true));
    }
    return AC_OK;
}

static ac_status
run(const call *c)
{
    ac_exec *exec;
    AC_TRY(ac_model_take(c->model, &c->args, c->prompt, &exec));
    ac_status status = bind_all(c, exec);
    if (status == AC_OK) {
        bool cached = c->prompt && ac_exec_prompt(exec) == c->prompt;
        ac_exec_set_prompt(exec, 0);
        status = ac_exec_run_on(exec, cached ? AC_RATE_SCHEDULE : AC_RATE_PROMPT, c->stream);
    }
    if (status == AC_OK) {
        ac_exec_set_prompt(exec, c->prompt);
    }
    ac_model_give(c->model, exec);
    return status;
}

static int
check_outputs(ac_py_state *state, const ac_py_dict *outputs)
{
    for (Py_ssize_t i = 0; i < outputs->count; i++) {
        if (outputs->item[i].view.readonly) {
            ac_py_error(state, AC_E_INVALID, "%s: found a read-only array for a result",
                        outputs->item[i].text);
            return -1;
        }
    }
    return 0;
}

int
ac_py_stream_of(ac_py_state *state, PyObject *object, ac_stream *out)
{
    if (object == Py_None) {
        return 0;
    }
    unsigned long long handle = PyLong_Check(object) ? PyLong_AsUnsignedLongLong(object)
                                                     : (unsigned long long)-1;
    if (handle == (unsigned long long)-1) {
        PyErr_Clear();
        ac_py_error(state, AC_E_INVALID, "stream: expected None or the number of a CUDA stream");
        return -1;
    }
    *out = (ac_stream){.given = true, .handle = (void *)(uintptr_t)handle};
    return 0;
}

static PyObject *
model_run(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"args", "inputs", "outputs", "prompt_token", "stream", NULL};
    PyObject *build, *inputs, *outputs, *stream = Py_None;
    call c = {.model = of(self)};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|KO:run", names, &build, &inputs,
                                     &outputs, &c.prompt, &stream)) {
        return NULL;
    }
    ac_py_state *state = ac_py_state_of(self);
    ac_status status = AC_OK;
    bool ready = ac_py_build_args(state, build, &c.args) == 0 &&
                 ac_py_stream_of(state, stream, &c.stream) == 0 &&
                 ac_py_dict_import(state, inputs, &c.inputs) == 0 &&
                 ac_py_dict_import(state, outputs, &c.outputs) == 0 &&
                 check_outputs(state, &c.outputs) == 0;
    if (ready) {
        PyThreadState *thread = leave_python(self);
        status = run(&c);
        enter_python(self, thread);
        if (status < 0) {
            ac_py_raise(state, status);
        }
    }
    ac_py_dict_release(&c.inputs);
    ac_py_dict_release(&c.outputs);
    if (!ready || status < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static PyObject *
model_use_memory(PyObject *self, PyObject *capsule)
{
    ac_memory memory;
    int known = ac_py_memory_of(capsule, &memory);
    if (known < 0) {
        return NULL;
    }
    if (known) {
        ac_device *device = ac_model_device(of(self));
        ac_status status = ac_device_set_memory(device, &memory);
        if (status < 0) {
            return ac_py_raise(ac_py_state_of(self), status);
        }
        known = device->blocks != NULL;
    }
    return PyBool_FromLong(known);
}

static PyObject *
model_make_room(PyObject *self, PyObject *arg)
{
    ac_py_state *state = ac_py_state_of(self);
    ac_build_args args;
    size_t freed;
    if (ac_py_build_args(state, arg, &args) < 0) {
        return NULL;
    }
    PyThreadState *thread = leave_python(self);
    ac_status status = ac_model_make_room(of(self), &args, &freed);
    enter_python(self, thread);
    return status < 0 ? ac_py_raise(state, status) : PyLong_FromSize_t(freed);
}

/* ---- looking in ------------------------------------------------------------------------------ */

/* `text` as a str, or the error; frees it. */
static PyObject *
text_result(ac_py_state *state, ac_status status, ac_text *text)
{
    if (status < 0) {
        ac_text_free(text);
        return ac_py_raise(state, status);
    }
    size_t length = text->length;
    char *taken = ac_text_take(text);
    if (!taken) {
        return ac_py_raise(state, ac_no_memory(length));
    }
    PyObject *result = PyUnicode_DecodeUTF8(taken, (Py_ssize_t)strlen(taken), "replace");
    ac_free(taken);
    return result;
}

static PyObject *
model_explain(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"args", "json", "passes", NULL};
    PyObject *build;
    int json = 0, passes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|pp:explain", names, &build, &json,
                                     &passes)) {
        return NULL;
    }
    ac_py_state *state = ac_py_state_of(self);
    ac_build_args build_args;
    if (ac_py_build_args(state, build, &build_args) < 0) {
        return NULL;
    }
    ac_text text = {0};
    PyThreadState *thread = leave_python(self);
    ac_status status = ac_model_explain(of(self), &build_args, json, passes, &text);
    enter_python(self, thread);
    return text_result(state, status, &text);
}

static PyObject *
model_profile(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"args", "json", "repeats", "flops", "bandwidth", NULL};
    PyObject *build;
    int json = 0, repeats = 0;
    ac_profile_args profile = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|pidd:profile", names, &build, &json,
                                     &repeats, &profile.flops, &profile.bandwidth)) {
        return NULL;
    }
    ac_py_state *state = ac_py_state_of(self);
    ac_build_args build_args;
    if (ac_py_build_args(state, build, &build_args) < 0) {
        return NULL;
    }
    profile.repeats = repeats;
    ac_text text = {0};
    PyThreadState *thread = leave_python(self);
    ac_status status = ac_model_profile(of(self), &build_args, &profile, json, &text);
    enter_python(self, thread);
    return text_result(state, status, &text);
}

static PyObject *
model_stats(PyObject *self, PyObject *unused)
{
    (void)unused;
    ac_model_stats s;
    Py_BEGIN_ALLOW_THREADS
    ac_model_get_stats(of(self), &s);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("{sLsisisnsnsnsdss}", "runs", (long long)s.runs, "plans", (int)s.plans,
                         "execs", (int)s.execs, "arena_bytes", (Py_ssize_t)s.arena_bytes,
                         "bound_bytes", (Py_ssize_t)s.bound_bytes, "keep_bytes",
                         (Py_ssize_t)s.keep_bytes, "plan_ms", s.plan_ms, "unrecorded",
                         s.unrecorded);
}

static PyObject *
model_drop_plans(PyObject *self, PyObject *unused)
{
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    ac_model_drop_plans(of(self));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *
model_wait(PyObject *self, PyObject *unused)
{
    (void)unused;
    ac_device *device = ac_model_device(of(self));
    ac_status status = AC_OK;
    Py_BEGIN_ALLOW_THREADS
    if (device->backend->wait) {
        status = device->backend->wait(device->self, (ac_stream){0});
    }
    Py_END_ALLOW_THREADS
    if (status < 0) {
        return ac_py_raise(ac_py_state_of(self), status);
    }
    Py_RETURN_NONE;
}

static PyObject *
model_class_name(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(ac_model_class_name(of(self)));
}

static PyMethodDef methods[] = {
    {"io", model_io, METH_O,
     PyDoc_STR("io(args)\n--\n\nInputs and outputs for these args: (name, shape, dtype, "
               "is_output).")},
    {"run", (PyCFunction)(void (*)(void))model_run, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("run(args, inputs, outputs, prompt_token=0, stream=None)\n--\n\nRuns once, in place "
               "into the outputs.  An equal token not 0 says that the inputs of rate \"prompt\" "
               "and the weights are those of the earlier run.  A model on a GPU takes tensors of "
               "that GPU and of the host.  With a stream (torch's cuda_stream) the work is queued "
               "there, and waited for only where a result goes to the host.")},
    {"use_memory", model_use_memory, METH_O,
     PyDoc_STR("use_memory(api)\n--\n\nThe model's GPU takes its memory from the allocator of a "
               "DLPack exchange API (torch.Tensor.__dlpack_c_exchange_api__) from now on; whether "
               "it does.")},
    {"make_room", model_make_room, METH_O,
     PyDoc_STR("make_room(args)\n--\n\nFrees memory for activations that a run of these args "
               "would have to replace; how many bytes.")},
    {"explain", (PyCFunction)(void (*)(void))model_explain, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("explain(args, json=False, passes=False)\n--\n\nThe plan as text or JSON; with "
               "passes the graph as built and after each pass before it.")},
    {"profile", (PyCFunction)(void (*)(void))model_profile, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("profile(args, json=False, repeats=0, flops=0.0, bandwidth=0.0)\n--\n\nRuns over "
               "random inputs and says how long each step took, as text or JSON.  flops and "
               "bandwidth, a second: what the device reaches, where accel does not know.")},
    {"stats", model_stats, METH_NOARGS,
     PyDoc_STR("stats()\n--\n\nRuns, plans, execs and bytes; why recording failed, \"\": it "
               "did not.")},
    {"drop_plans", model_drop_plans, METH_NOARGS,
     PyDoc_STR("drop_plans()\n--\n\nFrees plans and what they hold.")},
    {"wait", model_wait, METH_NOARGS,
     PyDoc_STR("wait()\n--\n\nFor all that is queued on the model's GPU, whatever the stream.")},
    {0},
};

static PyGetSetDef getters[] = {
    {"class_name", model_class_name, NULL, PyDoc_STR("\"UNet2DConditionModel\"."), NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Model(config, weights=None, device=\"cpu\", passes_off=\"\")\n"
                                  "--\n\nA network by its config.json text.  Without weights it "
                                  "can be explained but not run.")},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "accel._core.Model",
    .basicsize = sizeof(ac_py_model),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int
ac_py_add_model(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    state->model = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    if (!state->model) {
        return -1;
    }
    return PyModule_AddObjectRef(module, "Model", (PyObject *)state->model);
}
