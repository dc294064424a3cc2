/* device: the contract a backend meets, and the opened device the engine uses.
 *
 * Adding a backend: one device file and one kernel folder, both in kernels/<name>/, and one line
 * in device.c.  A backend in another library (CUDA) gets what it needs of the host through
 * ac_host, because it cannot see the engine's symbols.
 */
#ifndef AC_DEVICE_H
#define AC_DEVICE_H

#include "kernel.h"
#include "sampler.h"

#define AC_ABI 9 /* of ac_backend and everything it reaches; another number is refused */

/* Nothing of it is touched before the numbers were compared. */
typedef struct ac_host {
    uint32_t abi;
    void *(*alloc)(size_t bytes);
    void (*free)(void *memory);
    /* Sets the calling thread's message; returns status. */
    ac_status (*verror)(ac_status status, const char *format, va_list args);
    const char *(*message)(void); /* that message */
    void (*log)(int level, const char *message);
} ac_host;

typedef struct ac_recording ac_recording;
typedef struct ac_event ac_event;

/* A queue of the caller's (CUDA: a cudaStream_t, NULL is the legacy default stream). */
typedef struct ac_stream {
    bool given; /* false: the lane's own */
    void *handle;
} ac_stream;

typedef struct ac_backend {
    uint32_t abi; /* first in every build: all that a library of another one fills */
    const char *name; /* "cpu", "cuda", "null" */
    const ac_kernel *const *kernels; /* ends with NULL */

    /* Opens device number `index`; *self is the backend's own state. */
    ac_status (*open)(int32_t index, void **self, ac_caps *caps);
    void (*close)(void *self);
    /* `message`: of a run that failed with AC_E_DEVICE, for a backend that repeats it.  NULL: need
     * not know. */
    void (*failed)(void *self, const char *message);
    /* The device and the libraries it uses, by lines from 0; false: no such line.  *warning: the
     * line says what is missed.  NULL: nothing to say. */
    bool (*describe)(void *self, int32_t line, bool *warning, char *text, size_t size);
    /* Device memory, 256-byte aligned.  OutOfMemory names bytes wanted and free. */
    ac_status (*alloc)(void *self, size_t bytes, void **out);
    void (*free)(void *self, void *memory);
    /* A lane: the order in which work runs.  CPU: a slot in the pool; CUDA: a stream. */
    ac_status (*lane_open)(void *self, ac_lane **out);
    void (*lane_close)(void *self, ac_lane *lane);
    /* CPU: each thread that works for this lane gets this much scratch before the next run. */
    ac_status (*lane_reserve)(void *self, ac_lane *lane, size_t worker_scratch);
    /* Ordered in the lane; upload and download may return before they are done. */
    ac_status (*upload)(void *self, ac_lane *lane, void *to, const void *from, size_t bytes);
    ac_status (*download)(void *self, ac_lane *lane, void *to, const void *from, size_t bytes);
    ac_status (*copy)(void *self, ac_lane *lane, void *to, const void *from, size_t bytes);
    ac_status (*sync)(void *self, ac_lane *lane);
    /* Waits for a stream, and for all of the device where none is given; NULL where a launch
     * returns when its work is done. */
    ac_status (*wait)(void *self, ac_stream stream);
    /* Streams; all NULL where a launch returns when its work is done (CPU, null).
     * follow: the lane's work from now on is in the order of `stream`, and after what the lane did
     * elsewhere before its last mark.  mark: ends a run.  wait: the lane's work from now on comes
     * after the other lane's last mark. */
    ac_status (*lane_follow)(void *self, ac_lane *lane, ac_stream stream);
    ac_status (*lane_mark)(void *self, ac_lane *lane);
    ac_status (*lane_wait)(void *self, ac_lane *lane, const ac_lane *other);
    /* A point in a lane's work that the host can wait for; NULL with the three above. */
    ac_status (*event_new)(void *self, ac_event **out);
    void (*event_free)(void *self, ac_event *event);
    ac_status (*event_record)(void *self, ac_lane *lane, ac_event *event);
    ac_status (*event_wait)(void *self, ac_event *event);
    /* Launches one phase of a sampler's step; sampler.h. */
    ac_status (*sampler)(void *self, ac_lane *lane, const ac_sampler_job *job,
                         ac_sampler_phase phase);
    /* A row's tail as one launch: the last convolution of the UNet, APPLY on what it gives, and
     * SCALE for the next row.  fits: whether it is there for this convolution, as planned, and this
     * job.  Both NULL: for none. */
    bool (*tail_fits)(const ac_caps *caps, const ac_problem *conv, const ac_sampler_job *job);
    ac_status (*tail)(void *self, ac_lane *lane, const ac_problem *conv, const void *prepared,
                      const ac_sampler_job *job);
    /* Recording of launches for replay; all NULL where there is none (CPU, null).  What is
     * launched in between does not run; a failed launch still takes its record_end. */
    ac_status (*record_begin)(void *self, ac_lane *lane);
    ac_status (*record_end)(void *self, ac_lane *lane, ac_recording **out);
    ac_status (*replay)(void *self, ac_lane *lane, ac_recording *recording);
    void (*record_free)(void *self, ac_recording *recording);

    /* Points in time in a lane, by number from 0; inside a recording each replay takes them anew
     * (a number's first use must be outside).  read: waits, then ms[i] from mark i to mark i+1.
     * NULL where a launch returns when its work is done: the host's clock serves. */
    ac_status (*time_mark)(void *self, ac_lane *lane, int32_t index);
    ac_status (*time_read)(void *self, ac_lane *lane, int32_t count, double *ms);

    bool host_memory;   /* device memory is host memory: weights and inputs need no copy */
} ac_backend;

/* A backend's lane with the arena that all plans running on it share.  One run at a time. */
typedef struct ac_device_lane {
    ac_lane *lane;
    void *arena;        /* device memory, as large as the largest plan that ran here needs */
    size_t arena_bytes;
    uint64_t arena_id;  /* another one each time the arena moves: recordings hold addresses */
    bool busy;
    struct ac_device_lane *next;
} ac_device_lane;

/* An allocator of device memory that is not the backend's: PyTorch's.  Called by any thread, under
 * locks of the engine: it must not wait for one that a caller of the engine may hold, as the GIL.
 */
typedef struct ac_memory {
    /* *handle is what free takes; the memory is what it was promised to be only after what is in
     * *stream now. */
    ac_status (*alloc)(void *self, int32_t index, size_t bytes, void **out, void **handle,
                       void **stream);
    void (*free)(void *handle);
    void *self; /* outlives the process */
} ac_memory;

typedef struct ac_blocks ac_blocks; /* device_memory.c's */

typedef struct ac_device {
    const ac_backend *backend;
    void *self;
    ac_caps caps;
    int32_t index, references;
    ac_device_lane *lanes; /* as many as there were runs at once */
    ac_blocks *blocks;     /* NULL: all memory is the backend's; set once, atomically */
} ac_device;

/* "cpu", "null", "cuda", "cuda:1".  Refcounted; the same name gives the same device. */
ac_status ac_device_open(const char *name, ac_device **out);
/* Another backend under its own name, for tests; before its first device is opened. */
void ac_device_add_backend(const ac_backend *backend);
ac_device *ac_device_ref(ac_device *device);
void ac_device_unref(ac_device *device);

/* Memory for what the engine keeps on the device; aligned as the backend's. */
ac_status ac_device_alloc(ac_device *device, size_t bytes, void **out);
/* To where it came from, after all that was queued on the device. */
void ac_device_free(ac_device *device, void *memory);
/* Memory is from there from now on.  The first one stays; a device of host memory needs none. */
ac_status ac_device_set_memory(ac_device *device, const ac_memory *memory);
void ac_device_free_blocks(ac_device *device); /* device.c's, at the end */

/* A free lane for the caller alone, the preferred one if it is free (NULL: any); a new one when
 * all are busy.  Give it back when the run is over. */
ac_status ac_device_lane_take(ac_device *device, ac_device_lane *preferred, ac_device_lane **out);
void ac_device_lane_give(ac_device *device, ac_device_lane *lane);
/* Makes the lane's arena and its threads' scratch at least this large.  Not on the run path. */
ac_status ac_device_lane_reserve(ac_device *device, ac_device_lane *lane, size_t arena,
                                 size_t worker_scratch);
/* Frees the arena of a lane that the caller has taken. */
void ac_device_lane_shrink(ac_device *device, ac_device_lane *lane);
/* Frees the arenas of all lanes that nobody has taken (offload). */
void ac_device_trim(ac_device *device);
/* Frees the largest of these where it is smaller than `arena`, so that an allocator that keeps
 * memory can give it back before a run asks for more.  Returns its bytes, or 0. */
size_t ac_device_make_room(ac_device *device, size_t arena);

/* What is queued in stream `after` from now on comes after all that is in stream `before` now. */
ac_status ac_device_order(ac_device *device, ac_stream before, ac_stream after);
/* Device memory to the host, after all that is in the stream now; waits for it. */
ac_status ac_device_read(ac_device *device, ac_stream stream, void *to, const void *from,
                         size_t bytes);

/* The backends that are linked in. */
extern const ac_backend ac_backend_cpu, ac_backend_null;

/* Log line, printed on stderr when ACCEL_LOG is at least `level` (1 warnings, 2 plans, 3 all). */
void ac_log(int level, const char *format, ...) AC_PRINTF(2, 3);

#endif
