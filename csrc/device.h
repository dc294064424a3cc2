/* device: the contract a backend meets, and the opened device the engine uses.
 *
 * Adding a backend: one device file and one kernel folder, both in kernels/<name>/, and one line
 * in device.c.  A backend in another library (CUDA) gets what it needs of the host through
 * ac_host, because it cannot see the engine's symbols.
 */
#ifndef AC_DEVICE_H
#define AC_DEVICE_H

#include "kernel.h"

#define AC_ABI 1 /* of ac_backend and everything it reaches; another number is refused */

typedef struct ac_host {
    uint32_t abi;
    void *(*alloc)(size_t bytes);
    void (*free)(void *memory);
    /* Sets the calling thread's message; returns status. */
    ac_status (*verror)(ac_status status, const char *format, va_list args);
    void (*log)(int level, const char *message);
} ac_host;

typedef struct ac_recording ac_recording;

typedef struct ac_backend {
    uint32_t abi;
    const char *name; /* "cpu", "cuda", "null" */
    const ac_kernel *const *kernels; /* ends with NULL */

    /* Opens device number `index`; *self is the backend's own state. */
    ac_status (*open)(int32_t index, void **self, ac_caps *caps);
    void (*close)(void *self);
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
    /* Recording of launches for replay; all NULL where there is none (CPU, null). */
    ac_status (*record_begin)(void *self, ac_lane *lane);
    ac_status (*record_end)(void *self, ac_lane *lane, ac_recording **out);
    ac_status (*replay)(void *self, ac_lane *lane, ac_recording *recording);
    void (*record_free)(void *self, ac_recording *recording);

    bool host_memory;   /* device memory is host memory: weights and inputs need no copy */
} ac_backend;

/* A backend's lane with the arena that all plans running on it share.  One run at a time. */
typedef struct ac_device_lane {
    ac_lane *lane;
    void *arena;        /* device memory, as large as the largest plan that ran here needs */
    size_t arena_bytes;
    bool busy;
    struct ac_device_lane *next;
} ac_device_lane;

typedef struct ac_device {
    const ac_backend *backend;
    void *self;
    ac_caps caps;
    int32_t index, references;
    ac_device_lane *lanes; /* as many as there were runs at once */
} ac_device;

/* "cpu", "null", "cuda", "cuda:1".  Refcounted; the same name gives the same device. */
ac_status ac_device_open(const char *name, ac_device **out);
ac_device *ac_device_ref(ac_device *device);
void ac_device_unref(ac_device *device);

/* A free lane for the caller alone, the preferred one if it is free (NULL: any); a new one when
 * all are busy.  Give it back when the run is over. */
ac_status ac_device_lane_take(ac_device *device, ac_device_lane *preferred, ac_device_lane **out);
void ac_device_lane_give(ac_device *device, ac_device_lane *lane);
/* Makes the lane's arena and its threads' scratch at least this large.  Not on the run path. */
ac_status ac_device_lane_reserve(ac_device *device, ac_device_lane *lane, size_t arena,
                                 size_t worker_scratch);

/* The backends that are linked in. */
extern const ac_backend ac_backend_cpu, ac_backend_null;

/* Log line, printed on stderr when ACCEL_LOG is at least `level` (1 warnings, 2 plans, 3 all). */
void ac_log(int level, const char *format, ...) AC_PRINTF(2, 3);

#endif
