/* loop: denoise() and Cancel.
 *
 * The loop runs without the GIL in the calling thread.  After each row it takes the GIL back to let
 * signals in (Ctrl-C) and to call the callback; an exception there ends the run and propagates.
 */
#include "../denoise.h"
#include "args.h"

/* ---- Cancel ---------------------------------------------------------------------------------- */

typedef struct cancel_object {
    PyObject_HEAD
    _Atomic int flag;
} cancel_object;

static PyObject *
cancel_cancel(PyObject *self, PyObject *unused)
{
    (void)unused;
    atomic_store(&((cancel_object *)self)->flag, 1);
    Py_RETURN_NONE;
}

static PyObject *
cancel_cancelled(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(atomic_load(&((cancel_object *)self)->flag));
}

static void
cancel_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef cancel_methods[] = {
    {"cancel", cancel_cancel, METH_NOARGS,
     PyDoc_STR("cancel()\n--\n\nEnds the run that holds this; from any thread.")},
    {0},
};

static PyGetSetDef cancel_getters[] = {
    {"cancelled", cancel_cancelled, NULL, PyDoc_STR("cancel() was called."), NULL},
    {0},
};

static PyType_Slot cancel_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Cancel()\n--\n\nA flag that ends a run before its next step.")},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, cancel_dealloc},
    {Py_tp_methods, cancel_methods},
    {Py_tp_getset, cancel_getters},
    {0, NULL},
};

static PyType_Spec cancel_spec = {
    .name = "accel._core.Cancel",
    .basicsize = sizeof(cancel_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = cancel_slots,
};

/* ---- denoise --------------------------------------------------------------------------------- */

typedef struct run {
    PyObject *module;
    PyObject *callback;     /* borrowed, or NULL; one of the two at most */
    PyObject *progress;
    PyThreadState *thread;  /* saved while the loop runs */
    ac_py_view latents;     /* [n, c, h, w] f32, the caller's */
    ac_py_view noise, registers; /* the caller's, or empty */
    ac_py_dict conditions;
    ac_condition *condition;
    ac_rng *rng;            /* copies: the objects get their states back afterwards */
    PyObject *rngs;         /* tuple, owned */
    ac_denoise_args args;
} run;

/* Lets signals in and calls `function`, if any; with the GIL. */
static ac_status
call_python(PyObject *function, int32_t index, double timestep)
{
    if (PyErr_CheckSignals() < 0) {
        return ac_error(AC_E_CANCELLED, "interrupted");
    }
    if (!function) {
        return AC_OK;
    }
    PyObject *said = PyObject_CallFunction(function, "id", (int)index, timestep);
    int stop = said ? PyObject_IsTrue(said) : -1;
    Py_XDECREF(said);
    if (stop < 0) {
        return ac_error(AC_E_CANCELLED, "the callback raised");
    }
    return stop ? 1 : AC_OK;
}

static ac_status
on_poll(void *arg, int32_t index, double timestep)
{
    run *r = arg;
    PyEval_RestoreThread(r->thread);
    ac_status status = call_python(r->progress, index, timestep);
    r->thread = PyEval_SaveThread();
    return status;
}

/* The callback sees and may change the latents where the caller has them. */
static ac_status
on_step(void *arg, int32_t index, double timestep, float *latents)
{
    run *r = arg;
    (void)latents;
    PyEval_RestoreThread(r->thread);
    ac_status status = call_python(r->callback, index, timestep);
    r->thread = PyEval_SaveThread();
    return status;
}

static int
take_latents(ac_py_state *state, PyObject *object, run *r)
{
    if (ac_py_view_import_any(state, object, "latents", &r->latents) < 0) {
        return -1;
    }
    const ac_tensor *t = &r->latents.tensor;
    if (t->dtype != AC_F32 || t->shape.rank != 4 || !ac_tensor_is_contiguous(t) ||
        r->latents.readonly || ac_tensor_count(t) == 0) {
        char shape[AC_SHAPE_TEXT];
        ac_py_error(state, AC_E_SHAPE, "latents: found %s %s%s, expected a contiguous, writable "
                                       "float32 [n, c, h, w]", ac_dtype_name(t->dtype),
                    ac_shape_text(&t->shape, shape), r->latents.readonly ? ", read-only" : "");
        return -1;
    }
    r->args.device = r->latents.device;
    r->args.images = t->shape.dim[0];
    r->args.channels = t->shape.dim[1];
    r->args.height = t->shape.dim[2];
    r->args.width = t->shape.dim[3];
    return 0;
}

/* f32 memory of [count, n, c, h, w], all of it in one piece; None: none. */
static int
take_floats(ac_py_state *state, PyObject *object, const char *what, int64_t count, const run *r,
            ac_py_view *view)
{
    if (object == Py_None) {
        return 0;
    }
    if (ac_py_view_import_any(state, object, what, view) < 0) {
        return -1;
    }
    ac_shape expected = AC_SHAPE(count, r->args.images, r->args.channels, r->args.height,
                                 r->args.width);
    const ac_tensor *t = &view->tensor;
    if (t->dtype != AC_F32 || !ac_shape_equal(&t->shape, &expected) ||
        !ac_tensor_is_contiguous(t)) {
        char found[AC_SHAPE_TEXT], wanted[AC_SHAPE_TEXT];
        ac_py_error(state, AC_E_SHAPE, "%s: found %s %s, expected contiguous float32 %s", what,
                    ac_dtype_name(t->dtype), ac_shape_text(&t->shape, found),
                    ac_shape_text(&expected, wanted));
        return -1;
    }
    if (view->device != r->latents.device || view->device_index != r->latents.device_index) {
        ac_py_error(state, AC_E_DEVICE, "%s: found %s, expected them where the latents are", what,
                    view->device ? "them on a GPU" : "them in host memory");
        return -1;
    }
    return 0;
}

/* After take_latents, whose shape they share. */
static int
take_memory(ac_py_state *state, PyObject *noise, PyObject *registers, run *r)
{
    if (take_floats(state, noise, "noise", r->args.schedule->n_rows, r, &r->noise) < 0 ||
        take_floats(state, registers, "registers", AC_SCHED_REGISTERS, r, &r->registers) < 0) {
        return -1;
    }
    if (r->registers.readonly) {
        ac_py_error(state, AC_E_INVALID, "registers: found a read-only array");
        return -1;
    }
    r->args.noise = r->noise.tensor.data;
    r->args.registers = r->registers.tensor.data;
    return 0;
}

static int
take_conditions(ac_py_state *state, PyObject *object, run *r)
{
    if (ac_py_dict_import(state, object, &r->conditions) < 0) {
        return -1;
    }
    Py_ssize_t count = r->conditions.count;
    r->condition = PyMem_Calloc((size_t)AC_MAX(count, 1), sizeof *r->condition);
    if (!r->condition) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const ac_py_named *item = &r->conditions.item[i];
        r->condition[i] = (ac_condition){.name = item->text, .tensor = item->view.tensor,
                                         .device = item->view.device};
        if (strcmp(item->text, "encoder_hidden_states") == 0) {
            r->args.tokens = item->view.tensor.shape.dim[1];
        }
        if (item->view.tensor.shape.rank < 2) {
            ac_py_error(state, AC_E_SHAPE, "%.64s: found %d dimensions, expected at least 2",
                        item->text, (int)item->view.tensor.shape.rank);
            return -1;
        }
    }
    if (r->args.tokens < 1) {
        ac_py_error(state, AC_E_INVALID, "conditions: expected \"encoder_hidden_states\" with at "
                                         "least one token");
        return -1;
    }
    r->args.condition = r->condition;
    r->args.n_conditions = (int32_t)count;
    return 0;
}

static int
take_rngs(PyObject *module, PyObject *object, run *r)
{
    r->rngs = PySequence_Tuple(object);
    if (!r->rngs) {
        return -1;
    }
    Py_ssize_t count = PyTuple_Size(r->rngs);
    r->rng = PyMem_Calloc((size_t)AC_MAX(count, 1), sizeof *r->rng);
    if (!r->rng) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const ac_rng *rng = ac_py_rng_of(module, PyTuple_GetItem(r->rngs, i));
        if (!rng) {
            return -1;
        }
        r->rng[i] = *rng;
    }
    r->args.rng = r->rng;
    r->args.n_rng = (int32_t)AC_MIN(count, INT32_MAX);
    return 0;
}

static void
give_rngs_back(run *r)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(r->rngs); i++) {
        ac_rng *rng = ac_py_rng_of(r->module, PyTuple_GetItem(r->rngs, i));
        if (rng) {
            *rng = r->rng[i];
        }
    }
}

/* Tensors of a GPU must be the model's. */
static int
check_places(ac_py_state *state, const run *r)
{
    const ac_device *device = ac_model_device(r->args.unet);
    for (Py_ssize_t i = -1; i < r->conditions.count; i++) {
        const ac_py_view *view = i < 0 ? &r->latents : &r->conditions.item[i].view;
        bool gpu = !device->backend->host_memory;
        if (view->device && (!gpu || view->device_index != device->index)) {
            char expected[32] = "one in host memory";
            if (gpu) {
                PyOS_snprintf(expected, sizeof expected, "one on cuda:%d", (int)device->index);
            }
            ac_py_error(state, AC_E_DEVICE, "%.128s: found a tensor on cuda:%d, expected %s",
                        i < 0 ? "latents" : r->conditions.item[i].text, (int)view->device_index,
                        expected);
            return -1;
        }
    }
    return 0;
}

static int
take_cancel(ac_py_state *state, PyObject *object, run *r)
{
    if (object == Py_None) {
        return 0;
    }
    if (!Py_IS_TYPE(object, state->cancel)) {
        PyErr_SetString(PyExc_TypeError, "cancel: expected a Cancel object");
        return -1;
    }
    r->args.cancel = &((cancel_object *)object)->flag;
    return 0;
}

static int
take_callable(PyObject *object, const char *what, PyObject **out)
{
    if (object != Py_None && !PyCallable_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a callable", what);
        return -1;
    }
    *out = object == Py_None ? NULL : object;
    return 0;
}

static int
take_callbacks(PyObject *callback, PyObject *progress, run *r)
{
    if (callback != Py_None && progress != Py_None) {
        PyErr_SetString(PyExc_TypeError, "progress: found a callback too, expected one of them");
        return -1;
    }
    if (take_callable(callback, "callback", &r->callback) < 0) {
        return -1;
    }
    return take_callable(progress, "progress", &r->progress);
}

static void
release(run *r)
{
    ac_py_view_release(&r->latents);
    ac_py_view_release(&r->noise);
    ac_py_view_release(&r->registers);
    ac_py_dict_release(&r->conditions);
    PyMem_Free(r->condition);
    PyMem_Free(r->rng);
    Py_XDECREF(r->rngs);
}

static ac_status
start(run *r, PyObject *weights)
{
    r->args.callback = r->callback ? on_step : NULL;
    r->args.poll = on_poll;
    r->args.callback_arg = r;
    ac_py_weights_busy(weights, 1);
    r->thread = PyEval_SaveThread();
    ac_status status = ac_denoise(&r->args, r->latents.tensor.data);
    PyEval_RestoreThread(r->thread);
    ac_py_weights_busy(weights, -1);
    return status;
}

static PyObject *
py_denoise(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"model", "schedule", "latents", "conditions", "rngs",
                            "guidance_scale", "guidance_rescale", "callback", "cancel",
                            "first_row", "noise", "registers", "compute", "tf32", "stream",
                            "progress", "check_finite", NULL};
    PyObject *model, *schedule, *latents, *conditions, *rngs;
    PyObject *callback = Py_None, *cancel = Py_None, *noise = Py_None, *registers = Py_None;
    PyObject *stream = Py_None, *progress = Py_None;
    run r = {.module = module, .args.guidance_scale = 1.0};
    const char *compute = "float32";
    int first_row = 0, finite = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOO|$ddOOiOOsiOOp:denoise", names, &model,
                                     &schedule, &latents, &conditions, &rngs,
                                     &r.args.guidance_scale, &r.args.guidance_rescale, &callback,
                                     &cancel, &first_row, &noise, &registers, &compute,
                                     &r.args.tf32, &stream, &progress, &finite)) {
        return NULL;
    }
    ac_py_state *state = PyModule_GetState(module);
    if (!Py_IS_TYPE(model, state->model)) {
        PyErr_SetString(PyExc_TypeError, "model: expected a Model object");
        return NULL;
    }
    if (!ac_dtype_from_name(compute, &r.args.compute) || !ac_dtype_is_float(r.args.compute)) {
        return ac_py_error(state, AC_E_DTYPE, "compute: found \"%.64s\", expected a float dtype",
                           compute);
    }
    r.args.unet = ((ac_py_model *)model)->model;
    r.args.first_row = first_row;
    r.args.finite = finite;
    r.args.schedule = ac_py_schedule_of(module, schedule);
    ac_status status = AC_OK;
    bool ready = r.args.schedule && ac_py_stream_of(state, stream, &r.args.stream) == 0 &&
                 take_latents(state, latents, &r) == 0 &&
                 take_memory(state, noise, registers, &r) == 0 &&
                 take_conditions(state, conditions, &r) == 0 && check_places(state, &r) == 0 &&
                 take_rngs(module, rngs, &r) == 0 &&
                 take_cancel(state, cancel, &r) == 0 &&
                 take_callbacks(callback, progress, &r) == 0;
    if (ready) {
        status = start(&r, ((ac_py_model *)model)->weights);
        give_rngs_back(&r);
        if (status < 0) {
            ac_py_raise(state, status);
        }
    }
    release(&r);
    if (!ready || status < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"denoise", (PyCFunction)(void (*)(void))py_denoise, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("denoise(model, schedule, latents, conditions, rngs, *, guidance_scale=1.0, "
               "guidance_rescale=0.0, callback=None, cancel=None, first_row=0, noise=None, "
               "registers=None, compute=\"float32\", tf32=0, stream=None, progress=None, "
               "check_finite=False)\n--\n\nRuns the loop in place on latents.  callback(index, "
               "timestep) after each row may change them and returns true to stop; progress, "
               "instead, sees none: it is called when the row is submitted, nothing is copied and "
               "nothing waited for.  noise [rows, n, c, h, w]: instead of rngs.  registers [6, n, "
               "c, h, w]: what a later call goes on with, at first_row.  Latents, noise and "
               "registers are all on the model's GPU or all in host memory; conditions may be in "
               "either.  check_finite: a NumericError for latents that are not, which names the "
               "row.")},
    {0},
};

int
ac_py_add_loop(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    state->cancel = (PyTypeObject *)PyType_FromModuleAndSpec(module, &cancel_spec, NULL);
    if (!state->cancel ||
        PyModule_AddObjectRef(module, "Cancel", (PyObject *)state->cancel) < 0) {
        return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
