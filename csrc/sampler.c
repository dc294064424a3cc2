/* sampler: one row on the host, image by image: f32 storage, double arithmetic.
 *
 * What every backend's sampler is compared with. */
#include "sampler.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* Elements at a time: the double temporaries of a block stay in the first cache level. */
#define BLOCK 256

/* The pieces of an image: f32 pointers in basis order, NULL where there is no tensor (m is made
 * on the way). */
typedef struct sched_tensors {
    const float *basis[AC_BASIS_COUNT];
} sched_tensors;

/* out = a x + b e, before the clamp. */
static void
convert_block(const ac_sched_row *row, const float *x, const float *e, int64_t length,
              double *restrict out)
{
    for (int64_t i = 0; i < length; i++) {
        out[i] = row->m_x * (double)x[i] + row->m_e * (double)e[i];
    }
}

static void
clamp_block(double limit, double divisor, int64_t length, double *m)
{
    for (int64_t i = 0; i < length; i++) {
        double value = m[i] < -limit ? -limit : m[i] > limit ? limit : m[i];
        m[i] = value / divisor;
    }
}

/* out = sum of coefficient times basis over a block that starts at `at`. */
static void
combine_block(const double coefficient[AC_BASIS_COUNT], const sched_tensors *tensors,
              const double *m, int64_t at, int64_t length, double *restrict out)
{
    memset(out, 0, (size_t)length * sizeof *out);
    for (int32_t k = 0; k < AC_BASIS_COUNT; k++) {
        double c = coefficient[k];
        if (c == 0.0) {
            continue;
        }
        if (k == AC_BASIS_M) {
            for (int64_t i = 0; i < length; i++) {
                out[i] += c * m[i];
            }
            continue;
        }
        assert(tensors->basis[k]);
        const float *from = tensors->basis[k] + at;
        for (int64_t i = 0; i < length; i++) {
            out[i] += c * (double)from[i];
        }
    }
}

static void
write_block(const double *from, int64_t length, float *restrict to)
{
    for (int64_t i = 0; i < length; i++) {
        to[i] = (float)from[i];
    }
}

/* Puts the element of rank `k` at index k, smaller ones before it, larger ones after it. */
static void
select_rank(float *values, int64_t count, int64_t k)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        float pivot = values[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            for (; values[i] < pivot; i++) {
            }
            for (; values[j] > pivot; j--) {
            }
            if (i <= j) {
                float swap = values[i];
                values[i++] = values[j];
                values[j--] = swap;
            }
        }
        if (k <= j) {
            high = j;
        } else if (k >= i) {
            low = i;
        } else {
            return;
        }
    }
}

/* Quantile `q` of |m| over an image, linear between neighbours, as torch.quantile.  NaN in m gives
 * NaN. */
static double
image_quantile(const ac_sched_row *row, const float *x, const float *e, int64_t count, float *work)
{
    for (int64_t i = 0; i < count; i++) {
        work[i] = (float)fabs(row->m_x * (double)x[i] + row->m_e * (double)e[i]);
        if (isnan(work[i])) {
            return NAN;
        }
    }
    double rank = row->threshold * (double)(count - 1);
    int64_t below = (int64_t)rank;
    select_rank(work, count, below);
    double low = work[below];
    if (below + 1 >= count) {
        return low;
    }
    float high = work[below + 1];
    for (int64_t i = below + 2; i < count; i++) {
        high = work[i] < high ? work[i] : high;
    }
    return low + (rank - (double)below) * ((double)high - low);
}

/* Clamp limit and divisor of an image's m; infinity: no clamp. */
static void
limits_of(const ac_sched_row *row, const float *x, const float *e, int64_t count, float *work,
          double *limit, double *divisor)
{
    *limit = row->clip > 0.0 ? row->clip : INFINITY;
    *divisor = 1.0;
    if (row->threshold > 0.0) {
        double s = image_quantile(row, x, e, count, work);
        s = s < 1.0 ? 1.0 : s; /* NaN stays */
        *limit = *divisor = s > row->threshold_max ? row->threshold_max : s;
    }
}

static void
apply_image(const ac_sched_row *row, int64_t count, float *x, const float *e, const float *noise,
            float *const registers[AC_SCHED_REGISTERS], float *work)
{
    double m[BLOCK], next[BLOCK], stored[AC_SCHED_STORES][BLOCK], limit, divisor;
    sched_tensors tensors = {{[AC_BASIS_X] = x, [AC_BASIS_E] = e, [AC_BASIS_NOISE] = noise}};
    for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
        tensors.basis[AC_BASIS_R0 + i] = registers[i];
    }
    limits_of(row, x, e, count, work, &limit, &divisor);
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t length = AC_MIN(count - at, BLOCK);
        convert_block(row, x + at, e + at, length, m);
        if (limit < INFINITY || divisor != 1.0) {
            clamp_block(limit, divisor, length, m);
        }
        /* everything is read before anything is written */
        combine_block(row->x_next, &tensors, m, at, length, next);
        for (int32_t s = 0; s < row->n_stores; s++) {
            combine_block(row->store[s].c, &tensors, m, at, length, stored[s]);
        }
        write_block(next, length, x + at);
        for (int32_t s = 0; s < row->n_stores; s++) {
            write_block(stored[s], length, registers[row->store[s].to] + at);
        }
    }
}

void
ac_sched_apply(const ac_sched_row *row, int64_t n, int64_t count, float *x, const float *e,
               const float *noise, float *const *registers, float *work)
{
    assert(row->threshold == 0.0 || work);
    for (int64_t image = 0; image < n; image++) {
        int64_t offset = image * count;
        float *local[AC_SCHED_REGISTERS];
        for (int32_t i = 0; i < AC_SCHED_REGISTERS; i++) {
            local[i] = registers && registers[i] ? registers[i] + offset : NULL;
        }
        apply_image(row, count, x + offset, e + offset, noise ? noise + offset : NULL, local,
                    work);
    }
}
