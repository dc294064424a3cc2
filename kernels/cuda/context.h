/* context: a device as its own files see it; see context.c. */
#ifndef AC_CUDA_CONTEXT_H
#define AC_CUDA_CONTEXT_H

#include "cuda.h"

#include <cuda.h>

struct ac_cuda_device {
    int32_t index;
    bool sync;         /* ACCEL_SYNC=1 when it was opened */
    CUcontext context; /* the device's primary one, which PyTorch uses too; never ours to destroy */
    ac_cuda_libraries *libraries; /* NULL until one is needed */
};

/* Finds the driver's entry points, then the device's context, and whether a kernel of this library
 * runs there.  The caller's current context is the same before and after. */
ac_status ac_cuda_context_open(ac_cuda_device *device);

/* As ac_cuda_enter and ac_cuda_leave. */
ac_status ac_cuda_device_enter(ac_cuda_device *device, int *previous);
ac_status ac_cuda_device_leave(ac_cuda_device *device, int previous, ac_status status);
/* For giving back, which a lost device must not prevent: *previous goes to ac_cuda_device_end. */
bool ac_cuda_device_begin(ac_cuda_device *device, int *previous);
void ac_cuda_device_end(ac_cuda_device *device, int previous);

/* What CUDA says to who waits or asks while a stream is recorded: the device is not lost. */
static inline bool
ac_cuda_is_of_recording(cudaError_t status)
{
    return status >= cudaErrorStreamCaptureUnsupported &&
           status <= cudaErrorStreamCaptureWrongThread;
}

/* The first error's message, when that error took the device with it. */
ac_status ac_cuda_check_lost(int32_t index);
/* `message` is that of a whole run: when it tells how the device was lost it is the one to keep. */
void ac_cuda_keep_message(int32_t index, const char *message);

#endif
