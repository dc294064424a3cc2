/* context: errors, the current context, and losing a device.
 *
 * There is no "current device" in the engine.  Every entry point makes its device's context current
 * and takes it away again, by the driver's stack of contexts: cudaSetDevice(previous) would make a
 * context, some 500 MB, on a device that the caller never used, and forget a context that is not
 * the device's primary one.
 *
 * Our CUDA runtime is linked statically, so the errors that it remembers are ours alone to clear;
 * a caller's (PyTorch's) are in another runtime.  After an error that ends a context every call
 * gives that error: whoever leaves with one looks, and from then on the device's first message is
 * the answer to everything.
 */
#include "context.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

const ac_host *ac_cuda_host;

/* ---- errors ---------------------------------------------------------------------------------- */

ac_status
ac_cuda_fail(ac_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    status = ac_cuda_host->verror(status, format, args);
    va_end(args);
    return status;
}

ac_status
ac_cuda_no_memory(const char *what)
{
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    return ac_cuda_fail(AC_E_MEMORY, "cuda: out of memory: %s, %zu of %zu bytes are free", what,
                        free_bytes, total);
}

ac_status
ac_cuda_check(cudaError_t status, const char *call)
{
    if (status == cudaSuccess) {
        return AC_OK;
    }
    cudaGetLastError(); /* or the next launch takes it for its own */
    if (status == cudaErrorMemoryAllocation) {
        return ac_cuda_no_memory(call);
    }
    return ac_cuda_fail(AC_E_DEVICE, "cuda: %s: %s (%s)", call, cudaGetErrorString(status),
                        cudaGetErrorName(status));
}

/* ---- a lost device --------------------------------------------------------------------------- */

/* A process has one context a device, and it stays lost: longer than an ac_cuda_device lives. */
static struct loss {
    int lost; /* atomic; `first` is set */
    bool told; /* `first` is the message of a whole run */
    char first[900];
} losses[64];

static pthread_mutex_t loss_lock = PTHREAD_MUTEX_INITIALIZER;

static struct loss *
loss_of(int32_t index)
{
    return &losses[AC_MIN(index, (int32_t)AC_ARRAY_LEN(losses) - 1)];
}

ac_status
ac_cuda_check_lost(int32_t index)
{
    struct loss *l = loss_of(index);
    if (!__atomic_load_n(&l->lost, __ATOMIC_ACQUIRE)) {
        return AC_OK;
    }
    pthread_mutex_lock(&loss_lock);
    ac_cuda_fail(AC_E_DEVICE, "%s", l->first);
    pthread_mutex_unlock(&loss_lock);
    return AC_E_DEVICE;
}

/* Free memory can be asked for at any time, but not of a dead context. */
static ac_status
look_for_loss(ac_cuda_device *device, ac_status status)
{
    struct loss *l = loss_of(device->index);
    size_t free_bytes, total;
    cudaError_t now = cudaMemGetInfo(&free_bytes, &total);
    cudaGetLastError();
    if (now == cudaSuccess || ac_cuda_is_of_recording(now)) {
        return status;
    }
    pthread_mutex_lock(&loss_lock);
    if (!l->lost) {
        snprintf(l->first, sizeof l->first,
                 "cuda:%d is lost until this process ends: %.600s%s", device->index,
                 ac_cuda_host->message(),
                 device->sync ? "" : "; it shows late: ACCEL_SYNC=1 names the step that did it");
        __atomic_store_n(&l->lost, 1, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&loss_lock);
    return ac_cuda_check_lost(device->index);
}

void
ac_cuda_keep_message(int32_t index, const char *message)
{
    struct loss *l = loss_of(index);
    pthread_mutex_lock(&loss_lock);
    if (l->lost && !l->told && strlen(message) < sizeof l->first && strstr(message, l->first)) {
        memmove(l->first, message, strlen(message) + 1);
        l->told = true;
    }
    pthread_mutex_unlock(&loss_lock);
}

/* ---- the current context --------------------------------------------------------------------- */

#define ENTRY_POINTS(X)                                                                            \
    X(get, cuCtxGetCurrent, "cuCtxGetCurrent")                                                     \
    X(set, cuCtxSetCurrent, "cuCtxSetCurrent")                                                     \
    X(push, cuCtxPushCurrent, "cuCtxPushCurrent_v2")                                               \
    X(pop, cuCtxPopCurrent, "cuCtxPopCurrent_v2")

static struct driver {
    bool found;
#define X(field, function, symbol) __typeof__(function) *field;
    ENTRY_POINTS(X)
#undef X
} driver;

static pthread_once_t driver_once = PTHREAD_ONCE_INIT;

/* The runtime has opened it under this name; it stays open. */
static void
find_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    driver.found = library != NULL;
#define X(field, function, symbol)                                                                 \
    *(void **)&driver.field = library ? dlsym(library, symbol) : NULL;                             \
    driver.found = driver.found && driver.field;
    ENTRY_POINTS(X)
#undef X
}

static ac_status
check_driver(CUresult status, const char *call)
{
    if (status == CUDA_SUCCESS) {
        return AC_OK;
    }
    if (status == CUDA_ERROR_NOT_INITIALIZED) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: found a process forked from one that used a GPU, "
                                         "expected a new one: CUDA does not survive fork; start "
                                         "workers by \"spawn\"");
    }
    return ac_cuda_fail(AC_E_DEVICE, "cuda: %s: CUDA's driver gave error %d", call, (int)status);
}

static CUresult
make_current(const ac_cuda_device *device, int *previous)
{
    CUcontext now = NULL;
    CUresult status = driver.get(&now);
    *previous = now != device->context;
    return status == CUDA_SUCCESS && *previous ? driver.push(device->context) : status;
}

bool
ac_cuda_device_begin(ac_cuda_device *device, int *previous)
{
    return make_current(device, previous) == CUDA_SUCCESS;
}

void
ac_cuda_device_end(ac_cuda_device *device, int previous)
{
    (void)device;
    CUcontext ours;
    if (previous) {
        driver.pop(&ours);
    }
}

ac_status
ac_cuda_device_enter(ac_cuda_device *device, int *previous)
{
    AC_TRY(ac_cuda_check_lost(device->index));
    return check_driver(make_current(device, previous), "making a context current");
}

ac_status
ac_cuda_device_leave(ac_cuda_device *device, int previous, ac_status status)
{
    if (status == AC_E_DEVICE) {
        status = look_for_loss(device, status);
    }
    ac_cuda_device_end(device, previous);
    return status;
}

ac_status
ac_cuda_enter(const ac_lane *lane, int *previous)
{
    return ac_cuda_device_enter(lane->device, previous);
}

ac_status
ac_cuda_leave(const ac_lane *lane, int previous, ac_status status)
{
    return ac_cuda_device_leave(lane->device, previous, status);
}

ac_status
ac_cuda_launched(const ac_lane *lane, cudaError_t status, const char *name)
{
    if (status == cudaSuccess && lane->device->sync && !lane->recording) {
        status = cudaStreamSynchronize(lane->stream);
    }
    return ac_cuda_check(status, name);
}

/* ---- opening --------------------------------------------------------------------------------- */

/* cudaErrorNoKernelImageForDevice, and what the driver says of PTX that it cannot compile. */
static ac_status
check_kernels(const ac_cuda_device *device)
{
    int major = 0, minor = 0;
    cudaError_t status = ac_cuda_probe();
    if (status == cudaSuccess || status == cudaErrorMemoryAllocation) {
        return ac_cuda_check(status, "loading a kernel");
    }
    cudaGetLastError();
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device->index);
    if (major > 0 && 10 * major + minor < 75) { /* no build of ours has code for it */
        return ac_cuda_fail(AC_E_DEVICE, "cuda:%d: found a GPU of compute capability %d.%d, "
                                         "expected 7.5 or later", device->index, major, minor);
    }
    return ac_cuda_fail(AC_E_DEVICE, "cuda:%d: found a GPU of compute capability %d.%d, expected "
                                     "one that this libaccel_cuda.so was built for (%s): %s (%s); "
                                     "install accel again with ACCEL_CUDA_ARCHS=%d%d",
                        device->index, major, minor, AC_CUDA_ARCHS, cudaGetErrorString(status),
                        cudaGetErrorName(status), major, minor);
}

static ac_status
open_current(ac_cuda_device *device)
{
    AC_CUDA(cudaSetDevice(device->index));
    AC_TRY(check_driver(driver.get(&device->context), "cuCtxGetCurrent"));
    return check_kernels(device);
}

ac_status
ac_cuda_context_open(ac_cuda_device *device)
{
    CUcontext before = NULL;
    pthread_once(&driver_once, find_driver);
    if (!driver.found) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: libcuda.so.1 lacks entry points; update the "
                                         "driver");
    }
    AC_TRY(check_driver(driver.get(&before), "cuCtxGetCurrent"));
    ac_status status = open_current(device);
    if (status == AC_E_DEVICE && device->context) {
        status = look_for_loss(device, status);
    }
    driver.set(before);
    return status;
}
