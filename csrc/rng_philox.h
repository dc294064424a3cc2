/* rng_philox: normals equal to PyTorch's CUDA generator for the same seed and the same kind of GPU.
 *
 * Philox 4x32-10 (Salmon et al. 2011).  PyTorch gives each GPU thread a stream of its own (its
 * number is the high half of the counter) and hands elements to threads in strides of the grid, so
 * which number an element gets depends on how many threads the GPU runs at most:
 *     threads = 256 min(ceil(count / 256), multiprocessors * (threads of one / 256))
 *     element i is normal (i / threads) % 4 of call i / (4 threads) of thread i % threads
 * A call makes four normals of four words by Box-Muller in f32; here they agree within 4e-6, with
 * values recorded on an H200 (132 multiprocessors of 2048 threads).  f16 and bf16 are these
 * rounded.  The generator's offset grows by four for each call of a thread.
 */
#ifndef AC_RNG_PHILOX_H
#define AC_RNG_PHILOX_H

#include "base.h"

typedef struct ac_philox {
    uint64_t seed;
    uint64_t offset;  /* words that each thread has drawn; a multiple of 4 */
    int64_t threads;  /* the GPU runs at once, in blocks of 256; 0: no such generator */
} ac_philox;

/* `processors` multiprocessors that each run `threads` threads at once (H200: 132 and 2048). */
ac_status ac_philox_init(ac_philox *rng, uint64_t seed, int32_t processors, int32_t threads);
/* `count` standard normals, as torch.randn(count, generator=g, device="cuda"). */
void ac_philox_normal(ac_philox *rng, float *out, int64_t count);

/* torch.Generator("cuda").get_state() and set_state(): seed and offset, little endian. */
#define AC_PHILOX_TORCH_BYTES 16
ac_status ac_philox_from_torch(ac_philox *rng, const void *bytes, size_t size);
void ac_philox_to_torch(const ac_philox *rng, void *bytes);

#endif
