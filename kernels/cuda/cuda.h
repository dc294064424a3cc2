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

/* A stream, and the device it belongs to. */
struct ac_lane {
    cudaStream_t stream;
    int32_t device;
};

/* The host's services; set once, when the library is opened. */
extern const ac_host *ac_cuda_host;

ac_status ac_cuda_fail(ac_status status, const char *format, ...) AC_PRINTF(2, 3);
/* A library status as ours: names the call and CUDA's own text. */
ac_status ac_cuda_check(cudaError_t status, const char *call);

#define AC_CUDA(call) AC_TRY(ac_cuda_check((call), #call))
/* After a launch: its configuration errors; what it does later shows at a sync. */
#define AC_CUDA_LAUNCHED(name) ac_cuda_check(cudaPeekAtLastError(), name)

extern const ac_kernel *const ac_cuda_kernels[];

#ifdef __cplusplus
}
#endif

#endif
