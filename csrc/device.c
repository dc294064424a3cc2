/* device: opens backends by name, once each, and logs.
 *
 * The CUDA backend is another library; it is opened on the first use of a GPU (cuda_library). */
#include "device.h"

#include "backend_cuda.h"
#include "lock.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const ac_backend *added; /* a test's, or NULL */
static ac_device *opened[16]; /* a device goes when its last reference does */

void
ac_log(int level, const char *format, ...)
{
    const char *wanted = getenv("ACCEL_LOG");
    if (!wanted || atoi(wanted) < level) {
        return;
    }
    va_list args;
    va_start(args, format);
    fputs("accel: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
}

void
ac_device_add_backend(const ac_backend *backend)
{
    added = backend;
}

/* "cuda:1" -> backend and 1. */
static ac_status
parse_name(const char *name, const ac_backend **backend, int32_t *index)
{
    const char *colon = strchr(name, ':');
    size_t length = colon ? (size_t)(colon - name) : strlen(name);
    *index = 0;
    if (colon) {
        char *end;
        long value = strtol(colon + 1, &end, 10);
        if (end == colon + 1 || *end || value < 0 || value > 1023) {
            return ac_error(AC_E_INVALID, "device: found \"%.64s\", expected a number up to 1023 "
                                          "after the colon, as in \"cuda:1\"", name);
        }
        *index = (int32_t)value;
    }
    if (length == 3 && memcmp(name, "cpu", 3) == 0) {
        *backend = &ac_backend_cpu;
    } else if (length == 4 && memcmp(name, "null", 4) == 0) {
        *backend = &ac_backend_null;
    } else if (added && strlen(added->name) == length && memcmp(name, added->name, length) == 0) {
        *backend = added;
    } else if (length == 4 && memcmp(name, "cuda", 4) == 0) {
        return ac_backend_cuda_load(backend);
    } else {
        return ac_error(AC_E_INVALID, "device: found \"%.64s\", expected \"cpu\", \"cuda\" or "
                                      "\"cuda:<n>\"", name);
    }
    return AC_OK;
}

static ac_status
open_new(const ac_backend *backend, int32_t index, int32_t slot, ac_device **out)
{
    ac_device *device = ac_calloc(1, sizeof *device);
    if (!device) {
        return ac_no_memory(sizeof *device);
    }
    *device = (ac_device){.backend = backend, .index = index, .references = 1};
    ac_status status = backend->open(index, &device->self, &device->caps);
    if (status < 0) {
        ac_free(device);
        return status;
    }
    opened[slot] = device;
    *out = device;
    return AC_OK;
}

static ac_status
open_locked(const ac_backend *backend, int32_t index, ac_device **out)
{
    int32_t slot = -1;
    for (int32_t i = 0; i < (int32_t)AC_ARRAY_LEN(opened); i++) {
        if (!opened[i]) {
            slot = i;
        } else if (opened[i]->backend == backend && opened[i]->index == index) {
            opened[i]->references++;
            *out = opened[i];
            return AC_OK;
        }
    }
    if (slot < 0) {
        return ac_error(AC_E_DEVICE, "device: %zu devices are open, which is the most",
                        AC_ARRAY_LEN(opened));
    }
    return open_new(backend, index, slot, out);
}

ac_status
ac_device_open(const char *name, ac_device **out)
{
    const ac_backend *backend;
    int32_t index;
    ac_lock(&lock);
    ac_status status = parse_name(name, &backend, &index);
    if (status == AC_OK) {
        status = open_locked(backend, index, out);
    }
    ac_unlock(&lock);
    return status;
}

ac_device *
ac_device_ref(ac_device *device)
{
    ac_lock(&lock);
    device->references++;
    ac_unlock(&lock);
    return device;
}

static void
free_lane(ac_device *device, ac_device_lane *lane)
{
    ac_device_lane_shrink(device, lane);
    device->backend->lane_close(device->self, lane->lane);
    ac_free(lane);
}

void
ac_device_unref(ac_device *device)
{
    if (!device) {
        return;
    }
    ac_lock(&lock);
    bool last = --device->references == 0;
    for (size_t i = 0; last && i < AC_ARRAY_LEN(opened); i++) {
        if (opened[i] == device) {
            opened[i] = NULL;
        }
    }
    ac_unlock(&lock);
    if (!last) {
        return;
    }
    while (device->lanes) {
        ac_device_lane *lane = device->lanes;
        device->lanes = lane->next;
        free_lane(device, lane);
    }
    device->backend->close(device->self);
    ac_device_free_blocks(device);
    ac_free(device);
}

/* ---- lanes ----------------------------------------------------------------------------------- */

static ac_status
new_lane(ac_device *device, ac_device_lane **out)
{
    ac_device_lane *lane = ac_calloc(1, sizeof *lane);
    if (!lane) {
        return ac_no_memory(sizeof *lane);
    }
    ac_status status = device->backend->lane_open(device->self, &lane->lane);
    if (status < 0) {
        ac_free(lane);
        return status;
    }
    lane->busy = true;
    lane->next = device->lanes;
    device->lanes = lane;
    *out = lane;
    return AC_OK;
}

ac_status
ac_device_lane_take(ac_device *device, ac_device_lane *preferred, ac_device_lane **out)
{
    ac_lock(&lock);
    ac_device_lane *found = preferred && !preferred->busy ? preferred : NULL;
    for (ac_device_lane *lane = device->lanes; lane && !found; lane = lane->next) {
        found = lane->busy ? NULL : lane;
    }
    ac_status status = AC_OK;
    if (found) {
        found->busy = true;
        *out = found;
    } else {
        status = new_lane(device, out);
    }
    ac_unlock(&lock);
    return status;
}

void
ac_device_lane_give(ac_device *device, ac_device_lane *lane)
{
    (void)device;
    ac_lock(&lock);
    lane->busy = false;
    ac_unlock(&lock);
}

ac_status
ac_device_lane_reserve(ac_device *device, ac_device_lane *lane, size_t arena,
                       size_t worker_scratch)
{
    static _Atomic uint64_t ids;
    if (device->backend->lane_reserve) {
        AC_TRY(device->backend->lane_reserve(device->self, lane->lane, worker_scratch));
    }
    if (arena <= lane->arena_bytes) {
        return AC_OK;
    }
    /* Freed first: the peak stays that of the larger plan alone. */
    ac_device_lane_shrink(device, lane);
    AC_TRY(ac_device_alloc(device, arena, &lane->arena));
    lane->arena_bytes = arena;
    lane->arena_id = atomic_fetch_add(&ids, 1) + 1;
    return AC_OK;
}

void
ac_device_lane_shrink(ac_device *device, ac_device_lane *lane)
{
    if (lane->arena) {
        ac_device_free(device, lane->arena);
    }
    lane->arena = NULL;
    lane->arena_bytes = 0;
    lane->arena_id = 0;
}

/* Frees the largest arena that nobody has taken, if it is smaller than this; returns its bytes.
 * Not under the lock: the device is waited for, and its allocator may wait for Python. */
static size_t
shrink_largest(ac_device *device, size_t below)
{
    ac_device_lane *largest = NULL;
    ac_lock(&lock);
    for (ac_device_lane *lane = device->lanes; lane; lane = lane->next) {
        if (!lane->busy && (!largest || lane->arena_bytes > largest->arena_bytes)) {
            largest = lane;
        }
    }
    size_t bytes = largest && largest->arena_bytes < below ? largest->arena_bytes : 0;
    if (bytes) {
        largest->busy = true;
    }
    ac_unlock(&lock);
    if (bytes) {
        ac_device_lane_shrink(device, largest);
        ac_device_lane_give(device, largest);
    }
    return bytes;
}

void
ac_device_trim(ac_device *device)
{
    while (shrink_largest(device, SIZE_MAX)) {
    }
}

size_t
ac_device_make_room(ac_device *device, size_t arena)
{
    return shrink_largest(device, arena);
}

/* ---- for what is no run ---------------------------------------------------------------------- */

/* A lane of its own: one of the device's would get an arena sooner or later. */
static ac_status
open_aside(ac_device *device, ac_stream stream, ac_lane **out)
{
    const ac_backend *backend = device->backend;
    AC_TRY(backend->lane_open(device->self, out));
    ac_status status = AC_OK;
    if (backend->lane_follow) {
        status = backend->lane_follow(device->self, *out, stream);
    }
    if (status < 0) {
        backend->lane_close(device->self, *out);
    }
    return status;
}

ac_status
ac_device_order(ac_device *device, ac_stream before, ac_stream after)
{
    const ac_backend *backend = device->backend;
    ac_lane *lane;
    if (!backend->lane_follow || before.handle == after.handle) {
        return AC_OK;
    }
    AC_TRY(open_aside(device, before, &lane));
    ac_status status = backend->lane_mark(device->self, lane);
    if (status == AC_OK) {
        status = backend->lane_follow(device->self, lane, after); /* waits for the mark */
    }
    backend->lane_close(device->self, lane);
    return status;
}

ac_status
ac_device_read(ac_device *device, ac_stream stream, void *to, const void *from, size_t bytes)
{
    const ac_backend *backend = device->backend;
    ac_lane *lane;
    AC_TRY(open_aside(device, stream, &lane));
    ac_status status = backend->download(device->self, lane, to, from, bytes);
    if (status == AC_OK) {
        status = backend->sync(device->self, lane);
    }
    backend->lane_close(device->self, lane);
    return status;
}
