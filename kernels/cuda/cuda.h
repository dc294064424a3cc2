/* cuda: what the files of the CUDA backend share.
 *
 * This library has no Python, no PyTorch and none of the engine's symbols: errors, heap and log go
 * through the ac_host it was opened with.  Only csrc/tensor.c is linked in beside it.
 */
#ifndef AC_CUDA_H
#define AC_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "../../csrc/device.h"

#include <cuda_runtime_api.h>

typedef struct ac_cuda_device ac_cuda_device; /* device.c's */
typedef struct ac_cuda_libraries ac_cuda_libraries; /* library.c's; one a device */

/* A stream, and the device it belongs to. */
struct ac_lane {
    cudaStream_t stream; /* where work goes now: own, or the caller's */
    cudaStream_t own;
    cudaEvent_t last;    /* end of the lane's last run */
    bool marked;         /* `last` was recorded */
    cudaStream_t outside; /* while recording, which goes to `own`: where work went before */
    ac_cuda_device *device; /* borrowed: lanes are closed before it */
    cudaEvent_t *times;     /* time_mark's, made at a number's first use */
    int32_t n_times;
    bool recording;         /* between record_begin and record_end: nothing may wait */
};

/* The host's services; set once, when the library is opened. */
extern const ac_host *ac_cuda_host;

ac_status ac_cuda_fail(ac_status status, const char *format, ...) AC_PRINTF(2, 3);
/* A library status as ours: names the call and CUDA's own text; forgets it. */
ac_status ac_cuda_check(cudaError_t status, const char *call);
/* "out of memory: <what>", with what is free. */
ac_status ac_cuda_no_memory(const char *what);
/* Whether there is code for the current device in this library. */
cudaError_t ac_cuda_probe(void);

#define AC_CUDA(call) AC_TRY(ac_cuda_check((call), #call))

/* Makes the lane's device current for the calling thread; a lost device is an error here.  Every
 * enter that succeeds has its leave, which gets *previous, makes current what was, and passes
 * `status` on, or what is to be said of a device that was lost on the way. */
ac_status ac_cuda_enter(const ac_lane *lane, int *previous);
ac_status ac_cuda_leave(const ac_lane *lane, int previous, ac_status status);
/* After a launch: `status` is what the launch gave; what it does later shows at a sync.  With
 * ACCEL_SYNC=1 waits here, so that the error names the step. */
ac_status ac_cuda_launched(const ac_lane *lane, cudaError_t status, const char *name);

/* The device's place for what library.c keeps, NULL at first. */
ac_cuda_libraries **ac_cuda_libraries_slot(const ac_lane *lane);
void ac_cuda_libraries_free(ac_cuda_libraries *libraries);

/* So many elements further on; NULL stays NULL. */
static inline const void *
ac_cuda_at(const void *base, int64_t elements, int32_t dtype)
{
    return base ? (const char *)base + (size_t)elements * ac_dtype_size((ac_dtype)dtype) : NULL;
}

extern const ac_kernel *const ac_cuda_kernels[];

/* The backend's `sampler`, `tail_fits` and `tail`. */
ac_status ac_cuda_sampler(void *self, ac_lane *lane, const ac_sampler_job *job,
                          ac_sampler_phase phase);
bool ac_cuda_tail_fits(const ac_caps *caps, const ac_problem *conv, const ac_sampler_job *job);
ac_status ac_cuda_tail(void *self, ac_lane *lane, const ac_problem *conv, const void *prepared,
                       const ac_sampler_job *job);

#ifdef __cplusplus
}
#endif

#endif
