/* vector: 16 bytes of a row at a time, as floats. */
#ifndef AC_CUDA_VECTOR_CUH
#define AC_CUDA_VECTOR_CUH

#include "element.cuh"

/* Elements in 16 bytes. */
template <typename T> static constexpr int ac_wide = 16 / (int)sizeof(T);

template <typename T>
__device__ static inline void
ac_unpack_wide(float (&to)[ac_wide<T>], uint4 raw)
{
    const T *cells = (const T *)&raw;
#pragma unroll
    for (int i = 0; i < ac_wide<T>; i++) {
        to[i] = (float)cells[i];
    }
}

template <typename T>
__device__ static inline void
ac_load_wide(float (&to)[ac_wide<T>], const T *from)
{
    ac_unpack_wide<T>(to, *(const uint4 *)from);
}

template <typename T>
__device__ static inline void
ac_store_wide(T *to, const float (&from)[ac_wide<T>])
{
    uint4 raw;
    T *cells = (T *)&raw;
#pragma unroll
    for (int i = 0; i < ac_wide<T>; i++) {
        cells[i] = (T)from[i];
    }
    *(uint4 *)to = raw;
}

static inline bool
ac_is_wide(const void *address)
{
    return (uintptr_t)address % 16 == 0;
}

#endif
