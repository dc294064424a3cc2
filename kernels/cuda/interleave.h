/* interleave: the four phases of an upsampling convolution as one image. */
#ifndef AC_CUDA_INTERLEAVE_H
#define AC_CUDA_INTERLEAVE_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* to [n, 2 y + a, 2 x + b, c] = from [n, y + a, x + b, 2 a + b, c]; from has height + 1 rows of
 * width + 1 pixels.  Both contiguous and aligned to 16 bytes, a pixel too. */
typedef struct ac_interleave {
    void *to;
    const void *from;
    ac_dtype dtype;
    int64_t images, channels;
    int32_t height, width;
} ac_interleave;

ac_status ac_cuda_interleave(ac_lane *lane, const ac_interleave *interleave);

/* `count` elements, `times` times one after the other. */
ac_status ac_cuda_repeat(ac_lane *lane, void *to, const void *from, int64_t count, int32_t times,
                         ac_dtype dtype);

#ifdef __cplusplus
}
#endif

#endif
