/* phase_weight: w [o, i, 3, 3] to [4, o, i, 2, 2], the four filters of up_conv2d.
 *
 * After nearest-2x, two of three taps fall on the same source pixel: at even positions the last
 * two, at odd ones the first two.  Rows and columns alike; the sums are rounded once.
 */
#include "plain.h"

/* Which of the two taps of a phase takes the 3-tap filter's element `k`. */
static int64_t
tap(int64_t odd, int64_t k)
{
    return odd ? k == 2 : k > 0;
}

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_tensor *w = &p->input[0], *out = &p->output;
    for (int64_t row = first; row < first + rows; row++) { /* over [4, o, i, 2] */
        int64_t t = row % 2, i = row / 2 % w->shape.dim[1];
        int64_t o = row / 2 / w->shape.dim[1] % w->shape.dim[0];
        int64_t phase = row / 2 / w->shape.dim[1] / w->shape.dim[0];
        double line[2] = {0.0, 0.0};
        for (int64_t ky = 0; ky < 3; ky++) {
            for (int64_t kx = 0; kx < 3; kx++) {
                if (tap(phase / 2, ky) == t) {
                    int64_t at = o * w->stride[0] + i * w->stride[1] + ky * w->stride[2] +
                                 kx * w->stride[3];
                    line[tap(phase % 2, kx)] += ac_element_get(w->data, w->dtype, at);
                }
            }
        }
        ac_plain_store(line, out, ac_plain_row(out, row), out->stride[4], 2);
    }
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    ac_plain_over_rows(lane, p, &p->output, rows_of);
    return AC_OK;
}

const ac_kernel ac_cpu_phase_weight_plain = {
    .name = "cpu.phase_weight.plain",
    .op = AC_OP_PHASE_WEIGHT,
    .supports = ac_plain_supports,
    .launch = launch,
};
