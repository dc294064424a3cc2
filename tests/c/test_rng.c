/* test_rng: the stream of mt19937, values PyTorch drew, states that go out and come back. */
#include "philox_vectors.h"
#include "test.h"

#include "../../csrc/rng.h"

#define TOLERANCE 4e-6

/* The 10,000th word from seed 5489 is what the C++ standard asks of mt19937. */
static void
stream_is_mt19937(void)
{
    ac_rng rng;
    ac_rng_seed(&rng, 5489);
    uint32_t word = 0;
    for (int i = 0; i < 10000; i++) {
        word = ac_rng_next(&rng);
    }
    CHECK_INT(word, 4123659995u);
}

static void
seeds_take_their_low_half(void)
{
    ac_rng a, b;
    ac_rng_seed(&a, 77);
    ac_rng_seed(&b, (UINT64_C(1) << 40) + 77);
    for (int i = 0; i < 1000; i++) {
        CHECK_INT(ac_rng_next(&a), ac_rng_next(&b));
    }
}

/* torch.randn(5, generator=torch.Generator().manual_seed(42)) */
static void
small_draws_are_pytorchs(void)
{
    static const double expected[5] = {0.336690366, 0.128809407, 0.234462366,
                                       0.23033303, -1.12285638};
    ac_rng rng;
    float out[5];
    ac_rng_seed(&rng, 42);
    ac_rng_normal(&rng, out, 5);
    for (int i = 0; i < 5; i++) {
        CHECK_CLOSE(out[i], expected[i], TOLERANCE);
    }
    CHECK(rng.has_cached);
    ac_rng_seed(&rng, 42); /* the same one by one */
    for (int i = 0; i < 5; i++) {
        ac_rng_normal(&rng, out, 1);
        CHECK_CLOSE(out[0], expected[i], TOLERANCE);
    }
}

/* torch.randn(20) and randn(20, dtype=float16) at these indices, seed 42 */
static void
ragged_draws_are_pytorchs(void)
{
    static const int at[5] = {0, 3, 4, 10, 19};
    static const double whole[5] = {1.92691529, -2.10552096, -0.758131146,
                                    -0.493356347, -0.621595383};
    static const double half[5] = {1.92675781, -2.10546875, 1.64257812, 0.80078125, 0.859863281};
    static const double after[2] = {-0.765838623, -0.750622332};
    ac_rng rng;
    float out[20];
    ac_rng_seed(&rng, 42);
    ac_rng_normal(&rng, out, 20);
    for (int i = 0; i < 5; i++) {
        CHECK_CLOSE(out[at[i]], whole[i], TOLERANCE);
    }
    ac_rng_normal(&rng, out, 2);
    CHECK_CLOSE(out[0], after[0], TOLERANCE);
    CHECK_CLOSE(out[1], after[1], TOLERANCE);
    ac_rng_seed(&rng, 42);
    ac_rng_normal_half(&rng, out, 20);
    for (int i = 0; i < 5; i++) {
        CHECK_CLOSE(out[at[i]], half[i], 2e-3); /* printed after rounding to f16 */
    }
}

static void
nothing_drawn_changes_nothing(void)
{
    ac_rng a, b;
    ac_rng_seed(&a, 9);
    b = a;
    ac_rng_normal(&a, NULL, 0);
    ac_rng_normal_half(&a, NULL, 0);
    CHECK(memcmp(&a, &b, sizeof a) == 0);
}

static void
normals_are_normal(void)
{
    enum { N = 1 << 18 };
    float *out = ac_malloc(N * sizeof *out);
    CHECK(out);
    ac_rng rng;
    ac_rng_seed(&rng, 3);
    ac_rng_normal(&rng, out, N);
    double sum = 0.0, square = 0.0, fourth = 0.0;
    for (int i = 0; i < N; i++) {
        double x = out[i];
        sum += x;
        square += x * x;
        fourth += x * x * x * x;
    }
    ac_free(out);
    CHECK_CLOSE(sum / N, 0.0, 0.01);
    CHECK_CLOSE(square / N, 1.0, 0.01);
    CHECK_CLOSE(fourth / N, 3.0, 0.1);
}

static void
state_comes_back(void)
{
    unsigned char bytes[AC_RNG_TORCH_BYTES];
    float expected[40], found[40];
    for (int drawn = 0; drawn < 1300; drawn += 13) {
        ac_rng rng, copy;
        ac_rng_seed(&rng, (uint64_t)drawn);
        for (int i = 0; i < drawn; i++) {
            ac_rng_next(&rng);
        }
        ac_rng_normal(&rng, expected, drawn % 4);
        ac_rng_to_torch(&rng, bytes);
        CHECK_OK(ac_rng_from_torch(&copy, bytes, sizeof bytes));
        CHECK_INT(copy.seed, drawn);
        ac_rng_normal(&rng, expected, 7);
        ac_rng_normal(&rng, expected + 7, 33);
        ac_rng_normal(&copy, found, 7);
        ac_rng_normal(&copy, found + 7, 33);
        CHECK(memcmp(expected, found, sizeof found) == 0);
    }
}

/* Any `left` and `next` that a state may carry either raise or can be drawn from. */
static void
bad_states_raise(void)
{
    unsigned char bytes[AC_RNG_TORCH_BYTES], bad[AC_RNG_TORCH_BYTES];
    ac_rng rng, out;
    uint64_t random = 88172645463325252u;
    ac_rng_seed(&rng, 1);
    ac_rng_next(&rng);
    ac_rng_to_torch(&rng, bytes);
    CHECK_STATUS(ac_rng_from_torch(&out, bytes, sizeof bytes - 1), AC_E_INVALID, "5056");
    for (int i = 0; i < 20000; i++) {
        memcpy(bad, bytes, sizeof bad);
        for (int k = 8; k < 24; k++) {
            if (test_random(&random) % 4 == 0) {
                bad[k] = (unsigned char)test_random(&random) & (i % 2 ? 0xff : 3);
            }
        }
        if (ac_rng_from_torch(&out, bad, sizeof bad) >= 0) {
            for (int k = 0; k < 700; k++) {
                ac_rng_next(&out);
                CHECK(out.next >= 1 && out.next <= 624);
            }
        }
    }
}

/* Draws one after the other from a generator a seed; recorded on a GPU. */
static void
cuda_normals_are_pytorchs(void)
{
    static float out[3000001];
    ac_rng rng = {.seed = 1};
    double worst = 0.0;
    for (size_t i = 0; i < AC_ARRAY_LEN(philox_cases); i++) {
        const philox_case *c = &philox_cases[i];
        if (i == 0 || c->seed != rng.seed) {
            CHECK_OK(ac_rng_seed_cuda(&rng, c->seed, 132, 2048));
        }
        CHECK(c->count <= (int64_t)AC_ARRAY_LEN(out));
        ac_rng_normal(&rng, out, c->count);
        CHECK_INT(rng.cuda.offset, c->offset);
        for (int k = 0; k < PHILOX_PICKS; k++) {
            worst = fmax(worst, fabs((double)out[c->index[k]] - (double)c->value[k]));
        }
    }
    CHECK(worst < 4e-6 && worst > 0.0);
}

static void
cuda_states_come_back(void)
{
    ac_rng rng, other;
    unsigned char bytes[AC_PHILOX_TORCH_BYTES];
    float a[1000], b[1000];
    CHECK_OK(ac_rng_seed_cuda(&rng, UINT64_C(1) << 63 | 11, 132, 2048));
    ac_rng_normal(&rng, a, 1000);
    ac_philox_to_torch(&rng.cuda, bytes);
    CHECK_OK(ac_rng_seed_cuda(&other, 3, 132, 2048));
    CHECK_OK(ac_philox_from_torch(&other.cuda, bytes, sizeof bytes));
    ac_rng_normal(&rng, a, 1000);
    ac_rng_normal_half(&other, b, 1000);
    CHECK(memcmp(a, b, sizeof a) == 0);
    bytes[8]++;
    CHECK_STATUS(ac_philox_from_torch(&other.cuda, bytes, 16), AC_E_INVALID, "multiple of 4");
    CHECK_STATUS(ac_philox_from_torch(&other.cuda, bytes, 15), AC_E_INVALID, "15 bytes");
    CHECK_STATUS(ac_rng_seed_cuda(&other, 3, 0, 2048), AC_E_INVALID, "0 multiprocessors");
}

TEST_MAIN(TEST(cuda_normals_are_pytorchs), TEST(cuda_states_come_back),
          TEST(stream_is_mt19937), TEST(seeds_take_their_low_half), TEST(small_draws_are_pytorchs),
          TEST(ragged_draws_are_pytorchs), TEST(nothing_drawn_changes_nothing),
          TEST(normals_are_normal), TEST(state_comes_back), TEST(bad_states_raise))
