/* linear: y = act([x|x2] w^T + b) + residual, or value * act(gate) + residual.
 *
 * Plain: a tile is 16 rows by 64 columns; its rows lie in scratch as doubles, and each row of w is
 * converted once a tile.
 */
#include "plain.h"

#define ROWS 16
#define COLUMNS 64

typedef struct job {
    const ac_problem *p;
    int64_t rows, n, k, column_tiles;
} job;

static void
tile(void *arg, int64_t index, void *scratch)
{
    const job *j = arg;
    const ac_problem *p = j->p;
    const ac_linear_attr *attr = &p->attr.linear;
    const ac_tensor *w = &p->input[AC_LINEAR_W], *b = ac_operand(p, AC_LINEAR_B);
    const ac_tensor *residual = ac_operand(p, AC_LINEAR_RESIDUAL);
    int64_t row0 = index / j->column_tiles * ROWS, rows = AC_MIN(j->rows - row0, ROWS);
    int64_t n0 = index % j->column_tiles * COLUMNS, n1 = AC_MIN(n0 + COLUMNS, j->n);
    double *x = scratch, *line = x + ROWS * j->k, sums[2][ROWS];
    for (int64_t r = 0; r < rows; r++) {
        ac_plain_load_pair(x + r * j->k, &p->input[0], ac_operand(p, AC_LINEAR_X2), row0 + r, 0,
                           j->k);
    }
    for (int64_t n = n0; n < n1; n++) {
        for (int half = 0; half <= attr->gated; half++) {
            int64_t o = n + half * j->n;
            double bias = b ? ac_element_get(b->data, b->dtype, o * b->stride[0]) : 0.0;
            ac_plain_load(line, w, o * w->stride[0], w->stride[1], j->k);
            ac_plain_dots(sums[half], x, j->k, rows, line, j->k);
            for (int64_t r = 0; r < rows; r++) {
                sums[half][r] += bias;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            double y = attr->gated ? sums[0][r] * ac_plain_act(attr->act, sums[1][r])
                                   : ac_plain_act(attr->act, sums[0][r]);
            if (residual) {
                int64_t at = ac_plain_row(residual, row0 + r) +
                             n * ac_plain_column_stride(residual);
                y += ac_element_get(residual->data, residual->dtype, at);
            }
            int64_t at =
                ac_plain_row(&p->output, row0 + r) + n * ac_plain_column_stride(&p->output);
            ac_element_set(p->output.data, p->output.dtype, at, y);
        }
    }
}

static size_t
worker_scratch(const ac_problem *p, const ac_caps *caps)
{
    (void)caps;
    return sizeof(double) * (size_t)p->input[AC_LINEAR_W].shape.dim[1] * (ROWS + 1);
}

static ac_status
launch(ac_lane *lane, const ac_problem *p, void *scratch, const void *prepared)
{
    (void)scratch;
    (void)prepared;
    job j = {.p = p,
             .rows = ac_plain_rows(&p->output),
             .n = ac_plain_columns(&p->output),
             .k = p->input[AC_LINEAR_W].shape.dim[1]};
    j.column_tiles = (j.n + COLUMNS - 1) / COLUMNS;
    ac_pool_run(lane, (j.rows + ROWS - 1) / ROWS * j.column_tiles, tile, &j);
    return AC_OK;
}

const ac_kernel ac_cpu_linear_plain = {
    .name = "cpu.linear.plain",
    .op = AC_OP_LINEAR,
    .supports = ac_plain_supports,
    .worker_scratch = worker_scratch,
    .launch = launch,
};
