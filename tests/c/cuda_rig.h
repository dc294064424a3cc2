/* cuda_rig: far_rig's models on a GPU, and the driver as a caller has it. */
#ifndef AC_TEST_CUDA_RIG_H
#define AC_TEST_CUDA_RIG_H

#include "../../csrc/backend_cuda.h"
#include "far_rig.h"

#include <dlfcn.h>

/* The driver's, by hand: a caller's streams and copies are not the backend's. */
static struct {
    int (*stream_new)(void **stream, unsigned flags);
    int (*stream_sync)(void *stream);
    int (*to_device)(uint64_t to, const void *from, size_t bytes, void *stream);
    int (*to_host)(void *to, uint64_t from, size_t bytes, void *stream);
    int (*memory)(size_t *free_bytes, size_t *total);
    int (*capture)(void *stream, int mode);
    int (*capture_end)(void *stream, void **graph);
    int (*graph_free)(void *graph);
    int (*context)(void **context, int device);
    int (*make_current)(void *context);
} cu;

static inline void
load(void *library, const char *name, void *to)
{
    void *symbol = dlsym(library, name);
    CHECK(symbol);
    memcpy(to, &symbol, sizeof symbol);
}

static inline ac_device *
open_gpu(void)
{
    ac_device *device;
    ac_backend_cuda_set_folder("python/accel");
    if (ac_device_open("cuda", &device) < 0) {
        printf("(no GPU: %s) ", ac_error_message());
        return NULL;
    }
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(library);
    load(library, "cuStreamCreate", &cu.stream_new);
    load(library, "cuStreamSynchronize", &cu.stream_sync);
    load(library, "cuMemcpyHtoDAsync_v2", &cu.to_device);
    load(library, "cuMemcpyDtoHAsync_v2", &cu.to_host);
    load(library, "cuMemGetInfo_v2", &cu.memory);
    load(library, "cuStreamBeginCapture_v2", &cu.capture);
    load(library, "cuStreamEndCapture", &cu.capture_end);
    load(library, "cuGraphDestroy", &cu.graph_free);
    load(library, "cuDevicePrimaryCtxRetain", &cu.context);
    load(library, "cuCtxSetCurrent", &cu.make_current);
    void *context; /* the driver's calls want one, and the backend leaves none behind */
    CHECK(cu.context(&context, 0) == 0 && cu.make_current(context) == 0);
    printf("(ran on cuda) ");
    return device;
}

/* Largest difference over largest value. */
static inline double
distance(const float *a, const float *b, int64_t count)
{
    double worst = 0.0, size = 0.0;
    for (int64_t i = 0; i < count; i++) {
        CHECK(isfinite(a[i]) && isfinite(b[i]));
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
        size = fmax(size, fabs((double)b[i]));
    }
    CHECK(size > 0.01);
    return worst / size;
}

#endif
