/* memory: greedy placement by size with best fit.  Quadratic in buffers that live at the same
 * time; an SDXL plan has about 2,000 blocks and takes a few milliseconds. */
#include "memory.h"

#include <stdlib.h>

/* qsort has no context argument, so it sorts these. */
typedef struct by_size {
    size_t bytes;
    int32_t first, index;
} by_size;

static int
larger_first(const void *a, const void *b)
{
    const by_size *x = a, *y = b;
    if (x->bytes != y->bytes) {
        return x->bytes < y->bytes ? 1 : -1;
    }
    /* Ties in a fixed order: plans must not depend on the sort. */
    if (x->first != y->first) {
        return x->first < y->first ? -1 : 1;
    }
    return x->index < y->index ? -1 : 1;
}

/* Offset of the tightest gap that holds block `at`, between the placed ones (`placed`, ordered by
 * offset) that live when it does. */
static size_t
best_gap(const ac_block *blocks, const int32_t *placed, int32_t n_placed, int32_t at)
{
    const ac_block *b = &blocks[at];
    size_t end = 0, best = SIZE_MAX, offset = 0;
    bool found = false;
    for (int32_t i = 0; i < n_placed; i++) {
        const ac_block *other = &blocks[placed[i]];
        if (other->last < b->first || other->first > b->last) {
            continue;
        }
        if (other->offset > end && other->offset - end >= b->bytes &&
            other->offset - end < best) {
            best = other->offset - end;
            offset = end;
            found = true;
        }
        end = AC_MAX(end, other->offset + other->bytes);
    }
    return found ? offset : end;
}

static size_t
most_live(const ac_block *blocks, int32_t count, size_t *live, int32_t steps)
{
    for (int32_t i = 0; i < count; i++) {
        live[blocks[i].first] += blocks[i].bytes;
        live[blocks[i].last + 1] -= blocks[i].bytes; /* wraps, and back again in the sum */
    }
    size_t now = 0, most = 0;
    for (int32_t s = 0; s < steps; s++) {
        now += live[s];
        most = AC_MAX(most, now);
    }
    return most;
}

ac_status
ac_memory_place(ac_block *blocks, int32_t count, size_t *total, size_t *bound)
{
    int32_t steps = 0;
    for (int32_t i = 0; i < count; i++) {
        blocks[i].bytes = ac_align_up(blocks[i].bytes, AC_MEMORY_ALIGN);
        steps = AC_MAX(steps, blocks[i].last + 1);
    }
    ac_arena work;
    ac_arena_init(&work);
    size_t n = (size_t)count;
    by_size *order = ac_arena_alloc(&work, n * sizeof *order);
    int32_t *placed = ac_arena_alloc(&work, n * sizeof *placed);
    size_t *live = ac_arena_alloc(&work, ((size_t)steps + 1) * sizeof *live);
    if (!order || !placed || !live) {
        ac_arena_deinit(&work);
        return ac_no_memory(n * sizeof *order);
    }
    for (int32_t i = 0; i < count; i++) {
        order[i] = (by_size){blocks[i].bytes, blocks[i].first, i};
    }
    qsort(order, n, sizeof *order, larger_first);
    *total = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t at = order[i].index, to = i;
        blocks[at].offset = best_gap(blocks, placed, i, at);
        *total = AC_MAX(*total, blocks[at].offset + blocks[at].bytes);
        while (to > 0 && blocks[placed[to - 1]].offset > blocks[at].offset) {
            placed[to] = placed[to - 1];
            to--;
        }
        placed[to] = at;
    }
    *bound = most_live(blocks, count, live, steps);
    ac_arena_deinit(&work);
    return AC_OK;
}
