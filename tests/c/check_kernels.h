/* check_kernels: what test_kernels.c shares: a case, its input families, and the oracle.
 *
 *     check_cases.h -> [case] -> operands filled by a family -> plain kernel in f64 = expected
 *
 * A case is an ac_problem to be: op, attributes and operand shapes.  Operands may be made views
 * into larger buffers whose other elements are NaN, so a read outside is seen in the result.
 */
#ifndef CHECK_KERNELS_H
#define CHECK_KERNELS_H

#include "../../csrc/device.h"
#include "../../kernels/cpu/pool.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MAX_OPERANDS 6

typedef enum family { RANDOM, TINY, HUGE_VALUES, LARGE_MEAN, OUTLIER, FAMILIES } family;
static const char *const family_names[] = {"random", "tiny", "huge", "large_mean", "outlier"};

typedef struct check_case {
    ac_op op;
    ac_attr attr;
    int32_t n_inputs;
    ac_shape shape[MAX_OPERANDS]; /* rank -1: absent */
    ac_dtype dtype[MAX_OPERANDS]; /* ids are integers; x of to_nhwc is any */
    ac_shape wanted;              /* UPSAMPLE, FILL */
    ac_dtype out_dtype;
    int64_t id_limit;             /* ids are below it */
    bool strided;                 /* operands and output are views with gaps between rows */
    bool real;                    /* shape of a published model: --bench, and sampled checks */
} check_case;

static inline double
seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline uint64_t
next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

/* About normal: the sum of four uniforms, variance 1. */
static inline double
next_normal(uint64_t *state)
{
    uint64_t bits = next_random(state);
    double sum = 0.0;
    for (int i = 0; i < 4; i++) {
        sum += (double)(bits >> 16 * i & 0xffff) / 65536.0 - 0.5;
    }
    return sum * 1.7320508;
}

/* Elements between the rows of a strided operand.  16-bit kernels load 16 bytes at a time, so there
 * it is 8: with an odd gap only the plain kernels would ever see a view. */
static int64_t view_gap = 5;

/* A view with gaps: the last dimension is longer in memory, rows of the image too. */
static inline int64_t
view_strides(ac_tensor *t, bool strided)
{
    int64_t step = 1;
    for (int i = t->shape.rank - 1; i >= 0; i--) {
        t->stride[i] = step;
        step *= t->shape.dim[i] + (strided && i == t->shape.rank - 1 ? view_gap : 0);
    }
    return AC_MAX(step, 1);
}

/* Operand `slot` filled by the family: x-like operands carry it, weights stay random of a size
 * that keeps results near 1. */
static inline void
fill_operand(const check_case *c, int32_t slot, family family, ac_tensor *t, int64_t span,
             uint64_t *state)
{
    int64_t count = ac_tensor_count(t), fan_in = 1;
    bool weight = slot == 1 && (c->op == AC_OP_LINEAR || c->op == AC_OP_CONV2D ||
                                c->op == AC_OP_UP_CONV2D);
    for (int i = c->op == AC_OP_UP_CONV2D ? 2 : 1; weight && i < t->shape.rank; i++) {
        fan_in *= t->shape.dim[i];
    }
    double size = weight ? 1.0 / sqrt((double)fan_in) : 1.0, mean = 0.0;
    bool data = slot == 0 || (c->op == AC_OP_ATTENTION && slot < 3) || c->op == AC_OP_ADD ||
                c->op == AC_OP_CONCAT;
    if (data && family != RANDOM && family != OUTLIER) {
        size *= family == TINY ? 1e-18 : family == HUGE_VALUES ? 1e15 : 1.0;
        mean = family == LARGE_MEAN ? 1000.0 : 0.0;
    }
    for (int64_t i = 0; ac_dtype_is_float(t->dtype) && span != count && i < span; i++) {
        ac_element_set(t->data, t->dtype, i, NAN);
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t at = span == count ? i : 0, rest = i;
        for (int d = t->shape.rank - 1; span != count && d >= 0; d--) {
            at += rest % t->shape.dim[d] * t->stride[d];
            rest /= t->shape.dim[d];
        }
        double value = mean + size * next_normal(state);
        if (!ac_dtype_is_float(t->dtype)) {
            value = (double)(next_random(state) % (uint64_t)AC_MAX(c->id_limit, 1));
        }
        ac_element_set(t->data, t->dtype, at, value);
    }
    if (data && family == OUTLIER && count && ac_dtype_is_float(t->dtype)) {
        ac_element_set(t->data, t->dtype, 0, 1e4);
    }
}

/* ---- tolerances ------------------------------------------------------------------------------ */

typedef struct tolerance {
    double nmse; /* mean square of the error over that of the expected values */
    double most; /* largest error over the largest expected value */
} tolerance;

/* f32 kernels against the same inputs in double. */
static inline tolerance
tolerance_of(ac_op op, family family)
{
    switch (op) {
    case AC_OP_LINEAR:
    case AC_OP_CONV2D:
    case AC_OP_UP_CONV2D: /* blocked f32 sums of up to 23040 products: a few 1e-7 a result; more
                           * where a mean of 1000 is summed in one chain, as a library may do */
        return (tolerance){family == LARGE_MEAN ? 4e-11 : 1e-11, 2e-5};
    case AC_OP_ATTENTION: /* exp of scores up to 100 turns their 6e-8 into 6e-6 */
        return (tolerance){1e-10, 1e-4};
    case AC_OP_GROUP_NORM:
    case AC_OP_LAYER_NORM: /* a mean of 1000 rounded once is off by 3e-5 of a deviation of 1 */
        return family == LARGE_MEAN ? (tolerance){1e-9, 3e-5} : (tolerance){1e-12, 1e-5};
    case AC_OP_TIMESTEP: /* sine and cosine of arguments up to 1000 */
        return (tolerance){1e-12, 1e-6};
    default: /* one or two roundings, or an exp or erf good to some ulps */
        return (tolerance){1e-13, 2e-6};
    }
}

/* ---- the oracle ------------------------------------------------------------------------------ */

static inline void
narrow(ac_tensor *t, int dimension, int64_t start, int64_t length)
{
    t->data = (char *)t->data + start * t->stride[dimension] * (int64_t)ac_dtype_size(t->dtype);
    t->shape.dim[dimension] = length;
}

/* All dimensions but the last to the row at flat position `row`. */
static inline void
narrow_row(ac_tensor *t, int64_t row)
{
    for (int d = t->shape.rank - 2; d >= 0; d--) {
        int64_t dim = t->shape.dim[d];
        narrow(t, d, row % dim, 1);
        row /= dim;
    }
}

/* The part of a convolution that makes output pixel (image, y, x) of channel o: the operands
 * become views of the patch, the padding shrinks to what is left of it. */
static inline void
narrow_conv(ac_problem *p, const int64_t at[4])
{
    ac_conv2d_attr *attr = &p->attr.conv2d;
    ac_tensor *x = &p->input[AC_CONV_X], *w = &p->input[AC_CONV_W];
    int64_t pad[2][2], from[2], to[2];
    const int64_t first_pad[2] = {attr->pad_top, attr->pad_left};
    for (int d = 0; d < 2; d++) {
        int64_t start = at[1 + d] * attr->stride - first_pad[d], end = start + w->shape.dim[2 + d];
        from[d] = AC_MIN(AC_MAX(start, 0), x->shape.dim[1 + d]);
        to[d] = AC_MAX(AC_MIN(end, x->shape.dim[1 + d]), from[d]);
        pad[d][0] = from[d] - start;
        pad[d][1] = end - to[d];
    }
    for (int32_t slot = 0; slot < p->n_inputs; slot++) {
        ac_tensor *t = &p->input[slot];
        if (t->shape.rank < 0) {
            continue;
        }
        if (slot == AC_CONV_X || slot == AC_CONV_X2) {
            narrow(t, 0, at[0], 1);
            narrow(t, 1, from[0], to[0] - from[0]);
            narrow(t, 2, from[1], to[1] - from[1]);
        } else if (slot == AC_CONV_RESIDUAL) {
            for (int d = 0; d < 4; d++) {
                narrow(t, d, at[d], 1);
            }
        } else {
            narrow(t, 0, at[3], 1);
        }
    }
    attr->pad_top = (int32_t)pad[0][0];
    attr->pad_bottom = (int32_t)pad[0][1];
    attr->pad_left = (int32_t)pad[1][0];
    attr->pad_right = (int32_t)pad[1][1];
    attr->stride = 1;
}

/* Output pixel (y, x) of an up_conv2d is one of a 2x2 convolution, by the filter of its phase. */
static inline void
narrow_up_conv(ac_problem *p, const int64_t at[4])
{
    ac_tensor *w = &p->input[AC_CONV_W];
    int32_t odd_y = (int32_t)(at[1] & 1), odd_x = (int32_t)(at[2] & 1);
    ac_act act = p->attr.up_conv2d.act;
    narrow(w, 0, 2 * odd_y + odd_x, 1);
    w->shape.rank = 4;
    memmove(w->shape.dim, w->shape.dim + 1, 4 * sizeof *w->shape.dim);
    memmove(w->stride, w->stride + 1, 4 * sizeof *w->stride);
    p->op = AC_OP_CONV2D;
    p->attr.conv2d = (ac_conv2d_attr){1, 1 - odd_y, 1 - odd_x, odd_y, odd_x, act};
    narrow_conv(p, (const int64_t[]){at[0], at[1] / 2, at[2] / 2, at[3]});
}

/* Of two halves of a dimension, the same element. */
static inline void
narrow_halves(ac_tensor *t, int dimension, int64_t at)
{
    int64_t half = t->shape.dim[dimension] / 2;
    narrow(t, dimension, at, 2);
    t->stride[dimension] *= half;
}

/* One output element of an op whose full oracle would take too long.  False: no such part. */
static inline bool
narrow_problem(ac_problem *p, int64_t row, int64_t column)
{
    if (p->op == AC_OP_LINEAR) {
        for (int32_t slot = 0; slot < p->n_inputs; slot++) {
            ac_tensor *t = &p->input[slot];
            bool weight = slot == AC_LINEAR_W || slot == AC_LINEAR_B;
            if (t->shape.rank >= 0 && weight && p->attr.linear.gated) {
                narrow_halves(t, 0, column); /* value and gate */
            } else if (t->shape.rank >= 0 && weight) {
                narrow(t, 0, column, 1);
            } else if (t->shape.rank >= 0) {
                narrow_row(t, row);
                if (slot == AC_LINEAR_RESIDUAL) {
                    narrow(t, t->shape.rank - 1, column, 1);
                }
            }
        }
        return true;
    }
    if (p->op == AC_OP_CONV2D) {
        const int64_t *dim = p->output.shape.dim;
        narrow_conv(p, (int64_t[]){row / dim[2] / dim[1], row / dim[2] % dim[1], row % dim[2],
                                   column});
        return true;
    }
    if (p->op == AC_OP_UP_CONV2D && !ac_operand(p, AC_CONV_RESIDUAL)) {
        const int64_t *dim = p->output.shape.dim;
        narrow_up_conv(p, (int64_t[]){row / dim[2] / dim[1], row / dim[2] % dim[1], row % dim[2],
                                      column});
        return true;
    }
    if (p->op == AC_OP_ATTENTION && !p->attr.attention.causal) {
        int64_t tokens = p->input[0].shape.dim[1], d = p->output.shape.dim[2];
        d /= p->attr.attention.heads;
        for (int32_t slot = 0; slot < p->n_inputs; slot++) {
            ac_tensor *t = &p->input[slot];
            if (t->shape.rank >= 0) {
                narrow(t, 0, row / tokens, 1);
                if (slot != AC_ATTN_MASK) {
                    narrow(t, 2, column / d * d, d);
                }
            }
        }
        narrow(&p->input[0], 1, row % tokens, 1);
        p->attr.attention.heads = 1;
        return true;
    }
    return false;
}

#endif
