/* to_nchw: y[n, c, h, w] = x[n, h, w, c], converting the dtype: a copy through a permuted view. */
#include "plain.h"

static const int order[4] = {0, 3, 1, 2}; /* of x's dimensions in y */

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    ac_plain_permute(lane, p, order);
    return AC_OK;
}

const ac_kernel ac_cpu_to_nchw_plain = {
    .name = "cpu.to_nchw.plain",
    .op = AC_OP_TO_NCHW,
    .supports = ac_plain_supports,
    .launch = launch,
};
