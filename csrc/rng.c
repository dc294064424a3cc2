/* rng: mt19937 (Matsumoto and Nishimura 1998) and the normals PyTorch makes of it.  See rng.h. */
#include "rng.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define MT_N 624
#define MT_M 397
#define TWO_PI 6.283185307179586476925286766559

/* ---- the integer stream ---------------------------------------------------------------------- */

void
ac_rng_seed(ac_rng *rng, uint64_t seed)
{
    memset(rng, 0, sizeof *rng);
    rng->seed = seed;
    rng->state[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < MT_N; i++) {
        uint32_t last = rng->state[i - 1];
        rng->state[i] = UINT32_C(1812433253) * (last ^ (last >> 30)) + i;
    }
    rng->left = 1; /* empty: the first draw refills */
}

ac_status
ac_rng_seed_cuda(ac_rng *rng, uint64_t seed, int32_t processors, int32_t threads)
{
    ac_rng_seed(rng, seed);
    return ac_philox_init(&rng->cuda, seed, processors, threads);
}

static void
refill(ac_rng *rng)
{
    uint32_t *s = rng->state;
    for (int i = 0; i < MT_N; i++) {
        uint32_t y = (s[i] & UINT32_C(0x80000000)) | (s[(i + 1) % MT_N] & UINT32_C(0x7fffffff));
        s[i] = s[(i + MT_M) % MT_N] ^ (y >> 1) ^ (y & 1 ? UINT32_C(0x9908b0df) : 0);
    }
    rng->left = MT_N;
    rng->next = 0;
}

uint32_t
ac_rng_next(ac_rng *rng)
{
    if (--rng->left == 0) {
        refill(rng);
    }
    uint32_t y = rng->state[rng->next++];
    y ^= y >> 11;
    y ^= (y << 7) & UINT32_C(0x9d2c5680);
    y ^= (y << 15) & UINT32_C(0xefc60000);
    return y ^ (y >> 18);
}

/* ---- normals --------------------------------------------------------------------------------- */

/* In [0, 1), 24 bits: exact in f32. */
static double
uniform24(ac_rng *rng)
{
    return (ac_rng_next(rng) & UINT32_C(0xffffff)) * 0x1p-24;
}

/* In [0, 1), 53 bits of two words, the first one high. */
static double
uniform53(ac_rng *rng)
{
    uint64_t high = ac_rng_next(rng);
    uint64_t both = high << 32 | ac_rng_next(rng);
    return (double)(both & ((UINT64_C(1) << 53) - 1)) * 0x1p-53;
}

static double
normal_scalar(ac_rng *rng)
{
    if (rng->has_cached) {
        rng->has_cached = false;
        return rng->cached;
    }
    double angle = TWO_PI * uniform53(rng);
    double radius = sqrt(-2.0 * log1p(-uniform53(rng)));
    rng->cached = radius * sin(angle);
    rng->has_cached = true;
    return radius * cos(angle);
}

/* Box-Muller in place over 16 uniforms: element j gives the radius, element j + 8 the angle. */
static void
normal_16(float *block)
{
    for (int j = 0; j < 8; j++) {
        double radius = sqrt(-2.0 * log(1.0 - (double)block[j]));
        double angle = TWO_PI * (double)block[j + 8];
        block[j] = (float)(radius * cos(angle));
        block[j + 8] = (float)(radius * sin(angle));
    }
}

static void
uniform_fill(ac_rng *rng, float *out, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = (float)uniform24(rng);
    }
}

static void
normal_small(ac_rng *rng, float *out, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = (float)normal_scalar(rng);
    }
}

void
ac_rng_normal(ac_rng *rng, float *out, int64_t count)
{
    assert(count >= 0);
    if (rng->cuda.threads > 0) {
        ac_philox_normal(&rng->cuda, out, count);
        return;
    }
    if (count < 16) {
        normal_small(rng, out, count);
        return;
    }
    uniform_fill(rng, out, count);
    for (int64_t i = 0; i + 16 <= count; i += 16) {
        normal_16(out + i);
    }
    if (count % 16 != 0) {
        uniform_fill(rng, out + count - 16, 16);
        normal_16(out + count - 16);
    }
}

void
ac_rng_normal_half(ac_rng *rng, float *out, int64_t count)
{
    assert(count >= 0);
    if (rng->cuda.threads > 0) {
        ac_philox_normal(&rng->cuda, out, count);
        return;
    }
    if (count < 16) {
        normal_small(rng, out, count);
        return;
    }
    for (int64_t i = 0; i + 16 <= count; i += 16) {
        uniform_fill(rng, out + i, 16);
        normal_16(out + i);
    }
    if (count % 16 != 0) {
        uniform_fill(rng, out + count - 16, 16);
        normal_16(out + count - 16);
    }
}

/* ---- PyTorch's state ------------------------------------------------------------------------- */

/* seed u64 | left i32 | seeded i32 | next u64 | 624 words as u64 | normal x, y, rho f64 |
 * normal valid i32, pad | a float sample and its flag, which no CPU kernel of PyTorch uses. */
enum {
    AT_SEED = 0,
    AT_LEFT = 8,
    AT_SEEDED = 12,
    AT_NEXT = 16,
    AT_STATE = 24,
    AT_NORMAL_Y = AT_STATE + 8 * MT_N + 8,
    AT_NORMAL_VALID = AT_STATE + 8 * MT_N + 24
};

ac_status
ac_rng_from_torch(ac_rng *rng, const void *bytes, size_t size)
{
    if (size != AC_RNG_TORCH_BYTES) {
        return ac_error(AC_E_INVALID,
                        "generator state: found %zu bytes, expected %d; a CPU torch.Generator has "
                        "that many",
                        size, AC_RNG_TORCH_BYTES);
    }
    const unsigned char *at = bytes;
    int32_t left, seeded, valid;
    uint64_t next;
    memcpy(&left, at + AT_LEFT, 4);
    memcpy(&seeded, at + AT_SEEDED, 4);
    memcpy(&next, at + AT_NEXT, 8);
    memcpy(&valid, at + AT_NORMAL_VALID, 4);
    bool fresh = left == 1 && next <= MT_N; /* nothing left: the next draw refills */
    if (!seeded || (!fresh && (left < 1 || left > MT_N || next + (uint64_t)left != MT_N + 1))) {
        return ac_error(AC_E_INVALID,
                        "generator state: found left %d and next %llu, expected a state of "
                        "mt19937",
                        (int)left, (unsigned long long)next);
    }
    ac_rng out = {.left = left, .next = (int32_t)next, .has_cached = valid != 0};
    memcpy(&out.seed, at + AT_SEED, 8);
    memcpy(&out.cached, at + AT_NORMAL_Y, 8);
    for (int i = 0; i < MT_N; i++) {
        uint64_t word;
        memcpy(&word, at + AT_STATE + 8 * i, 8);
        out.state[i] = (uint32_t)word;
    }
    *rng = out;
    return AC_OK;
}

void
ac_rng_to_torch(const ac_rng *rng, void *bytes)
{
    unsigned char *at = bytes;
    memset(at, 0, AC_RNG_TORCH_BYTES);
    int32_t seeded = 1, valid = rng->has_cached;
    uint64_t next = (uint64_t)rng->next;
    double cached = rng->has_cached ? rng->cached : 0.0;
    memcpy(at + AT_SEED, &rng->seed, 8);
    memcpy(at + AT_LEFT, &rng->left, 4);
    memcpy(at + AT_SEEDED, &seeded, 4);
    memcpy(at + AT_NEXT, &next, 8);
    memcpy(at + AT_NORMAL_Y, &cached, 8);
    memcpy(at + AT_NORMAL_VALID, &valid, 4);
    for (int i = 0; i < MT_N; i++) {
        uint64_t word = rng->state[i];
        memcpy(at + AT_STATE + 8 * i, &word, 8);
    }
}
