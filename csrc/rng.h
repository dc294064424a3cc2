/* rng: normals equal to PyTorch's CPU generator (mt19937) for the same seed.
 *
 * The integer stream is exact.  torch.randn on the CPU has two ways: below 16 elements it draws one
 * value at a time (Box-Muller in double with a cached second value), from 16 on it fills uniforms
 * and transforms blocks of 16, redrawing the last 16 when the size is not a multiple.
 */
#ifndef AC_RNG_H
#define AC_RNG_H

#include "base.h"

typedef struct ac_rng {
    uint32_t state[624];
    int32_t left, next;
    bool has_cached; /* second value of the scalar Box-Muller, kept between calls as PyTorch does */
    double cached;
} ac_rng;

void ac_rng_seed(ac_rng *rng, uint64_t seed); /* low 32 bits, as at::mt19937 */
uint32_t ac_rng_next(ac_rng *rng);
/* `count` standard normals in f32, as torch.randn(count, generator=g, dtype=float32). */
void ac_rng_normal(ac_rng *rng, float *out, int64_t count);

#endif
