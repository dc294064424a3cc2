/* device: the null backend plans any model on any machine and computes nothing.
 *
 * It owns no memory: addresses are made up, distinct and never touched.  One kernel an op accepts
 * every problem, so whatever can be planned at all can be planned here.
 */
#include "../../csrc/device.h"

#include <stdatomic.h>

/* Far from anything mapped; each allocation gets a range of its own. */
#define FIRST_ADDRESS ((uintptr_t)1 << 44)

static _Atomic uintptr_t next_address = FIRST_ADDRESS;

static bool
null_supports(const ac_problem *p, const ac_caps *caps)
{
    (void)p;
    (void)caps;
    return true;
}

static ac_status
null_launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)lane;
    (void)p;
    (void)scratch;
    (void)prepared;
    return AC_OK;
}

#define KERNEL(name_, NAME)                                                                        \
    &(const ac_kernel)                                                                             \
    {                                                                                              \
        .name = "null." name_, .op = AC_OP_##NAME, .supports = null_supports,                      \
        .launch = null_launch                                                                      \
    }

/* One kernel an op; views never reach a kernel and have none. */
static const ac_kernel *const kernels[] = {
#define ROW_0(name, NAME) KERNEL(name, NAME),
#define ROW_1(name, NAME)
#define X(NAME, name, view, operands, meaning) ROW_##view(#name, NAME)
#include "../../csrc/ops.def"
#undef X
    NULL,
};

static ac_status
null_open(int32_t index, void **self, ac_caps *caps)
{
    if (index != 0) {
        return ac_error(AC_E_DEVICE, "null:%d: found device number %d, expected 0", index, index);
    }
    *caps = (ac_caps){.isa = AC_ISA_BASE, .workers = 1, .tf32 = true};
    *self = (void *)&ac_backend_null;
    return AC_OK;
}

static void
null_close(void *self)
{
    (void)self;
}

static ac_status
null_alloc(void *self, size_t bytes, void **out)
{
    (void)self;
    size_t step;
    if (!ac_add_size(bytes, 511, &step) || step > SIZE_MAX / 4) {
        return ac_error(AC_E_MEMORY, "null: out of memory: %zu bytes wanted", bytes);
    }
    *out = (void *)atomic_fetch_add(&next_address, step / 256 * 256);
    return AC_OK;
}

static void
null_free(void *self, void *memory)
{
    (void)self;
    (void)memory;
}

static ac_status
null_lane_open(void *self, ac_lane **out)
{
    return null_alloc(self, 1, (void **)out);
}

static void
null_lane_close(void *self, ac_lane *lane)
{
    (void)self;
    (void)lane;
}

static ac_status
null_lane_reserve(void *self, ac_lane *lane, size_t worker_scratch)
{
    (void)self;
    (void)lane;
    (void)worker_scratch;
    return AC_OK;
}

static ac_status
null_copy(void *self, ac_lane *lane, void *to, const void *from, size_t bytes)
{
    (void)self;
    (void)lane;
    (void)to;
    (void)from;
    (void)bytes;
    return AC_OK;
}

static ac_status
null_sync(void *self, ac_lane *lane)
{
    (void)self;
    (void)lane;
    return AC_OK;
}

const ac_backend ac_backend_null = {
    .abi = AC_ABI,
    .name = "null",
    .kernels = kernels,
    .open = null_open,
    .close = null_close,
    .alloc = null_alloc,
    .free = null_free,
    .lane_open = null_lane_open,
    .lane_close = null_lane_close,
    .lane_reserve = null_lane_reserve,
    .upload = null_copy,
    .download = null_copy,
    .copy = null_copy,
    .sync = null_sync,
};
