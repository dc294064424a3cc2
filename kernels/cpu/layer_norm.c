/* layer_norm: y = (x - mean) / sqrt(variance + eps) gamma + beta over the last dimension.
 *
 * Plain: mean first, then the squares of what is left.
 */
#include "plain.h"

#include <math.h>

typedef struct job {
    const ac_problem *p;
    int64_t columns;
} job;

static void
tile(void *arg, int64_t row, void *scratch)
{
    const job *j = arg;
    const ac_problem *p = j->p;
    const ac_tensor *gamma = &p->input[AC_LN_GAMMA], *beta = &p->input[AC_LN_BETA];
    double *line = scratch, sum = 0.0, squares = 0.0, count = (double)j->columns;
    ac_plain_load_pair(line, &p->input[0], NULL, row, 0, j->columns);
    for (int64_t c = 0; c < j->columns; c++) {
        sum += line[c];
    }
    double mean = sum / count;
    for (int64_t c = 0; c < j->columns; c++) {
        squares += (line[c] - mean) * (line[c] - mean);
    }
    double scale = 1.0 / sqrt(squares / count + (double)p->attr.layer_norm.eps);
    for (int64_t c = 0; c < j->columns; c++) {
        line[c] = (line[c] - mean) * scale *
                      ac_element_get(gamma->data, gamma->dtype, c * gamma->stride[0]) +
                  ac_element_get(beta->data, beta->dtype, c * beta->stride[0]);
    }
    ac_plain_store(line, &p->output, ac_plain_row(&p->output, row),
                   ac_plain_column_stride(&p->output), j->columns);
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return sizeof(double) * (size_t)ac_plain_columns(&p->output);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    job j = {.p = p, .columns = ac_plain_columns(&p->output)};
    ac_pool_run(lane, ac_plain_rows(&p->output), tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_layer_norm_plain = {
    .name = "cpu.layer_norm.plain",
    .op = AC_OP_LAYER_NORM,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
