/* rng: normals equal to PyTorch's CPU generator (mt19937) for the same seed.
 *
 * A CUDA generator's normals are made by rng_philox.c; the rest is about the CPU's.
 * The integer stream is exact, values agree within 4e-6.  torch.randn on the CPU has three ways,
 * all of which read the same stream:
 *   below 16 elements      one value at a time: Box-Muller in double, the second value is kept in
 *                          the generator for the next such draw (the other ways leave it alone);
 *   float32, 16 and more   `count` uniforms of 24 bits, then Box-Muller over blocks of 16 (8 radii,
 *                          8 angles); when the count is no multiple of 16, the last 16 elements
 *                          are drawn again from 16 fresh uniforms;
 *   float16 and bfloat16   the same block by block (16 uniforms, 16 normals, ...), rounded at the
 *                          end: equal to float32 where the count is a multiple of 16, not else.
 */
#ifndef AC_RNG_H
#define AC_RNG_H

#include "rng_philox.h"

typedef struct ac_rng {
    uint32_t state[624];
    int32_t left, next; /* words before the next refill, plus one; index of the next word */
    bool has_cached;    /* second value of the scalar Box-Muller, kept as PyTorch does */
    double cached;
    uint64_t seed;      /* as given; only told back in ac_rng_to_torch */
    ac_philox cuda;     /* threads > 0: normals are those of PyTorch's CUDA generator instead */
} ac_rng;

void ac_rng_seed(ac_rng *rng, uint64_t seed); /* low 32 bits, as at::mt19937 */
uint32_t ac_rng_next(ac_rng *rng);
/* The generator of a GPU: rng_philox.h. */
ac_status ac_rng_seed_cuda(ac_rng *rng, uint64_t seed, int32_t processors, int32_t threads);
/* `count` standard normals in f32, as torch.randn(count, generator=g, dtype=float32). */
void ac_rng_normal(ac_rng *rng, float *out, int64_t count);
/* The same for dtype=float16 or bfloat16: values before the rounding to that dtype. */
void ac_rng_normal_half(ac_rng *rng, float *out, int64_t count);

/* torch.Generator.get_state() / set_state() of a CPU generator, as bytes.  Little endian. */
#define AC_RNG_TORCH_BYTES 5056
ac_status ac_rng_from_torch(ac_rng *rng, const void *bytes, size_t size);
void ac_rng_to_torch(const ac_rng *rng, void *bytes); /* AC_RNG_TORCH_BYTES */

#endif
