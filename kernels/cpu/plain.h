/* plain: helpers of the plain reference kernels.
 *
 * Plain kernels are the oracle of every backend: they read any float dtype at any strides, compute
 * in double and round once, to the dtype of their output.  Rows are all dimensions but the last.
 */
#ifndef AC_CPU_PLAIN_H
#define AC_CPU_PLAIN_H

#include "pool.h"

/* Elements a plain kernel converts at a time, in a buffer on the stack. */
#define AC_PLAIN_CHUNK 512

int64_t ac_plain_rows(const ac_tensor *t);
int64_t ac_plain_columns(const ac_tensor *t);
int64_t ac_plain_column_stride(const ac_tensor *t);
/* Where row `row` starts, in elements from data. */
int64_t ac_plain_row(const ac_tensor *t, int64_t row);

void ac_plain_load(double *to, const ac_tensor *t, int64_t offset, int64_t stride, int64_t count);
void ac_plain_store(const double *from, const ac_tensor *t, int64_t offset, int64_t stride,
                    int64_t count);
/* Columns [from, from + count) of row `row` of x with x2 (or NULL) beside it. */
void ac_plain_load_pair(double *to, const ac_tensor *x, const ac_tensor *x2, int64_t row,
                        int64_t from, int64_t count);

double ac_plain_act(ac_act act, double x);
/* out[r] = x[r] . w for `rows` vectors of k elements that lie `stride` apart. */
void ac_plain_dots(double *out, const double *x, int64_t stride, int64_t rows, const double *w,
                   int64_t k);

/* fn(job, first row, rows) over blocks of rows of about 16K elements. */
typedef void (*ac_plain_rows_fn)(const ac_problem *p, int64_t first, int64_t rows);
void ac_plain_over_rows(ac_lane *lane, const ac_problem *p, const ac_tensor *t,
                        ac_plain_rows_fn fn);
/* Copies src into dst, which have the same shape, converting on the way. */
void ac_plain_copy(ac_lane *lane, const ac_tensor *dst, const ac_tensor *src);
/* Copies x, of 4 dimensions, into y with its dimensions in another order: y's i is x's order[i]. */
void ac_plain_permute(ac_lane *lane, const ac_problem *p, const int order[4]);

bool ac_plain_supports(const ac_problem *p, const ac_caps *caps); /* everything */

#endif
