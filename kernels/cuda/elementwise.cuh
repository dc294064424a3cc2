/* elementwise: shared by kernels that read and write each element once: f32, f16, bf16.
 *
 * Bound: memory.  One thread an element, grid-stride, 64-bit indices: a VAE's tensors pass 2^31. */
#ifndef AC_CUDA_ELEMENTWISE_CUH
#define AC_CUDA_ELEMENTWISE_CUH

#include "cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static constexpr int AC_THREADS = 256;

static inline unsigned
ac_cuda_blocks(int64_t count)
{
    int64_t blocks = (count + AC_THREADS - 1) / AC_THREADS;
    return (unsigned)(blocks < 65535 * 16 ? blocks : 65535 * 16);
}

static inline bool
ac_cuda_float(ac_dtype dtype)
{
    return dtype == AC_F32 || dtype == AC_F16 || dtype == AC_BF16;
}

/* Calls f with a null pointer of the element type: `auto *t`, then use `decltype(*t)`. */
template <typename F>
static inline ac_status
ac_cuda_by_dtype(ac_dtype dtype, F f)
{
    switch (dtype) {
    case AC_F32:
        return f((float *)nullptr);
    case AC_F16:
        return f((__half *)nullptr);
    case AC_BF16:
        return f((__nv_bfloat16 *)nullptr);
    default:
        return ac_cuda_fail(AC_E_INTERNAL, "cuda: a dtype that supports() refuses");
    }
}

#endif
