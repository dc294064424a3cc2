/* rowwise: activations and gates over evenly spaced rows of f16, bf16, f32, 16 bytes at a time. */
#ifndef AC_CUDA_ROWWISE_H
#define AC_CUDA_ROWWISE_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ac_rowwise {
    void *to;
    const void *from; /* of a gate: [value|gate], twice as many columns; may be `to` otherwise */
    ac_dtype dtype;
    int64_t rows, columns;    /* of `to` */
    int64_t to_row, from_row; /* elements from row to row */
    ac_act act;
} ac_rowwise;

/* Columns, rows and addresses are multiples of 16 bytes, and there are fewer than 2^31 groups. */
bool ac_rowwise_fits(const ac_rowwise *r);

ac_status ac_cuda_act_rows(ac_lane *lane, const ac_rowwise *r);  /* act(x) */
ac_status ac_cuda_gate_rows(ac_lane *lane, const ac_rowwise *r); /* value act(gate) */

/* to [rows, columns[0] + columns[1]] = rows of both side by side.  Everything is in units of 16
 * bytes. */
typedef struct ac_join_rows {
    void *to;
    const void *from[2];
    ac_dtype dtype;
    int64_t rows, columns[2], from_row[2];
} ac_join_rows;

ac_status ac_cuda_join_rows(ac_lane *lane, const ac_join_rows *join);

#ifdef __cplusplus
}
#endif

#endif
