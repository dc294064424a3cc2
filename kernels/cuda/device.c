/* device: the CUDA backend behind ac_backend_cuda, the library's only exported symbol.
 *
 * Every entry point enters the device it works on and leaves it (context.c).
 */
#include "context.h"
#include "library.h"
#include "recording.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ac_event {
    cudaEvent_t event;
};

ac_cuda_libraries **
ac_cuda_libraries_slot(const ac_lane *lane)
{
    return &lane->device->libraries;
}

/* ---- life ------------------------------------------------------------------------------------ */

static ac_status
no_device(cudaError_t status)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int driver = 0, runtime = 0;
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: no NVIDIA driver was found on this machine "
                                         "(libcuda.so.1), expected one for CUDA %d.0 or later",
                            runtime / 1000);
    }
    if (status == cudaErrorInsufficientDriver || driver < runtime / 1000 * 1000) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: found a driver for CUDA %d.%d, expected one for "
                                         "%d.0 or later; update the driver, or build accel with "
                                         "an older nvcc",
                            driver / 1000, driver % 1000 / 10, runtime / 1000);
    }
    if (status == cudaErrorNoDevice) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: the driver (CUDA %d.%d) found no GPU%s%.80s",
                            driver / 1000, driver % 1000 / 10,
                            visible ? "; CUDA_VISIBLE_DEVICES is " : "", visible ? visible : "");
    }
    return ac_cuda_check(status, "cudaGetDeviceCount");
}

/* ACCEL_FORCE_ARCH=75 restricts the choice of kernels to what sm_75 has. */
static int
allowed_arch(int arch)
{
    const char *text = getenv("ACCEL_FORCE_ARCH");
    int forced = text ? atoi(text) : 0;
    return forced > 0 && forced < arch ? forced : arch;
}

/* Measured with cuBLASLt, cuDNN and a copy; f32 without TF32 is computed from the clock. */
static const struct {
    const char *name;
    double half_flops, float_flops, bandwidth;
} measured[] = {
    {"NVIDIA H200", 790e12, 60e12, 4.3e12},
};

/* FLOPs of a multiprocessor in a clock, dense, from NVIDIA's descriptions of its architectures:
 * f16 on tensor cores, f32.  Cards for games do half of the first with sums in f32. */
static const struct {
    int arch;
    double half_flops, float_flops;
} per_clock[] = {
    {75, 1024, 128}, {80, 2048, 128}, {86, 1024, 256},  {89, 1024, 256},
    {90, 4096, 256}, {100, 8192, 256}, {120, 1024, 256},
};

/* What the card's description promises; nothing where it does not say. */
static void
compute_peaks(int32_t index, int arch, ac_caps *caps)
{
    int core_khz, memory_khz, bus_bits;
    if (cudaDeviceGetAttribute(&core_khz, cudaDevAttrClockRate, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, index) != cudaSuccess) {
        cudaGetLastError(); /* not the next launch's */
        return;
    }
    caps->bandwidth = 2.0 * 1e3 * memory_khz * bus_bits / 8.0; /* two transfers a clock */
    for (size_t i = 0; i < AC_ARRAY_LEN(per_clock) && per_clock[i].arch <= arch; i++) {
        double clocks = 1e3 * core_khz * caps->workers;
        caps->half_flops = clocks * per_clock[i].half_flops;
        caps->float_flops = clocks * per_clock[i].float_flops;
    }
}

static ac_status
read_peaks(int32_t index, int arch, ac_caps *caps)
{
    struct cudaDeviceProp properties;
    compute_peaks(index, arch, caps);
    AC_CUDA(cudaGetDeviceProperties(&properties, index));
    for (size_t i = 0; i < AC_ARRAY_LEN(measured); i++) {
        if (strncmp(properties.name, measured[i].name, strlen(measured[i].name)) == 0) {
            caps->half_flops = measured[i].half_flops;
            caps->float_flops = measured[i].float_flops;
            caps->bandwidth = measured[i].bandwidth;
        }
    }
    return AC_OK;
}

static ac_status
read_caps(int32_t index, ac_caps *caps)
{
    int major, minor, processors;
    AC_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    AC_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    AC_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    int arch = major * 10 + minor;
    int allowed = allowed_arch(arch);
    *caps = (ac_caps){.isa = allowed, .workers = processors, .tf32 = allowed >= 80};
    return read_peaks(index, arch, caps);
}

static ac_status
cuda_open(int32_t index, void **self, ac_caps *caps)
{
    int count = 0;
    cudaError_t found = cudaGetDeviceCount(&count);
    if (found != cudaSuccess) {
        return no_device(found);
    }
    if (index >= count) {
        return ac_cuda_fail(AC_E_DEVICE, "device: found \"cuda:%d\", expected \"cuda:0\"%s: this "
                                         "machine has %d GPU%s", index,
                            count > 1 ? " and up" : "", count, count > 1 ? "s" : "");
    }
    AC_TRY(ac_cuda_check_lost(index));
    AC_TRY(read_caps(index, caps));
    ac_cuda_device *device = ac_cuda_host->alloc(sizeof *device);
    if (!device) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                            sizeof *device);
    }
    const char *sync = getenv("ACCEL_SYNC");
    *device = (ac_cuda_device){.index = index, .sync = sync && strcmp(sync, "1") == 0};
    ac_status status = ac_cuda_context_open(device);
    if (status < 0) {
        ac_cuda_host->free(device);
        return status;
    }
    *self = device;
    return AC_OK;
}

static void
cuda_close(void *self)
{
    ac_cuda_device *device = self;
    int previous;
    if (ac_cuda_device_enter(device, &previous) == AC_OK) { /* what a lost device had stays */
        ac_cuda_libraries_free(device->libraries);
        ac_cuda_device_leave(device, previous, AC_OK);
    }
    ac_cuda_host->free(device);
}

static void
cuda_failed(void *self, const char *message)
{
    const ac_cuda_device *device = self;
    ac_cuda_keep_message(device->index, message);
}

/* What a user asks about: the GPU and the driver, the libraries; `warning`: one that is missed. */
static bool
cuda_describe(void *self, int32_t line, bool *warning, char *text, size_t size)
{
    const ac_cuda_device *device = self;
    struct cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    *warning = false;
    switch (line) {
    case 0:
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (cudaGetDeviceProperties(&properties, device->index) != cudaSuccess) {
            cudaGetLastError();
            return false;
        }
        snprintf(text, size, "%.60s, %.1f GB, driver for CUDA %d.%d, runtime %d.%d",
                 properties.name, (double)properties.totalGlobalMem / 1e9, driver / 1000,
                 driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
        return true;
    case 1:
        *warning = !ac_cuda_describe_blas(text, size);
        return true;
    case 2:
        *warning = !ac_cuda_describe_dnn(text, size);
        return true;
    default:
        return false;
    }
}

/* ---- memory ---------------------------------------------------------------------------------- */

static ac_status
allocate(size_t bytes, void **out)
{
    cudaError_t status = cudaMalloc(out, bytes ? bytes : 1); /* cudaMalloc(0) gives no address */
    if (status != cudaErrorMemoryAllocation) {
        return ac_cuda_check(status, "cudaMalloc");
    }
    char text[64];
    cudaGetLastError();
    snprintf(text, sizeof text, "%zu bytes were asked for", bytes);
    return ac_cuda_no_memory(text);
}

static ac_status
cuda_alloc(void *self, size_t bytes, void **out)
{
    int previous;
    *out = NULL;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    return ac_cuda_device_leave(self, previous, allocate(bytes, out));
}

static void
cuda_free(void *self, void *memory)
{
    int previous;
    if (ac_cuda_device_begin(self, &previous)) {
        cudaFree(memory);
        ac_cuda_device_end(self, previous);
    }
}

static ac_status
move(ac_cuda_device *device, ac_lane *lane, void *to, const void *from, size_t bytes,
     enum cudaMemcpyKind kind, const char *call)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(device, &previous));
    cudaError_t status = cudaMemcpyAsync(to, from, bytes, kind, lane->stream);
    return ac_cuda_device_leave(device, previous, ac_cuda_check(status, call));
}

static ac_status
cuda_upload(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    return move(self, lane, to, from, bytes, cudaMemcpyHostToDevice, "upload");
}

static ac_status
cuda_download(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    return move(self, lane, to, from, bytes, cudaMemcpyDeviceToHost, "download");
}

static ac_status
cuda_copy(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    return move(self, lane, to, from, bytes, cudaMemcpyDeviceToDevice, "copy");
}

/* ---- lanes ----------------------------------------------------------------------------------- */

static cudaError_t
open_lane(ac_lane *lane)
{
    cudaError_t status = cudaStreamCreateWithFlags(&lane->own, cudaStreamNonBlocking);
    if (status != cudaSuccess) {
        return status;
    }
    status = cudaEventCreateWithFlags(&lane->last, cudaEventDisableTiming);
    if (status != cudaSuccess) {
        cudaStreamDestroy(lane->own);
    }
    lane->stream = lane->own;
    return status;
}

static ac_status
cuda_lane_open(void *self, ac_lane **out)
{
    int previous;
    ac_lane *lane = ac_cuda_host->alloc(sizeof *lane);
    if (!lane) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for", sizeof *lane);
    }
    *lane = (ac_lane){.device = self};
    ac_status status = ac_cuda_device_enter(self, &previous);
    if (status == AC_OK) {
        status = ac_cuda_check(open_lane(lane), "cudaStreamCreateWithFlags");
        status = ac_cuda_device_leave(self, previous, status);
    }
    if (status < 0) {
        ac_cuda_host->free(lane);
        return status;
    }
    *out = lane;
    return AC_OK;
}

static void
cuda_lane_close(void *self, ac_lane *lane)
{
    int previous;
    if (ac_cuda_device_begin(self, &previous)) {
        for (int32_t i = 0; i < lane->n_times; i++) {
            cudaEventDestroy(lane->times[i]);
        }
        cudaEventDestroy(lane->last);
        cudaStreamDestroy(lane->own);
        ac_cuda_device_end(self, previous);
    }
    ac_cuda_host->free(lane->times);
    ac_cuda_host->free(lane);
}

/* The event, not the old stream: that one is the caller's and may be gone. */
static ac_status
move_lane(ac_lane *lane, cudaStream_t wanted)
{
    if (lane->marked) {
        AC_CUDA(cudaStreamWaitEvent(wanted, lane->last, 0));
    }
    lane->stream = wanted;
    return AC_OK;
}

/* What is captured is replayed when the lane's memory may be elsewhere or gone.  The lane leaves
 * that stream: waiting for it would end the capture. */
static ac_status
check_capture(ac_lane *lane, cudaStream_t wanted)
{
    enum cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
    AC_CUDA(cudaStreamIsCapturing(wanted, &state));
    if (state == cudaStreamCaptureStatusNone) {
        return AC_OK;
    }
    if (lane->stream == wanted) {
        AC_TRY(move_lane(lane, lane->own));
    }
    return ac_cuda_fail(AC_E_UNSUPPORTED, "cuda: found a stream that is being captured, expected "
                                          "one that runs: the engine records by itself");
}

static ac_status
cuda_lane_follow(void *self, ac_lane *lane, ac_stream stream)
{
    int previous;
    cudaStream_t wanted = stream.given ? (cudaStream_t)stream.handle : lane->own;
    bool callers = wanted && wanted != lane->own; /* the legacy stream cannot be captured */
    if (wanted == lane->stream && !callers) { /* every run begins here: a lost device says so */
        return ac_cuda_check_lost(lane->device->index);
    }
    AC_TRY(ac_cuda_device_enter(self, &previous));
    ac_status status = callers ? check_capture(lane, wanted) : AC_OK;
    if (status == AC_OK && wanted != lane->stream) {
        status = move_lane(lane, wanted);
    }
    return ac_cuda_device_leave(self, previous, status);
}

static ac_status
cuda_lane_mark(void *self, ac_lane *lane)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaEventRecord(lane->last, lane->stream);
    if (status == cudaSuccess) { /* other lanes look */
        __atomic_store_n(&lane->marked, true, __ATOMIC_RELEASE);
    }
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaEventRecord"));
}

static ac_status
cuda_lane_wait(void *self, ac_lane *lane, const ac_lane *other)
{
    int previous;
    if (!__atomic_load_n(&other->marked, __ATOMIC_ACQUIRE)) {
        return AC_OK;
    }
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaStreamWaitEvent(lane->stream, other->last, 0);
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaStreamWaitEvent"));
}

static ac_status
cuda_event_new(void *self, ac_event **out)
{
    int previous;
    ac_event *event = ac_cuda_host->alloc(sizeof *event);
    if (!event) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for", sizeof *event);
    }
    ac_status status = ac_cuda_device_enter(self, &previous);
    if (status == AC_OK) {
        cudaError_t made = cudaEventCreateWithFlags(&event->event, cudaEventDisableTiming |
                                                                    cudaEventBlockingSync);
        status = ac_cuda_check(made, "cudaEventCreateWithFlags");
        status = ac_cuda_device_leave(self, previous, status);
    }
    if (status < 0) {
        ac_cuda_host->free(event);
        return status;
    }
    *out = event;
    return AC_OK;
}

static void
cuda_event_free(void *self, ac_event *event)
{
    int previous;
    if (event && ac_cuda_device_begin(self, &previous)) {
        cudaEventDestroy(event->event);
        ac_cuda_device_end(self, previous);
    }
    ac_cuda_host->free(event);
}

static ac_status
cuda_event_record(void *self, ac_lane *lane, ac_event *event)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaEventRecord(event->event, lane->stream);
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaEventRecord"));
}

static ac_status
cuda_event_wait(void *self, ac_event *event)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaEventSynchronize(event->event);
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaEventSynchronize"));
}

static ac_status
cuda_sync(void *self, ac_lane *lane)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = cudaStreamSynchronize(lane->stream);
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "cudaStreamSynchronize"));
}

static ac_status
cuda_wait(void *self, ac_stream stream)
{
    int previous;
    AC_TRY(ac_cuda_device_enter(self, &previous));
    cudaError_t status = stream.given ? cudaStreamSynchronize((cudaStream_t)stream.handle)
                                      : ac_cuda_wait_for_device();
    return ac_cuda_device_leave(self, previous, ac_cuda_check(status, "wait"));
}

/* ---- the exported symbol --------------------------------------------------------------------- */

__attribute__((visibility("default"))) ac_status
ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out);

ac_status
ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out)
{
    out->abi = AC_ABI; /* nothing else of another build's structures is where this one has it */
    if (abi != AC_ABI) {
        return AC_E_DEVICE; /* the caller says it */
    }
    ac_cuda_host = host;
    *out = (ac_backend){
        .abi = AC_ABI,
        .name = "cuda",
        .kernels = ac_cuda_kernels,
        .open = cuda_open,
        .close = cuda_close,
        .failed = cuda_failed,
        .describe = cuda_describe,
        .alloc = cuda_alloc,
        .free = cuda_free,
        .lane_open = cuda_lane_open,
        .lane_close = cuda_lane_close,
        .upload = cuda_upload,
        .download = cuda_download,
        .copy = cuda_copy,
        .sync = cuda_sync,
        .wait = cuda_wait,
        .sampler = ac_cuda_sampler,
        .tail_fits = ac_cuda_tail_fits,
        .tail = ac_cuda_tail,
        .lane_follow = cuda_lane_follow,
        .lane_mark = cuda_lane_mark,
        .lane_wait = cuda_lane_wait,
        .event_new = cuda_event_new,
        .event_free = cuda_event_free,
        .event_record = cuda_event_record,
        .event_wait = cuda_event_wait,
        .time_mark = ac_cuda_time_mark,
        .time_read = ac_cuda_time_read,
        .record_begin = ac_cuda_record_begin,
        .record_end = ac_cuda_record_end,
        .replay = ac_cuda_replay,
        .record_free = ac_cuda_record_free,
    };
    return AC_OK;
}
