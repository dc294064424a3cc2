/* cast: the same elements in another dtype. */
#include "plain.h"

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    ac_plain_copy(lane, &p->output, &p->input[0]);
    return AC_OK;
}

const ac_kernel ac_cpu_cast_plain = {
    .name = "cpu.cast.plain",
    .op = AC_OP_CAST,
    .supports = ac_plain_supports,
    .launch = launch,
};
