/* memory: places buffers with known lives in as few bytes as it can.  Pure arithmetic. */
#ifndef AC_MEMORY_H
#define AC_MEMORY_H

#include "base.h"

#define AC_MEMORY_ALIGN 256

typedef struct ac_block {
    size_t bytes;
    int32_t first, last; /* steps at which it is live, both included */
    size_t offset;       /* filled in; a multiple of AC_MEMORY_ALIGN */
} ac_block;

/* Largest first, each into the tightest gap between the blocks that live at the same time.
 * *total: bytes needed; *bound: most bytes live at one step, which no placement can beat. */
ac_status ac_memory_place(ac_block *blocks, int32_t count, size_t *total, size_t *bound);

#endif
