/* device: the CUDA backend behind ac_backend_cuda, the library's only exported symbol.
 *
 * Every entry point sets the device it works on and restores the caller's: there is no "current
 * device" in the engine.  Memory comes from the device's stream-ordered pool.
 */
#include "cuda.h"

#include <stdio.h>

typedef struct cuda_device {
    int32_t index;
} cuda_device;

const ac_host *ac_cuda_host;

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
ac_cuda_check(cudaError_t status, const char *call)
{
    if (status == cudaSuccess) {
        return AC_OK;
    }
    return ac_cuda_fail(status == cudaErrorMemoryAllocation ? AC_E_MEMORY : AC_E_DEVICE,
                        "cuda: %s: %s (%s)", call, cudaGetErrorString(status),
                        cudaGetErrorName(status));
}

/* Makes `index` current and tells what was. */
static ac_status
enter(int32_t index, int *previous)
{
    AC_CUDA(cudaGetDevice(previous));
    if (*previous != index) {
        AC_CUDA(cudaSetDevice(index));
    }
    return AC_OK;
}

static ac_status
leave(int32_t index, int previous, ac_status status)
{
    if (previous != index) {
        cudaError_t back = cudaSetDevice(previous);
        return status < 0 ? status : ac_cuda_check(back, "cudaSetDevice");
    }
    return status;
}

/* ---- life ------------------------------------------------------------------------------------ */

static ac_status
no_device(cudaError_t status)
{
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: no NVIDIA driver was found on this machine");
    }
    if (driver < runtime / 1000 * 1000) {
        return ac_cuda_fail(AC_E_DEVICE, "cuda: the driver is for CUDA %d.%d, expected %d.0 or "
                                         "later; update the driver", driver / 1000,
                            driver % 1000 / 10, runtime / 1000);
    }
    return ac_cuda_check(status, "cudaGetDeviceCount");
}

static ac_status
cuda_open(int32_t index, void **self, ac_caps *caps)
{
    int count = 0, major, minor, processors;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        return no_device(status);
    }
    if (index >= count) {
        return ac_cuda_fail(AC_E_DEVICE, "device: found \"cuda:%d\", expected 0 to %d: this "
                                         "machine has %d GPUs", index, count - 1, count);
    }
    AC_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    AC_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    AC_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    cuda_device *device = ac_cuda_host->alloc(sizeof *device);
    if (!device) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for",
                            sizeof *device);
    }
    *device = (cuda_device){.index = index};
    *caps = (ac_caps){.isa = major * 10 + minor, .workers = processors};
    *self = device;
    return AC_OK;
}

static void
cuda_close(void *self)
{
    ac_cuda_host->free(self);
}

/* ---- memory ---------------------------------------------------------------------------------- */

static ac_status
allocate(size_t bytes, void **out)
{
    cudaError_t status = cudaMalloc(out, bytes);
    if (status != cudaErrorMemoryAllocation) {
        return ac_cuda_check(status, "cudaMalloc");
    }
    size_t free_bytes = 0, total = 0;
    cudaGetLastError(); /* ours: the failed cudaMalloc */
    cudaMemGetInfo(&free_bytes, &total);
    return ac_cuda_fail(AC_E_MEMORY, "cuda: out of memory: %zu bytes were asked for, %zu of %zu "
                                     "are free", bytes, free_bytes, total);
}

static ac_status
cuda_alloc(void *self, size_t bytes, void **out)
{
    int previous, index = ((cuda_device *)self)->index;
    AC_TRY(enter(index, &previous));
    return leave(index, previous, allocate(bytes, out));
}

static void
cuda_free(void *self, void *memory)
{
    (void)self;
    cudaFree(memory);
}

static ac_status
cuda_upload(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    AC_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, lane->stream));
    return AC_OK;
}

static ac_status
cuda_download(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    AC_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, lane->stream));
    return AC_OK;
}

static ac_status
cuda_copy(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    AC_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, lane->stream));
    return AC_OK;
}

/* ---- lanes ----------------------------------------------------------------------------------- */

static ac_status
cuda_lane_open(void *self, ac_lane **out)
{
    int previous, index = ((cuda_device *)self)->index;
    ac_lane *lane = ac_cuda_host->alloc(sizeof *lane);
    if (!lane) {
        return ac_cuda_fail(AC_E_MEMORY, "out of memory: %zu bytes were asked for", sizeof *lane);
    }
    lane->device = index;
    ac_status status = enter(index, &previous);
    if (status == AC_OK) {
        cudaError_t made = cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking);
        status = leave(index, previous, ac_cuda_check(made, "cudaStreamCreateWithFlags"));
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
    (void)self;
    cudaStreamDestroy(lane->stream);
    ac_cuda_host->free(lane);
}

static ac_status
cuda_sync(void *self, ac_lane *lane)
{
    (void)self;
    AC_CUDA(cudaStreamSynchronize(lane->stream));
    return AC_OK;
}

/* ---- the exported symbol --------------------------------------------------------------------- */

__attribute__((visibility("default"))) ac_status
ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out);

ac_status
ac_backend_cuda(uint32_t abi, const ac_host *host, ac_backend *out)
{
    ac_cuda_host = host;
    if (abi != AC_ABI) {
        return ac_cuda_fail(AC_E_DEVICE, "libaccel_cuda.so: found ABI %u, expected %u; install "
                                         "both parts of accel from one build", AC_ABI, abi);
    }
    *out = (ac_backend){
        .abi = AC_ABI,
        .name = "cuda",
        .kernels = ac_cuda_kernels,
        .open = cuda_open,
        .close = cuda_close,
        .alloc = cuda_alloc,
        .free = cuda_free,
        .lane_open = cuda_lane_open,
        .lane_close = cuda_lane_close,
        .upload = cuda_upload,
        .download = cuda_download,
        .copy = cuda_copy,
        .sync = cuda_sync,
    };
    return AC_OK;
}
