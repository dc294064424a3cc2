/* probe: the question whether this library has code for the current device, which every launch
 * would otherwise answer one by one.  All files are built for the same architectures. */
#include "cuda.h"

static __global__ void
nothing(void)
{
}

extern "C" cudaError_t
ac_cuda_probe(void)
{
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, (const void *)nothing);
}
