/* simd: one vector type for all instruction sets, and the functions of it that kernels share.
 *
 * A file for one instruction set defines AC_SIMD (an AC_ISA_* number), sets the compiler's target
 * by pragma, and includes this; see gemm_avx512.c.  `v_` functions work on VW floats.  exp and
 * what is built on it are good to 2 units in the last place, gelu to 3e-7 of its value: both are
 * own fits (weighted least squares on Chebyshev nodes, equalised).
 */
#ifndef AC_CPU_SIMD_H
#define AC_CPU_SIMD_H

#include "../../csrc/kernel.h"

#include <immintrin.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline, unused))

#define ISA_BASE 0
#define ISA_AVX2 1
#define ISA_AVX512 2

#if AC_SIMD == ISA_AVX512
#define VW 16
#define ISA_NAME(x) x##_avx512
#define ISA_TEXT "avx512"
typedef __m512 vec;
typedef __m512i veci;
#define V(op) _mm512_##op
#elif AC_SIMD == ISA_AVX2
#define VW 8
#define ISA_NAME(x) x##_avx2
#define ISA_TEXT "avx2"
typedef __m256 vec;
typedef __m256i veci;
#define V(op) _mm256_##op
#else
#define VW 4
#define ISA_NAME(x) x##_base
#define ISA_TEXT "base"
typedef __m128 vec;
typedef __m128i veci;
#define V(op) _mm_##op
#endif

INLINE vec
v_set1(float x)
{
    return V(set1_ps)(x);
}

INLINE vec
v_zero(void)
{
    return V(setzero_ps)();
}

INLINE vec
v_load(const float *p)
{
    return V(loadu_ps)(p);
}

INLINE void
v_store(float *p, vec x)
{
    V(storeu_ps)(p, x);
}

/* a b + c and c - a b; fused where the instruction set can. */
INLINE vec
v_fma(vec a, vec b, vec c)
{
#if AC_SIMD == ISA_BASE
    return a * b + c;
#else
    return V(fmadd_ps)(a, b, c);
#endif
}

INLINE vec
v_fnma(vec a, vec b, vec c)
{
#if AC_SIMD == ISA_BASE
    return c - a * b;
#else
    return V(fnmadd_ps)(a, b, c);
#endif
}

/* a b - c, in one rounding where the instruction set can: so it is <= 0 when c is a b rounded. */
INLINE vec
v_fms(vec a, vec b, vec c)
{
#if AC_SIMD == ISA_BASE
    return a * b - c;
#else
    return V(fmsub_ps)(a, b, c);
#endif
}

/* When x is NaN the result is NaN, so limits go first. */
INLINE vec
v_min(vec limit, vec x)
{
    return V(min_ps)(limit, x);
}

INLINE vec
v_max(vec limit, vec x)
{
    return V(max_ps)(limit, x);
}

/* The first n of VW elements; the others read as 0 and are not written. */
#if AC_SIMD == ISA_AVX512
INLINE vec
v_load_n(const float *p, int64_t n)
{
    return n >= VW ? v_load(p) : _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

INLINE void
v_store_n(float *p, vec x, int64_t n)
{
    _mm512_mask_storeu_ps(p, n >= VW ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1), x);
}
#elif AC_SIMD == ISA_AVX2
INLINE veci
v_mask(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)AC_MIN(n, VW)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vec
v_load_n(const float *p, int64_t n)
{
    return n >= VW ? v_load(p) : _mm256_maskload_ps(p, v_mask(n));
}

INLINE void
v_store_n(float *p, vec x, int64_t n)
{
    if (n >= VW) {
        v_store(p, x);
    } else {
        _mm256_maskstore_ps(p, v_mask(n), x);
    }
}
#else
INLINE vec
v_load_n(const float *p, int64_t n)
{
    float part[VW] = {0};
    for (int64_t i = 0; i < n && i < VW; i++) {
        part[i] = p[i];
    }
    return v_load(part);
}

INLINE void
v_store_n(float *p, vec x, int64_t n)
{
    float part[VW];
    v_store(part, x);
    for (int64_t i = 0; i < n && i < VW; i++) {
        p[i] = part[i];
    }
}
#endif

/* Over all lanes by halving: always the same order. */
#if AC_SIMD == ISA_AVX512
#define HALF_8(op) _mm256_##op(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))
#define HALF_4(op) _mm_##op(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1))
#elif AC_SIMD == ISA_AVX2
#define HALF_8(op) x
#define HALF_4(op) _mm_##op(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1))
#else
#define HALF_8(op) x
#define HALF_4(op) half
#endif
#define REDUCE(name, op)                                                                           \
    INLINE float name(vec x)                                                                       \
    {                                                                                              \
        __typeof__(HALF_8(op)) half = HALF_8(op);                                                  \
        __m128 four = HALF_4(op), two = _mm_##op(four, _mm_movehl_ps(four, four));                 \
        return _mm_cvtss_f32(_mm_##op(two, _mm_shuffle_ps(two, two, 1)));                          \
    }
REDUCE(v_sum, add_ps)
REDUCE(v_largest, max_ps)

INLINE vec
v_abs(vec x)
{
    return V(andnot_ps)(v_set1(-0.0f), x);
}

/* x < 0 (or -0): a, else b. */
INLINE vec
v_if_negative(vec x, vec a, vec b)
{
#if AC_SIMD == ISA_AVX512
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
#elif AC_SIMD == ISA_AVX2
    return _mm256_blendv_ps(b, a, x);
#else
    vec mask = _mm_castsi128_ps(_mm_srai_epi32(_mm_castps_si128(x), 31));
    return _mm_or_ps(_mm_and_ps(mask, a), _mm_andnot_ps(mask, b));
#endif
}

#if AC_SIMD == ISA_AVX512
#define VI(op) _mm512_##op
#define VI_CAST(x) _mm512_castsi512_ps(x)
#elif AC_SIMD == ISA_AVX2
#define VI(op) _mm256_##op
#define VI_CAST(x) _mm256_castsi256_ps(x)
#else
#define VI(op) _mm_##op
#define VI_CAST(x) _mm_castsi128_ps(x)
#endif

/* 2^n e^r, |r| <= ln 2 / 2.  Below -88 the exponent field becomes 0 and so does the result; above
 * 88.37 it stays there, finite.  NaN stays NaN. */
INLINE vec
v_exp(vec x)
{
    x = v_max(v_set1(-88.0f), v_min(v_set1(88.37f), x));
    veci n = VI(cvtps_epi32)(x * v_set1(1.44269504f));
    vec whole = VI(cvtepi32_ps)(n);
    vec r = v_fnma(whole, v_set1(0x1.62e4p-1f), x); /* ln 2 in two parts, the first short */
    r = v_fnma(whole, v_set1(0x1.7f7d1cp-20f), r);
    vec p = v_fma(r, v_set1(0.00138145965f), v_set1(0.00836871751f)); /* (e^r - 1 - r) / r^2 */
    p = v_fma(p, r, v_set1(0.041668389f));
    p = v_fma(p, r, v_set1(0.166665211f));
    p = v_fma(p, r, v_set1(0.49999994f));
    p = v_fma(p, r * r, r) + v_set1(1.0f);
    return p * VI_CAST(VI(slli_epi32)(VI(add_epi32)(n, VI(set1_epi32)(127)), 23));
}

/* 2^x for x <= 0, as softmax needs it: below -126 it stays at 2^-126, which no sum notices, rather
 * than make slow denormal numbers. */
INLINE vec
v_exp2_negative(vec x)
{
    x = v_max(v_set1(-126.0f), x);
#if AC_SIMD == ISA_AVX512
    vec whole = _mm512_roundscale_ps(x, 8);
#else
    veci n = VI(cvtps_epi32)(x);
    vec whole = VI(cvtepi32_ps)(n);
#endif
    vec r = x - whole;
    vec p = v_fma(r, v_set1(0.00132647122f), v_set1(0.00967152324f)); /* (2^r - 1) / r */
    p = v_fma(p, r, v_set1(0.0555073395f));
    p = v_fma(p, r, v_set1(0.240222424f));
    p = v_fma(p, r, v_set1(0.693147004f));
    p = v_fma(p, r, v_set1(1.0f));
#if AC_SIMD == ISA_AVX512
    return _mm512_scalef_ps(p, whole);
#else
    return p * VI_CAST(VI(slli_epi32)(VI(add_epi32)(n, VI(set1_epi32)(127)), 23));
#endif
}

/* x Phi(x).  With t = |x| and u = 1 / (1 + 0.3 t) the tail Phi(-t) is e^(-t^2/2) times a
 * polynomial in u, which keeps its relative precision far out. */
INLINE vec
v_gelu(vec x)
{
    vec t = v_abs(x);
    vec u = v_set1(1.0f) / v_fma(t, v_set1(0.3f), v_set1(1.0f));
    static const float c[] = {
        7.16925206e-06f, 0.11948768f, 0.121920399f, 0.0946832597f, 0.142536208f,
        -0.0765075535f,  0.22866109f, -0.169166639f, 0.0383784026f,
    };
    vec p = v_set1(c[8]);
    for (int i = 7; i >= 0; i--) {
        p = v_fma(p, u, v_set1(c[i]));
    }
    vec tail = p * v_exp(t * t * v_set1(-0.5f)) * x;
    return v_if_negative(x, tail, x - tail);
}

INLINE vec
v_sigmoid_times(vec x, vec y)
{
    return x / (v_set1(1.0f) + v_exp(v_zero() - y));
}

INLINE vec
v_act(ac_act act, vec x)
{
    switch (act) {
    case AC_ACT_SILU:
        return v_sigmoid_times(x, x);
    case AC_ACT_GELU:
        return v_gelu(x);
    case AC_ACT_GELU_TANH:
        return v_sigmoid_times(x, v_set1(1.59576912f) *
                                      v_fma(x * x * v_set1(0.044715f), x, x));
    case AC_ACT_QUICK_GELU:
        return v_sigmoid_times(x, x * v_set1(1.702f));
    case AC_ACT_RELU:
        return v_max(v_zero(), x);
    default:
        return x;
    }
}

/* y[0, n) = act(x[0, n)); the switch stays outside the loop. */
#define ACT_LOOP(which)                                                                            \
    case which:                                                                                    \
        for (int64_t i = 0; i < n; i += VW) {                                                      \
            v_store_n(y + i, v_act(which, v_load_n(x + i, n - i)), n - i);                         \
        }                                                                                          \
        break

static __attribute__((unused)) void
v_act_row(ac_act act, float *y, const float *x, int64_t n)
{
    switch (act) {
        ACT_LOOP(AC_ACT_SILU);
        ACT_LOOP(AC_ACT_GELU);
        ACT_LOOP(AC_ACT_GELU_TANH);
        ACT_LOOP(AC_ACT_QUICK_GELU);
        ACT_LOOP(AC_ACT_RELU);
    default:
        for (int64_t i = 0; i < n && x != y; i++) {
            y[i] = x[i];
        }
    }
}

/* Transposes VW x VW: row i of x becomes column i. */
INLINE void
v_transpose(vec x[VW])
{
#if AC_SIMD == ISA_AVX512
    vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* x[i + j]: column j of each 128-bit lane, rows i..i+3 */
        x[i] = _mm512_castpd_ps(
            _mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        x[i + 1] = _mm512_castpd_ps(
            _mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
        x[i + 2] = _mm512_castpd_ps(
            _mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
        x[i + 3] = _mm512_castpd_ps(
            _mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vec a = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
        vec b = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        vec c = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
        vec d = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
        t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        x[i] = t[i];
    }
#elif AC_SIMD == ISA_AVX2
    vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(x[j], x[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        x[i] = t[i];
    }
#else
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#endif
}

#endif
