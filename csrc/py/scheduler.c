/* scheduler: the Python types Schedule (a sampler's table) and Rng (PyTorch's CPU normals).
 *
 * Both are small: the loop uses what they hold, and tests and explain read the rows.
 */
#include "py.h"

#include <limits.h>
#include <string.h>

typedef struct schedule_object {
    PyObject_HEAD
    ac_schedule *schedule; /* never NULL once made */
} schedule_object;

typedef struct rng_object {
    PyObject_HEAD
    ac_rng rng;
} rng_object;

static void
release_type(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(self);
    Py_DECREF(type);
}

static PyObject *
allocate(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

/* ---- Schedule: making ------------------------------------------------------------------------ */

static int
to_int32(ac_py_state *state, long long value, const char *what, int32_t *out)
{
    if (value < 0 || value > INT32_MAX) {
        ac_py_error(state, AC_E_INVALID, "%s: found %lld, expected 0 to 2147483647", what, value);
        return -1;
    }
    *out = (int32_t)value;
    return 0;
}

static ac_status
schedule_from_text(const char *text, Py_ssize_t size, const ac_sched_options *options,
                   ac_schedule **out)
{
    const ac_json *config;
    ac_arena arena;
    ac_arena_init(&arena);
    ac_status status = ac_json_parse(&arena, text, (size_t)size, "scheduler config", &config);
    if (status >= 0) {
        status = ac_schedule_new(config, options, out);
    }
    ac_arena_deinit(&arena);
    return status;
}

static PyObject *
schedule_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"config_json", "num_inference_steps", "eta", "begin", NULL};
    ac_py_state *state = PyType_GetModuleState(type);
    const char *text;
    Py_ssize_t size;
    long long steps, begin = 0;
    ac_sched_options options = {0};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "s#L|dL:Schedule", names, &text, &size,
                                     &steps, &options.eta, &begin) ||
        to_int32(state, steps, "num_inference_steps", &options.num_inference_steps) < 0 ||
        to_int32(state, begin, "begin", &options.begin) < 0) {
        return NULL;
    }
    ac_schedule *schedule = NULL;
    ac_status status;
    Py_BEGIN_ALLOW_THREADS
    status = schedule_from_text(text, size, &options, &schedule);
    Py_END_ALLOW_THREADS
    if (status < 0) {
        return ac_py_raise(state, status);
    }
    schedule_object *self = (schedule_object *)allocate(type);
    if (!self) {
        ac_schedule_free(schedule);
        return NULL;
    }
    self->schedule = schedule;
    return (PyObject *)self;
}

static void
schedule_dealloc(PyObject *self)
{
    ac_schedule_free(((schedule_object *)self)->schedule);
    release_type(self);
}

/* ---- Schedule: reading ----------------------------------------------------------------------- */

static const ac_schedule *
schedule_in(PyObject *self)
{
    return ((schedule_object *)self)->schedule;
}

static PyObject *
double_list(const double *values, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *item = PyFloat_FromDouble(values[i]);
        if (!item || PyList_SetItem(list, i, item) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static PyObject *
get_timesteps(PyObject *self, void *closure)
{
    (void)closure;
    const ac_schedule *schedule = schedule_in(self);
    PyObject *list = PyList_New(schedule->n_rows);
    for (Py_ssize_t i = 0; list && i < schedule->n_rows; i++) {
        PyObject *item = PyFloat_FromDouble(schedule->rows[i].timestep);
        if (!item || PyList_SetItem(list, i, item) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static PyObject *
get_alphas_cumprod(PyObject *self, void *closure)
{
    (void)closure;
    return double_list(schedule_in(self)->alphas_cumprod, schedule_in(self)->n_train);
}

static PyObject *
get_init_noise_sigma(PyObject *self, void *closure)
{
    (void)closure;
    return PyFloat_FromDouble(schedule_in(self)->init_noise_sigma);
}

static PyObject *
get_noise_f32(PyObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(schedule_in(self)->noise_f32);
}

static PyObject *
row_stores(const ac_sched_row *row)
{
    PyObject *list = PyList_New(row->n_stores);
    for (int32_t s = 0; list && s < row->n_stores; s++) {
        PyObject *item = Py_BuildValue("(iN)", (int)row->store[s].to,
                                       double_list(row->store[s].c, AC_BASIS_COUNT));
        if (!item || PyList_SetItem(list, s, item) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static PyObject *
row_dict(const ac_sched_row *row)
{
    return Py_BuildValue(
        "{s:d,s:d,s:d,s:d,s:d,s:d,s:d,s:N,s:N,s:d,s:d,s:N,s:N}", "timestep", row->timestep,
        "scale_in", row->scale_in, "m_x", row->m_x, "m_e", row->m_e, "clip", row->clip,
        "threshold", row->threshold, "threshold_max", row->threshold_max, "x_next",
        double_list(row->x_next, AC_BASIS_COUNT), "stores", row_stores(row), "start_x",
        row->start_x, "start_noise", row->start_noise, "draws_noise",
        PyBool_FromLong(row->draws_noise), "counts", PyBool_FromLong(row->counts));
}

static PyObject *
get_rows(PyObject *self, void *closure)
{
    (void)closure;
    const ac_schedule *schedule = schedule_in(self);
    PyObject *list = PyList_New(schedule->n_rows);
    for (Py_ssize_t i = 0; list && i < schedule->n_rows; i++) {
        PyObject *item = row_dict(&schedule->rows[i]);
        if (!item || PyList_SetItem(list, i, item) < 0) {
            Py_CLEAR(list);
        }
    }
    return list;
}

static Py_ssize_t
schedule_length(PyObject *self)
{
    return schedule_in(self)->n_rows;
}

/* ---- Schedule: one step ---------------------------------------------------------------------- */

/* x, e, noise, the registers: what apply() borrows. */
#define N_BUFFERS (3 + AC_SCHED_REGISTERS)

typedef struct borrowed {
    Py_buffer buffer[N_BUFFERS];
    float *data[N_BUFFERS]; /* NULL: not given */
    int32_t count;          /* buffers to release */
} borrowed;

static void
give_back(borrowed *all)
{
    while (all->count > 0) {
        PyBuffer_Release(&all->buffer[--all->count]);
    }
}

/* Slot `at` of `all` from an object with the buffer protocol, None leaves it empty.  0 or -1. */
static int
borrow(ac_py_state *state, borrowed *all, int32_t at, PyObject *object, const char *what,
       bool writable)
{
    if (object == Py_None) {
        return 0;
    }
    Py_buffer *buffer = &all->buffer[all->count];
    int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, buffer, flags) < 0) {
        return -1;
    }
    all->count++;
    if (!buffer->format || strcmp(buffer->format, "f") != 0) {
        ac_py_error(state, AC_E_DTYPE, "%s: found format \"%s\", expected \"f\" (float32)", what,
                    buffer->format ? buffer->format : "B");
        return -1;
    }
    if (buffer->len != all->buffer[0].len) {
        ac_py_error(state, AC_E_SHAPE, "%s: found %zd bytes, expected %zd as x has", what,
                    buffer->len, all->buffer[0].len);
        return -1;
    }
    all->data[at] = buffer->buf;
    return 0;
}

static int
borrow_registers(ac_py_state *state, borrowed *all, PyObject *registers)
{
    if (registers == Py_None) {
        return 0;
    }
    Py_ssize_t length = PySequence_Size(registers);
    if (length != AC_SCHED_REGISTERS) {
        if (length >= 0) {
            ac_py_error(state, AC_E_INVALID, "registers: found %zd, expected %d", length,
                        AC_SCHED_REGISTERS);
        }
        return -1;
    }
    for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        PyObject *item = PySequence_GetItem(registers, i);
        int failed = !item || borrow(state, all, 3 + i, item, "registers", true) < 0;
        Py_XDECREF(item);
        if (failed) {
            return -1;
        }
    }
    return 0;
}

/* Every tensor the row reads or writes is there. */
static int
check_given(ac_py_state *state, const ac_sched_row *row, const borrowed *all)
{
    bool used[AC_BASIS_COUNT] = {[AC_BASIS_X] = true, [AC_BASIS_E] = true};
    for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
        used[k] |= row->x_next[k] != 0.0;
        for (int32_t s = 0; s < row->n_stores; s++) {
            used[k] |= row->store[s].c[k] != 0.0;
        }
    }
    for (int32_t s = 0; s < row->n_stores; s++) {
        used[AC_BASIS_R0 + row->store[s].to] = true;
    }
    for (int32_t i = 0; i < N_BUFFERS; i++) {
        int32_t k = i < 2 ? i : i == 2 ? AC_BASIS_NOISE : AC_BASIS_R0 + i - 3;
        if (used[k] && !all->data[i]) {
            ac_py_error(state, AC_E_INVALID, "%s: found None, expected a buffer at this row",
                        i < 2 ? "x or e" : i == 2 ? "noise" : "registers");
            return -1;
        }
    }
    return 0;
}

static PyObject *
apply_row(ac_py_state *state, const ac_sched_row *row, const borrowed *all)
{
    if (check_given(state, row, all) < 0) {
        return NULL;
    }
    const Py_buffer *x = &all->buffer[0];
    int64_t images = x->ndim > 1 ? x->shape[0] : 1;
    int64_t total = x->len / (Py_ssize_t)sizeof(float);
    if (total == 0) {
        Py_RETURN_NONE;
    }
    int64_t count = total / images;
    float *work = NULL;
    if (row->threshold > 0.0) {
        work = ac_malloc((size_t)count * sizeof *work);
        if (!work) {
            return ac_py_raise(state, ac_no_memory((size_t)count * sizeof *work));
        }
    }
    Py_BEGIN_ALLOW_THREADS
    ac_sched_apply(row, images, count, all->data[0], all->data[1], all->data[2], all->data + 3,
                   work);
    Py_END_ALLOW_THREADS
    ac_free(work);
    Py_RETURN_NONE;
}

static PyObject *
schedule_apply(PyObject *self, PyObject *args)
{
    ac_py_state *state = ac_py_state_of(self);
    const ac_schedule *schedule = schedule_in(self);
    PyObject *x, *e, *noise = Py_None, *registers = Py_None, *result = NULL;
    Py_ssize_t index;
    if (!PyArg_ParseTuple(args, "nOO|OO:apply", &index, &x, &e, &noise, &registers)) {
        return NULL;
    }
    if (index < 0 || index >= schedule->n_rows) {
        return ac_py_error(state, AC_E_INVALID, "row: found %zd, expected 0 to %d", index,
                           schedule->n_rows - 1);
    }
    borrowed all = {.count = 0};
    if (borrow(state, &all, 0, x, "x", true) == 0 && borrow(state, &all, 1, e, "e", false) == 0 &&
        borrow(state, &all, 2, noise, "noise", false) == 0 &&
        borrow_registers(state, &all, registers) == 0) {
        result = apply_row(state, &schedule->rows[index], &all);
    }
    give_back(&all);
    return result;
}

static PyMethodDef schedule_methods[] = {
    {"apply", schedule_apply, METH_VARARGS,
     "apply(row, x, e, noise=None, registers=None)\n--\n\n"
     "One sampler step in place: x [n, ...] from the guided model output e, both float32 and\n"
     "C-contiguous. registers: six arrays like x that live from row to row."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef schedule_getset[] = {
    {"timesteps", get_timesteps, NULL, "What the UNet is told at each row: list of float.", NULL},
    {"rows", get_rows, NULL, "The table: one dict a row; see csrc/scheduler.h.", NULL},
    {"alphas_cumprod", get_alphas_cumprod, NULL, "Signal share by training step.", NULL},
    {"init_noise_sigma", get_init_noise_sigma, NULL, "Deviation of the first latents.", NULL},
    {"noise_f32", get_noise_f32, NULL, "Whether noise is drawn in float32 at any dtype.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot schedule_slots[] = {
    {Py_tp_doc, "Schedule(config_json, num_inference_steps, eta=0.0, begin=0)\n--\n\n"
                "A sampler's table, made from the text of a scheduler_config.json.\n\n"
                "Raises UnsupportedError naming the class, field or value; InvalidArgument for\n"
                "steps, eta or begin out of range; FormatError for malformed JSON."},
    {Py_tp_new, schedule_new},
    {Py_tp_dealloc, schedule_dealloc},
    {Py_tp_methods, schedule_methods},
    {Py_tp_getset, schedule_getset},
    {Py_sq_length, schedule_length},
    {0, NULL},
};

static PyType_Spec schedule_spec = {
    .name = "accel._core.Schedule",
    .basicsize = sizeof(schedule_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = schedule_slots,
};

/* ---- Rng ------------------------------------------------------------------------------------- */

/* torch.Generator.manual_seed's range: -2^63 to 2^64 - 1, negative ones wrap. */
static int
seed_from(PyObject *object, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(object);
    if (!PyErr_Occurred()) {
        return 0;
    }
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
        return -1;
    }
    PyErr_Clear();
    *out = (uint64_t)PyLong_AsLongLong(object);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *
rng_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"seed", "processors", "threads", NULL};
    PyObject *object;
    uint64_t seed;
    int processors = 0, threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!|$ii:Rng", names, &PyLong_Type, &object,
                                     &processors, &threads) ||
        seed_from(object, &seed) < 0) {
        return NULL;
    }
    rng_object *self = (rng_object *)allocate(type);
    if (!self) {
        return NULL;
    }
    ac_rng_seed(&self->rng, seed);
    if (processors || threads) {
        ac_status status = ac_rng_seed_cuda(&self->rng, seed, processors, threads);
        if (status < 0) {
            Py_DECREF(self);
            return ac_py_raise(PyType_GetModuleState(type), status);
        }
    }
    return (PyObject *)self;
}

static PyObject *
rng_normal(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"count", "half", NULL};
    Py_ssize_t count;
    int half = 0;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "n|p:normal", names, &count, &half)) {
        return NULL;
    }
    if (count < 0 || count > PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(float)) {
        return ac_py_error(ac_py_state_of(self), AC_E_INVALID,
                           "count: found %zd, expected 0 or more", count);
    }
    PyObject *result = PyByteArray_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(float));
    if (result) {
        /* the GIL stays: it is what keeps two threads from advancing one generator at once */
        float *out = (float *)(void *)PyByteArray_AsString(result);
        ac_rng *rng = &((rng_object *)self)->rng;
        (half ? ac_rng_normal_half : ac_rng_normal)(rng, out, count);
    }
    return result;
}

static PyObject *
rng_next(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(ac_rng_next(&((rng_object *)self)->rng));
}

static PyObject *
rng_get_seed(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(((rng_object *)self)->rng.seed);
}

static PyObject *
rng_to_torch_state(PyObject *self, PyObject *unused)
{
    (void)unused;
    const ac_philox *cuda = &((rng_object *)self)->rng.cuda;
    PyObject *result = PyByteArray_FromStringAndSize(
        NULL, cuda->threads ? AC_PHILOX_TORCH_BYTES : AC_RNG_TORCH_BYTES);
    if (result && cuda->threads) {
        ac_philox_to_torch(cuda, PyByteArray_AsString(result));
    } else if (result) {
        ac_rng_to_torch(&((rng_object *)self)->rng, PyByteArray_AsString(result));
    }
    return result;
}

static PyObject *
rng_set_torch_state(PyObject *self, PyObject *object)
{
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    ac_rng *rng = &((rng_object *)self)->rng;
    ac_status status = rng->cuda.threads
                           ? ac_philox_from_torch(&rng->cuda, buffer.buf, (size_t)buffer.len)
                           : ac_rng_from_torch(rng, buffer.buf, (size_t)buffer.len);
    PyBuffer_Release(&buffer);
    if (status < 0) {
        return ac_py_raise(ac_py_state_of(self), status);
    }
    Py_RETURN_NONE;
}

static PyObject *
rng_from_torch_state(PyObject *type, PyObject *object)
{
    PyObject *self = allocate((PyTypeObject *)type);
    PyObject *done = self ? rng_set_torch_state(self, object) : NULL;
    if (!done) {
        Py_CLEAR(self);
    }
    Py_XDECREF(done);
    return self;
}

static PyMethodDef rng_methods[] = {
    {"normal", (PyCFunction)(void (*)(void))rng_normal, METH_VARARGS | METH_KEYWORDS,
     "normal(count, half=False)\n--\n\n"
     "float32 normals as a bytearray: torch.randn(count, generator=g); with half the values that\n"
     "dtype=float16 and bfloat16 draw, before they are rounded."},
    {"next", rng_next, METH_NOARGS, "next()\n--\n\nThe next 32 bits of mt19937."},
    {"to_torch_state", rng_to_torch_state, METH_NOARGS,
     "to_torch_state()\n--\n\nBytes for torch.Generator.set_state."},
    {"set_torch_state", rng_set_torch_state, METH_O,
     "set_torch_state(state)\n--\n\nGoes on where a CPU torch.Generator is: get_state()'s bytes."},
    {"from_torch_state", rng_from_torch_state, METH_O | METH_CLASS,
     "from_torch_state(state)\n--\n\nAn Rng that goes on where a CPU torch.Generator is."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef rng_getset[] = {
    {"seed", rng_get_seed, NULL, "As given, modulo 2**64.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot rng_slots[] = {
    {Py_tp_doc, "Rng(seed, *, processors=0, threads=0)\n--\n\nPyTorch's CPU generator: the same "
                "stream, the same normals.\nWith a GPU's multiprocessors and the threads that each "
                "runs at once (H200: 132, 2048):\nthe normals and the state of PyTorch's CUDA "
                "generator there."},
    {Py_tp_new, rng_new},
    {Py_tp_dealloc, release_type},
    {Py_tp_methods, rng_methods},
    {Py_tp_getset, rng_getset},
    {0, NULL},
};

static PyType_Spec rng_spec = {
    .name = "accel._core.Rng",
    .basicsize = sizeof(rng_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = rng_slots,
};

/* ---- module ---------------------------------------------------------------------------------- */

static int
add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **out)
{
    *out = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *out ? PyModule_AddType(module, *out) : -1;
}

int
ac_py_add_scheduler(PyObject *module)
{
    ac_py_state *state = PyModule_GetState(module);
    if (add_type(module, &schedule_spec, &state->schedule) < 0) {
        return -1;
    }
    return add_type(module, &rng_spec, &state->rng);
}

static bool
is_a(PyObject *object, PyTypeObject *type, const char *name)
{
    if (Py_TYPE(object) == type) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "found another type, expected accel._core.%s", name);
    return false;
}

const ac_schedule *
ac_py_schedule_of(PyObject *module, PyObject *object)
{
    ac_py_state *state = PyModule_GetState(module);
    return is_a(object, state->schedule, "Schedule") ? schedule_in(object) : NULL;
}

ac_rng *
ac_py_rng_of(PyObject *module, PyObject *object)
{
    ac_py_state *state = PyModule_GetState(module);
    return is_a(object, state->rng, "Rng") ? &((rng_object *)object)->rng : NULL;
}
