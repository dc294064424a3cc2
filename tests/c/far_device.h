/* far_device: a backend for tests whose memory the engine must not touch: "far".  It computes with
 * the CPU's kernels, but like a GPU it has streams, records launches, and wants uploads.
 *
 * Every launch checks that all its operands lie in memory that the backend gave out and has not
 * taken back, so a host address or a stale one fails the test at once.  Convolutions prepare their
 * weights, and read the prepared form alone. */
#ifndef AC_TEST_FAR_DEVICE_H
#define AC_TEST_FAR_DEVICE_H

#include "../../csrc/denoise.h"
#include "test.h"

#include <stdlib.h>

enum { FAR_BLOCKS = 8192, FAR_LAUNCHES = 16384 };

typedef struct far_lane {
    ac_lane *cpu;
    void *stream;            /* where work goes; NULL: own */
    bool marked;
    ac_recording *recording; /* being made */
} far_lane;

/* One launch of a kernel, or one phase of a sampler, or a row's tail, or one copy. */
typedef struct far_launch {
    const ac_kernel *kernel;
    ac_problem problem;
    ac_tensor input[12];
    void *scratch;
    const void *prepared;
    ac_sampler_job job;
    ac_sampler_phase phase;
    bool tail;
    void *to;
    const void *from;
    size_t bytes;
} far_launch;

struct ac_recording {
    int32_t count;
    far_launch launch[FAR_LAUNCHES];
};

struct ac_event {
    bool recorded;
};

/* What the tests look at and set. */
static struct {
    char *start[FAR_BLOCKS];
    size_t size[FAR_BLOCKS];
    int32_t blocks;
    size_t live, most, uploaded; /* bytes */
    int64_t fail_at;         /* the n-th allocation from now fails; 0: none */
    int32_t fail_recordings; /* the next ones fail */
    int32_t fail_waits;      /* the next ones for the device do */
    bool no_tail;
    int64_t allocations, launches, uploads, downloads, replays, follows, waits, syncs;
    int64_t events, samplers, tails, copies; /* copies: within far memory, not recorded ones */
    int64_t stream_waits, device_waits; /* far_wait's */
    int32_t recordings;      /* alive */
} far;

static int32_t
far_find(const void *address)
{
    for (int32_t i = 0; i < far.blocks; i++) {
        if ((const char *)address >= far.start[i] &&
            (const char *)address < far.start[i] + far.size[i]) {
            return i;
        }
    }
    return -1;
}

static void
far_check(const void *address, size_t bytes)
{
    int32_t i = far_find(address);
    CHECK(i >= 0);
    CHECK(bytes <= (size_t)(far.start[i] + far.size[i] - (const char *)address));
}

/* ---- memory ---------------------------------------------------------------------------------- */

static ac_status
far_alloc(void *self, size_t bytes, void **out)
{
    (void)self;
    far.allocations++;
    *out = NULL;
    if (far.fail_at && --far.fail_at == 0) {
        return ac_error(AC_E_MEMORY, "far: out of memory: %zu bytes were asked for", bytes);
    }
    size_t size = ac_align_up(AC_MAX(bytes, 1), 256);
    CHECK(far.blocks < FAR_BLOCKS);
    char *memory = aligned_alloc(256, size);
    CHECK(memory);
    memset(memory, 0x7b, size);
    far.start[far.blocks] = memory;
    far.size[far.blocks++] = size;
    far.live += size;
    far.most = AC_MAX(far.most, far.live);
    *out = memory;
    return AC_OK;
}

static void
far_free(void *self, void *memory)
{
    (void)self;
    int32_t i = far_find(memory);
    CHECK(i >= 0 && far.start[i] == memory);
    far.live -= far.size[i];
    far.start[i] = far.start[--far.blocks];
    far.size[i] = far.size[far.blocks];
    free(memory);
}

/* ---- launches -------------------------------------------------------------------------------- */

static const ac_kernel *
far_cpu_kernel(const ac_problem *p)
{
    static ac_caps caps;
    void *self;
    if (caps.workers == 0) {
        CHECK_OK(ac_backend_cpu.open(0, &self, &caps));
    }
    for (const ac_kernel *const *k = ac_backend_cpu.kernels; *k; k++) {
        if ((*k)->op == p->op && (*k)->supports(p, &caps)) {
            return *k;
        }
    }
    return NULL;
}

/* The filter of w's shape out of the order o, h, w, i; what w itself holds is not read. */
static void *
far_unpack(ac_tensor *w, const void *prepared)
{
    const int64_t *d = w->shape.dim;
    size_t item = ac_dtype_size(w->dtype);
    char *to = ac_malloc_aligned(ac_tensor_bytes(w));
    CHECK(to);
    far_check(prepared, ac_tensor_bytes(w));
    ac_shape_strides(&w->shape, w->stride);
    for (int64_t n = 0; n < ac_tensor_count(w); n++) {
        int64_t i = n % d[1], x = n / d[1] % d[3], y = n / (d[1] * d[3]) % d[2];
        int64_t o = n / (d[1] * d[3] * d[2]);
        memcpy(to + (size_t)(((o * d[1] + i) * d[2] + y) * d[3] + x) * item,
               (const char *)prepared + (size_t)n * item, item);
    }
    return to;
}

static ac_status
far_execute_kernel(far_lane *lane, const far_launch *l)
{
    ac_problem p = l->problem;
    ac_tensor input[AC_ARRAY_LEN(l->input)];
    p.input = memcpy(input, l->input, sizeof input);
    bool own_form = p.op == AC_OP_CONV2D && l->prepared;
    for (int32_t k = 0; k < p.n_inputs; k++) {
        if (p.input[k].shape.rank >= 0 && !(own_form && k == AC_CONV_W)) {
            far_check(p.input[k].data, test_extent(&p.input[k]));
        }
    }
    far_check(p.output.data, test_extent(&p.output));
    far.launches++;
    if (!own_form) {
        return l->kernel->launch(lane->cpu, &p, l->scratch, NULL);
    }
    void *weight = far_unpack(&p.input[AC_CONV_W], l->prepared);
    p.input[AC_CONV_W].data = weight;
    ac_status status = l->kernel->launch(lane->cpu, &p, l->scratch, NULL);
    ac_free_aligned(weight);
    return status;
}

/* Behind the convolution, whose result is [n, h, w, c]. */
static ac_status
far_execute_tail(far_lane *lane, const far_launch *l)
{
    const ac_tensor *y = &l->problem.output;
    const ac_sampler_job *job = &l->job;
    int64_t channels = y->shape.dim[3], pixels = y->shape.dim[1] * y->shape.dim[2];
    CHECK(ac_tensor_is_contiguous(y));
    for (int64_t i = 0; i < ac_tensor_count(y); i++) {
        int64_t c = i % channels, pixel = i / channels % pixels, n = i / channels / pixels;
        job->output[(n * channels + c) * pixels + pixel] =
            (float)ac_element_get(y->data, y->dtype, i);
    }
    AC_TRY(ac_backend_cpu.sampler(NULL, lane->cpu, job, AC_SAMPLER_APPLY));
    return job->state->step < job->n_rows
               ? ac_backend_cpu.sampler(NULL, lane->cpu, job, AC_SAMPLER_SCALE) : AC_OK;
}

static ac_status
far_execute(far_lane *lane, const far_launch *l)
{
    if (l->to) {
        memmove(l->to, l->from, l->bytes);
        return AC_OK;
    }
    if (!l->kernel) {
        far.samplers++;
        CHECK(l->job.state->step < l->job.n_rows);
        return ac_backend_cpu.sampler(NULL, lane->cpu, &l->job, l->phase);
    }
    AC_TRY(far_execute_kernel(lane, l));
    far.tails += l->tail;
    return l->tail ? far_execute_tail(lane, l) : AC_OK;
}

static ac_status
far_add(far_lane *lane, const far_launch *l)
{
    if (!lane->recording) {
        return far_execute(lane, l);
    }
    CHECK(lane->recording->count < FAR_LAUNCHES);
    lane->recording->launch[lane->recording->count++] = *l;
    return AC_OK;
}

static ac_status
far_launch_problem(ac_lane *lane, far_launch l)
{
    const ac_problem *p = &l.problem;
    CHECK(p->n_inputs <= (int32_t)AC_ARRAY_LEN(l.input));
    memcpy(l.input, p->input, (size_t)p->n_inputs * sizeof *l.input);
    if (p->op == AC_OP_CONV2D && l.prepared) {
        ac_shape_strides(&l.input[AC_CONV_W].shape, l.input[AC_CONV_W].stride);
    }
    l.problem.input = l.input; /* each copy has its own */
    l.kernel = far_cpu_kernel(&l.problem);
    CHECK(l.kernel);
    return far_add((far_lane *)lane, &l);
}

static ac_status
far_run(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    return far_launch_problem(lane, (far_launch){.problem = *p, .scratch = scratch,
                                                 .prepared = prepared});
}

static bool
far_supports(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return far_cpu_kernel(p) != NULL;
}

static size_t
far_scratch(const ac_problem *p, const ac_caps *caps)
{
    const ac_kernel *k = far_cpu_kernel(p);
    return k->scratch ? k->scratch(p, caps) : 0;
}

static size_t
far_worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    const ac_kernel *k = far_cpu_kernel(p);
    return k->worker_scratch ? k->worker_scratch(p, caps) : 0;
}

static bool
far_is_1x1(const ac_tensor *w)
{
    return w->shape.dim[2] == 1 && w->shape.dim[3] == 1;
}

static size_t
far_prepared_bytes(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return far_is_1x1(&p->input[AC_CONV_W]) ? 0 : ac_tensor_bytes(&p->input[AC_CONV_W]);
}

/* [o, i, h, w] into the order o, h, w, i. */
static ac_status
far_prepare(ac_lane *lane, const ac_problem *p, void *prepared)
{
    const ac_tensor *w = &p->input[AC_CONV_W];
    const int64_t *d = w->shape.dim;
    int64_t at = 0;
    CHECK(!((far_lane *)lane)->recording);
    far_check(w->data, test_extent(w));
    far_check(prepared, ac_tensor_bytes(w));
    for (int64_t o = 0; o < d[0]; o++) {
        for (int64_t y = 0; y < d[2]; y++) {
            for (int64_t x = 0; x < d[3]; x++) {
                for (int64_t i = 0; i < d[1]; i++) {
                    int64_t from = o * w->stride[0] + i * w->stride[1] + y * w->stride[2] +
                                   x * w->stride[3];
                    ac_element_set(prepared, w->dtype, at++, ac_element_get(w->data, w->dtype,
                                                                            from));
                }
            }
        }
    }
    return AC_OK;
}

#define FAR_KERNEL(text, NAME)                                                                     \
    &(const ac_kernel)                                                                             \
    {                                                                                              \
        .name = "far." text, .op = AC_OP_##NAME, .supports = far_supports,                         \
        .scratch = far_scratch, .worker_scratch = far_worker_scratch, .launch = far_run,           \
    }

static const ac_kernel *const far_kernels[] = {
    &(const ac_kernel){.name = "far.conv2d", .op = AC_OP_CONV2D, .supports = far_supports,
                       .scratch = far_scratch, .worker_scratch = far_worker_scratch,
                       .prepared_bytes = far_prepared_bytes, .prepare = far_prepare,
                       .form = AC_FORM_OHWI, .launch = far_run},
#define ROW_0(name, NAME) FAR_KERNEL(name, NAME),
#define ROW_1(name, NAME)
#define X(NAME, name, view, operands, meaning) ROW_##view(#name, NAME)
#include "../../csrc/ops.def"
#undef X
    NULL,
};

static void
far_check_job(const ac_sampler_job *job)
{
    far_check(job->state, sizeof *job->state);
    far_check(job->rows, sizeof *job->rows);
    far_check(job->sample, 1);
    far_check(job->output, 1);
    far_check(job->latents, 1);
    for (int i = 0; i < AC_SCHED_REGISTERS; i++) {
        far_check(job->registers[i], (size_t)(job->images * job->per_image) * sizeof(float));
    }
}

static ac_status
far_sampler(void *self, ac_lane *lane, const ac_sampler_job *job, ac_sampler_phase phase)
{
    (void)self;
    far_check_job(job);
    far_launch l = {.job = *job, .phase = phase};
    return far_add((far_lane *)lane, &l);
}

/* Only without scratch, for which the caller has no place. */
static bool
far_tail_fits(const ac_caps *caps, const ac_problem *conv, const ac_sampler_job *job)
{
    return !far.no_tail && !job->rescales && !job->thresholds && far_scratch(conv, caps) == 0 &&
           ac_tensor_count(&conv->output) == (1 + job->guided) * job->images * job->per_image;
}

static ac_status
far_tail(void *self, ac_lane *lane, const ac_problem *conv, const void *prepared,
         const ac_sampler_job *job)
{
    (void)self;
    far_check_job(job);
    far_check(job->tickets, AC_SAMPLER_TICKETS(job) * sizeof *job->tickets);
    return far_launch_problem(lane, (far_launch){.problem = *conv, .prepared = prepared,
                                                 .job = *job, .tail = true});
}

/* ---- copies ---------------------------------------------------------------------------------- */

static ac_status
far_upload(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    CHECK(!((far_lane *)lane)->recording);
    far_check(to, bytes);
    CHECK(far_find(from) < 0);
    memcpy(to, from, bytes);
    far.uploads++;
    far.uploaded += bytes;
    return AC_OK;
}

static ac_status
far_download(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    CHECK(!((far_lane *)lane)->recording);
    far_check(from, bytes);
    CHECK(far_find(to) < 0);
    memcpy(to, from, bytes);
    far.downloads++;
    return AC_OK;
}

static ac_status
far_copy(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    far_check(to, bytes);
    far_check(from, bytes);
    far.copies += !((far_lane *)lane)->recording;
    return far_add((far_lane *)lane, &(far_launch){.to = to, .from = from, .bytes = bytes});
}

/* ---- lanes ----------------------------------------------------------------------------------- */

static ac_status
far_open(int32_t index, void **self, ac_caps *caps)
{
    return ac_backend_cpu.open(index, self, caps);
}

static void
far_close(void *self)
{
    (void)self;
}

static ac_status
far_lane_open(void *self, ac_lane **out)
{
    far_lane *lane = calloc(1, sizeof *lane);
    CHECK(lane);
    CHECK_OK(ac_backend_cpu.lane_open(self, &lane->cpu));
    *out = (ac_lane *)lane;
    return AC_OK;
}

static void
far_lane_close(void *self, ac_lane *lane)
{
    ac_backend_cpu.lane_close(self, ((far_lane *)lane)->cpu);
    free(lane);
}

static ac_status
far_lane_reserve(void *self, ac_lane *lane, size_t worker_scratch)
{
    return ac_backend_cpu.lane_reserve(self, ((far_lane *)lane)->cpu, worker_scratch);
}

static ac_status
far_sync(void *self, ac_lane *lane)
{
    (void)self;
    CHECK(!((far_lane *)lane)->recording);
    far.syncs++;
    return AC_OK;
}

static ac_status
far_wait(void *self, ac_stream stream)
{
    (void)self;
    far.stream_waits += stream.given;
    far.device_waits += !stream.given;
    bool fails = !stream.given && far.fail_waits > 0;
    far.fail_waits -= fails;
    return fails ? ac_error(AC_E_DEVICE, "far: somebody records") : AC_OK;
}

static ac_status
far_lane_follow(void *self, ac_lane *lane, ac_stream stream)
{
    far_lane *l = (far_lane *)lane;
    void *wanted = stream.given ? stream.handle : NULL;
    (void)self;
    far.follows++;
    if (wanted != l->stream && l->marked) {
        far.waits++;
    }
    l->stream = wanted;
    return AC_OK;
}

static ac_status
far_lane_mark(void *self, ac_lane *lane)
{
    (void)self;
    ((far_lane *)lane)->marked = true;
    return AC_OK;
}

static ac_status
far_lane_wait(void *self, ac_lane *lane, const ac_lane *other)
{
    (void)self;
    CHECK(lane != other);
    far.waits++;
    return AC_OK;
}

static ac_status
far_event_new(void *self, ac_event **out)
{
    (void)self;
    *out = calloc(1, sizeof **out);
    CHECK(*out);
    far.events++;
    return AC_OK;
}

static void
far_event_free(void *self, ac_event *event)
{
    (void)self;
    far.events -= event != NULL;
    free(event);
}

static ac_status
far_event_record(void *self, ac_lane *lane, ac_event *event)
{
    (void)self;
    (void)lane;
    event->recorded = true;
    return AC_OK;
}

static ac_status
far_event_wait(void *self, ac_event *event)
{
    (void)self;
    CHECK(event->recorded);
    return AC_OK;
}

/* ---- recording ------------------------------------------------------------------------------- */

static ac_status
far_record_begin(void *self, ac_lane *lane)
{
    far_lane *l = (far_lane *)lane;
    (void)self;
    CHECK(!l->recording);
    l->recording = calloc(1, sizeof *l->recording);
    CHECK(l->recording);
    return AC_OK;
}

static ac_status
far_record_end(void *self, ac_lane *lane, ac_recording **out)
{
    far_lane *l = (far_lane *)lane;
    (void)self;
    CHECK(l->recording);
    *out = l->recording;
    l->recording = NULL;
    if (far.fail_recordings > 0) {
        far.fail_recordings--;
        free(*out);
        *out = NULL;
        return ac_error(AC_E_DEVICE, "far: this launch cannot be recorded");
    }
    far.recordings++;
    return AC_OK;
}

static ac_status
far_replay(void *self, ac_lane *lane, ac_recording *recording)
{
    (void)self;
    CHECK(!((far_lane *)lane)->recording);
    far.replays++;
    for (int32_t i = 0; i < recording->count; i++) {
        AC_TRY(far_execute((far_lane *)lane, &recording->launch[i]));
    }
    return AC_OK;
}

static void
far_record_free(void *self, ac_recording *recording)
{
    (void)self;
    far.recordings -= recording != NULL;
    free(recording);
}

static const ac_backend far_backend = {
    .abi = AC_ABI, .name = "far", .kernels = far_kernels, .open = far_open,
    .close = far_close, .alloc = far_alloc, .free = far_free, .lane_open = far_lane_open,
    .lane_close = far_lane_close, .lane_reserve = far_lane_reserve, .upload = far_upload,
    .download = far_download, .copy = far_copy, .sync = far_sync, .wait = far_wait,
    .lane_follow = far_lane_follow, .lane_mark = far_lane_mark, .lane_wait = far_lane_wait,
    .event_new = far_event_new, .event_free = far_event_free, .event_record = far_event_record,
    .event_wait = far_event_wait, .sampler = far_sampler, .tail_fits = far_tail_fits,
    .tail = far_tail, .record_begin = far_record_begin, .record_end = far_record_end,
    .replay = far_replay, .record_free = far_record_free,
};

#endif
