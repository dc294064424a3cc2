/* gemm_core: packing and the micro-kernel of the GEMM engine, for one instruction set.
 *
 * simd -> [gemm_core] -> gemm.inc (linear, convolutions), attention.inc
 *
 *     C[m, n] (+)= sum over taps t, channels c of A[m, t][c0 + c] B[t, c][n]
 *
 * Rows of A are used where they lie, through a table of row pointers, one a tap: a convolution
 * needs no patch matrix, and a tap outside the image points at zeros.  B is packed into panels NR
 * columns wide, [taps][len][NR], so that the inner loop reads it in order.  Each result is one
 * chain of multiply-adds over k in a block, whatever the tile: so tiles may be cut at will and
 * the bits stay.
 */
#ifndef AC_CPU_GEMM_CORE_H
#define AC_CPU_GEMM_CORE_H

#include "simd.h"

/* Rows by columns of the register tile: accumulators plus one row of B plus one element of A. */
#if AC_SIMD == ISA_AVX512
#define MR 12
#elif AC_SIMD == ISA_AVX2
#define MR 6
#else
#define MR 6
#endif
#define NR (2 * VW)

/* One k-block of a tile. */
typedef struct gemm_block {
    const float *const *rows; /* [taps][row_step]: where row m's channels of a tap begin */
    int64_t row_step, taps, c0, len;
    const float *packed;      /* panels of [taps][len][panel columns] */
    float *const *out;        /* [rows]: where column 0 of the tile goes */
    const float *bias;        /* [columns] of the tile, added by the first block; or NULL */
    float *const *residual;   /* [rows], added at the end; or NULL */
    bool add;                 /* to what is in out */
    int64_t columns;
} gemm_block;

/* ---- packing -------------------------------------------------------------------------------- */

/* Rows of B^T, VW of them from `from`, ld apart, `count` exist: elements [0, len * taps), which
 * lie as [len][taps], go to column `at` of a panel as [taps][len]. */
INLINE void
pack_strip(float *to, int64_t width, int64_t at, const float *from, int64_t ld, int64_t count,
           int64_t len, int64_t taps)
{
    int64_t channel = 0, tap = 0;
    for (int64_t s = 0; s < len * taps; s += VW) {
        int64_t n = AC_MIN(len * taps - s, VW);
        vec x[VW];
        if (count >= VW && n == VW) {
#pragma GCC unroll 16
            for (int i = 0; i < VW; i++) {
                x[i] = v_load(from + i * ld + s);
            }
        } else {
            for (int i = 0; i < VW; i++) {
                x[i] = i < count ? v_load_n(from + i * ld + s, n) : v_zero();
            }
        }
        v_transpose(x);
        if (taps == 1) {
            float *line = to + s * width + at;
            if (n == VW) {
#pragma GCC unroll 16
                for (int i = 0; i < VW; i++) {
                    v_store(line + i * width, x[i]);
                }
            } else {
                for (int i = 0; i < n; i++) {
                    v_store(line + i * width, x[i]);
                }
            }
        } else {
            for (int i = 0; i < n; i++) {
                v_store(to + (tap * len + channel) * width + at, x[i]);
                if (++tap == taps) {
                    tap = 0;
                    channel++;
                }
            }
        }
    }
}

/* ---- micro-kernel --------------------------------------------------------------------------- */

/* `mr` rows from row m on, `nv` vectors of columns from panel column n0 on. */
INLINE void
micro(const int mr, const int nv, const gemm_block *b, int64_t m, int64_t n0)
{
    vec acc[MR][2];
    const int64_t width = nv * VW;
    const float *panel = b->packed + n0 * b->taps * b->len;
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
        acc[i][0] = acc[i][1] = v_zero();
    }
    for (int64_t tap = 0; tap < b->taps; tap++) {
        const float *const *row = b->rows + tap * b->row_step + m;
        const float *a[MR];
#pragma GCC unroll 16
        for (int i = 0; i < mr; i++) {
            a[i] = row[i] + b->c0;
        }
        for (int64_t k = 0; k < b->len; k++, panel += width) {
            vec b0 = v_load(panel), b1 = nv > 1 ? v_load(panel + VW) : b0;
#pragma GCC unroll 16
            for (int i = 0; i < mr; i++) {
                vec x = v_set1(a[i][k]);
                acc[i][0] = v_fma(x, b0, acc[i][0]);
                if (nv > 1) {
                    acc[i][1] = v_fma(x, b1, acc[i][1]);
                }
            }
        }
    }
    vec bias[2];
#pragma GCC unroll 2
    for (int j = 0; j < nv; j++) {
        int64_t n = n0 + j * VW;
        bias[j] = b->bias ? v_load_n(b->bias + n, AC_MAX(b->columns - n, 0)) : v_zero();
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; i++) {
        float *out = b->out[m + i] + n0;
        const float *residual = b->residual ? b->residual[m + i] + n0 : NULL;
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) {
            int64_t n = b->columns - n0 - j * VW;
            vec x = acc[i][j] + bias[j];
            if (n <= 0) {
                continue;
            }
            if (b->add) {
                x += v_load_n(out + j * VW, n);
            }
            if (residual) {
                x += v_load_n(residual + j * VW, n);
            }
            v_store_n(out + j * VW, x, n);
        }
    }
}

/* One function for each height; what a tile's last rows need.  Same bits from all of them. */
#define MICRO(mr)                                                                                  \
    static void micro_##mr##x2(const gemm_block *b, int64_t m, int64_t n0)                         \
    {                                                                                              \
        micro(mr, 2, b, m, n0);                                                                    \
    }                                                                                              \
    static void micro_##mr##x1(const gemm_block *b, int64_t m, int64_t n0)                         \
    {                                                                                              \
        micro(mr, 1, b, m, n0);                                                                    \
    }
#if MR == 12
MICRO(12)
MICRO(8)
#else
MICRO(6)
#endif
MICRO(4)
MICRO(2)
MICRO(1)

typedef void (*micro_fn)(const gemm_block *b, int64_t m, int64_t n0);

static const struct micro_row {
    int64_t rows;
    micro_fn run[2]; /* one vector, two vectors of columns */
} micros[] = {
#if MR == 12
    {12, {micro_12x1, micro_12x2}}, {8, {micro_8x1, micro_8x2}},
#else
    {6, {micro_6x1, micro_6x2}},
#endif
    {4, {micro_4x1, micro_4x2}},    {2, {micro_2x1, micro_2x2}}, {1, {micro_1x1, micro_1x2}},
};

/* Columns of the panel that begins at n0: the last one may be half as wide. */
INLINE int64_t
panel_width(int64_t columns, int64_t n0)
{
    return columns - n0 > VW ? NR : VW;
}

/* Rows [m, end) by all columns.  Panels inside: a strip of A stays in L1 for all of them. */
static void
gemm_sweep(const gemm_block *b, int64_t m, int64_t end)
{
    const struct micro_row *kernel = micros;
    for (; m < end; m += kernel->rows) {
        while (end - m < kernel->rows) {
            kernel++;
        }
        for (int64_t n0 = 0; n0 < b->columns; n0 += NR) {
            kernel->run[b->columns - n0 > VW](b, m, n0);
        }
    }
}

#endif
