/* timestep: row i is [cos|sin](t[i] f) or [sin|cos], f_j = 10000^(-j / (half - freq_shift)).
 *
 * An odd last channel is 0.
 */
#include "plain.h"

#include <math.h>

static void
rows_of(const ac_problem *p, int64_t first, int64_t rows)
{
    const ac_timestep_attr *attr = &p->attr.timestep;
    const ac_tensor *t = &p->input[0], *out = &p->output;
    int64_t half = attr->channels / 2;
    for (int64_t row = first; row < first + rows; row++) {
        double time = ac_element_get(t->data, t->dtype, row * t->stride[0]);
        int64_t at = ac_plain_row(out, row), stride = out->stride[1];
        for (int64_t i = 0; i < half; i++) {
            double f = exp(-log(10000.0) * (double)i / ((double)half - (double)attr->freq_shift));
            int64_t cosine = attr->flip_sin_to_cos ? i : i + half;
            int64_t sine = attr->flip_sin_to_cos ? i + half : i;
            ac_element_set(out->data, out->dtype, at + cosine * stride, cos(time * f));
            ac_element_set(out->data, out->dtype, at + sine * stride, sin(time * f));
        }
        if (attr->channels % 2) {
            ac_element_set(out->data, out->dtype, at + 2 * half * stride, 0.0);
        }
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

const ac_kernel ac_cpu_timestep_plain = {
    .name = "cpu.timestep.plain",
    .op = AC_OP_TIMESTEP,
    .supports = ac_plain_supports,
    .launch = launch,
};
