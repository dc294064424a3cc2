/* launch: the one way a kernel is started: on the lane's device and stream, with its error seen. */
#ifndef AC_CUDA_LAUNCH_CUH
#define AC_CUDA_LAUNCH_CUH

#include "cuda.h"

#include <type_traits>

static constexpr unsigned AC_THREADS = 256;

/* An empty grid is nothing to do.  `shared` bytes beyond 48 KB are asked for. */
template <typename... P>
static ac_status
ac_cuda_launch(ac_lane *lane, const char *name, void (*kernel)(P...), dim3 grid, dim3 threads,
               size_t shared, const std::type_identity_t<P> &...arguments)
{
    int previous;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return AC_OK;
    }
    AC_TRY(ac_cuda_enter(lane, &previous));
    cudaError_t status = cudaSuccess;
    if (shared > 48 * 1024) {
        status = cudaFuncSetAttribute((const void *)kernel,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    }
    if (status == cudaSuccess) {
        kernel<<<grid, threads, shared, lane->stream>>>(arguments...);
        status = cudaGetLastError(); /* our own runtime's: the library is linked statically */
    }
    return ac_cuda_leave(lane, previous, ac_cuda_launched(lane, status, name));
}

static inline int64_t
ac_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

#endif
