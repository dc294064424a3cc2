/* rng_philox: the counter-based generator of GPUs, and the order in which PyTorch uses it.  See
 * rng_philox.h. */
#include "rng_philox.h"

#include <math.h>
#include <string.h>

#define BLOCK 256  /* threads of PyTorch's blocks */
#define ROUNDS 10

/* ---- words ----------------------------------------------------------------------------------- */

static void
philox(uint64_t seed, uint64_t call, uint64_t thread, uint32_t word[4])
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    word[0] = (uint32_t)call;
    word[1] = (uint32_t)(call >> 32);
    word[2] = (uint32_t)thread;
    word[3] = (uint32_t)(thread >> 32);
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t a = (uint64_t)word[0] * UINT32_C(0xd2511f53);
        uint64_t b = (uint64_t)word[2] * UINT32_C(0xcd9e8d57);
        uint32_t first = (uint32_t)(b >> 32) ^ word[1] ^ key[0];
        uint32_t third = (uint32_t)(a >> 32) ^ word[3] ^ key[1];
        word[0] = first;
        word[1] = (uint32_t)b;
        word[2] = third;
        word[3] = (uint32_t)a;
        key[0] += UINT32_C(0x9e3779b9);
        key[1] += UINT32_C(0xbb67ae85);
    }
}

/* ---- normals --------------------------------------------------------------------------------- */

/* Box-Muller of two words: the sine first.  Radius and angle are f32, as on the GPU. */
static void
normal_pair(uint32_t x, uint32_t y, float out[2])
{
    const float scale = 0x1p-32f, turn = (float)(0x1p-32 * 6.283185307179586);
    float uniform = (float)x * scale + scale / 2.0f;
    float angle = fmaf((float)y, turn, turn / 2.0f);
    double radius = sqrt(-2.0 * log((double)uniform));
    out[0] = (float)(radius * sin((double)angle));
    out[1] = (float)(radius * cos((double)angle));
}

static int64_t
threads_of(const ac_philox *rng, int64_t count)
{
    int64_t blocks = (count + BLOCK - 1) / BLOCK;
    return AC_MIN(blocks * BLOCK, rng->threads);
}

void
ac_philox_normal(ac_philox *rng, float *out, int64_t count)
{
    if (count < 1) {
        return;
    }
    int64_t threads = threads_of(rng, count), calls = (count - 1) / (4 * threads) + 1;
    for (int64_t call = 0; call < calls; call++) {
        float *base = out + call * 4 * threads;
        int64_t left = count - call * 4 * threads;
        for (int64_t t = 0; t < AC_MIN(threads, left); t++) {
            uint32_t word[4];
            float normal[4];
            philox(rng->seed, rng->offset / 4 + (uint64_t)call, (uint64_t)t, word);
            normal_pair(word[0], word[1], normal);
            if (t + 2 * threads < left) {
                normal_pair(word[2], word[3], normal + 2);
            }
            for (int64_t k = 0; k < 4 && t + k * threads < left; k++) {
                base[t + k * threads] = normal[k];
            }
        }
    }
    rng->offset += 4 * (uint64_t)calls;
}

/* ---- life, and PyTorch's state --------------------------------------------------------------- */

ac_status
ac_philox_init(ac_philox *rng, uint64_t seed, int32_t processors, int32_t threads)
{
    if (processors < 1 || processors > 4096 || threads < BLOCK || threads > 65536) {
        return ac_error(AC_E_INVALID, "generator: found a GPU of %d multiprocessors with %d "
                                      "threads each, expected 1 to 4096 with 256 to 65536",
                        (int)processors, (int)threads);
    }
    *rng = (ac_philox){.seed = seed, .threads = (int64_t)processors * (threads / BLOCK) * BLOCK};
    return AC_OK;
}

ac_status
ac_philox_from_torch(ac_philox *rng, const void *bytes, size_t size)
{
    uint64_t state[2];
    if (size != sizeof state) {
        return ac_error(AC_E_INVALID, "generator state: found %zu bytes, expected %zu; a CUDA "
                                      "torch.Generator has that many", size, sizeof state);
    }
    memcpy(state, bytes, sizeof state);
    if (state[1] % 4 != 0) {
        return ac_error(AC_E_INVALID, "generator state: found an offset of %llu, expected a "
                                      "multiple of 4", (unsigned long long)state[1]);
    }
    rng->seed = state[0];
    rng->offset = state[1];
    return AC_OK;
}

void
ac_philox_to_torch(const ac_philox *rng, void *bytes)
{
    const uint64_t state[2] = {rng->seed, rng->offset};
    memcpy(bytes, state, sizeof state);
}
