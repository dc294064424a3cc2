/* Placement: no two blocks that live at once overlap, offsets are aligned, totals are right. */
#include "../../csrc/memory.h"
#include "test.h"

static uint32_t seed = 1;

static uint32_t
next(uint32_t below)
{
    seed = seed * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)seed * below) >> 32);
}

static bool
collide(const ac_block *a, const ac_block *b)
{
    bool together = a->first <= b->last && b->first <= a->last;
    return together && a->offset < b->offset + b->bytes && b->offset < a->offset + a->bytes;
}

static void
random_lives_never_overlap(void)
{
    static ac_block blocks[200];
    for (int round = 0; round < 200; round++) {
        int32_t count = 1 + (int32_t)next(200), steps = 1 + (int32_t)next(100);
        for (int32_t i = 0; i < count; i++) {
            int32_t first = (int32_t)next((uint32_t)steps);
            int32_t last = AC_MIN(first + (int32_t)next(12), steps - 1);
            blocks[i] = (ac_block){1 + next(1u << (4 + next(16))), first, last, SIZE_MAX};
        }
        size_t total, bound, most = 0;
        CHECK_OK(ac_memory_place(blocks, count, &total, &bound));
        for (int32_t i = 0; i < count; i++) {
            CHECK(blocks[i].offset % AC_MEMORY_ALIGN == 0);
            most = AC_MAX(most, blocks[i].offset + blocks[i].bytes);
            for (int32_t k = 0; k < i; k++) {
                CHECK(!collide(&blocks[i], &blocks[k]));
            }
        }
        CHECK(total == most);
        CHECK(bound <= total);
    }
}

static void
a_chain_needs_two_buffers(void)
{
    ac_block blocks[50];
    for (int32_t i = 0; i < 50; i++) {
        blocks[i] = (ac_block){1024, i, AC_MIN(i + 1, 49), 0};
    }
    size_t total, bound;
    CHECK_OK(ac_memory_place(blocks, 50, &total, &bound));
    CHECK_INT(total, 2048);
    CHECK_INT(bound, 2048);
}

static void
nothing_needs_nothing(void)
{
    size_t total = 1, bound = 1;
    CHECK_OK(ac_memory_place(NULL, 0, &total, &bound));
    CHECK_INT(total, 0);
    CHECK_INT(bound, 0);
}

TEST_MAIN(TEST(random_lives_never_overlap), TEST(a_chain_needs_two_buffers),
          TEST(nothing_needs_nothing))
