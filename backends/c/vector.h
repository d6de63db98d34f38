/* Vectors of f32 of the machine's own width: AVX-512, AVX2, or what the compiler makes of 16 bytes
 * (SSE, NEON). Defining SS_NARROW as 8 or 4 before including this takes a narrower width. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(SS_EMULATE_AVX512)
#include "wide.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef SS_INLINE
#define SS_INLINE static inline __attribute__((always_inline, unused))
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(SS_NARROW)
#define SS_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && (!defined(SS_NARROW) || SS_NARROW >= 8)
#define SS_LANES 8
#else
#define SS_LANES 4
#endif

typedef float ss_vf __attribute__((vector_size(4 * SS_LANES)));
typedef int32_t ss_vi __attribute__((vector_size(4 * SS_LANES)));
typedef uint32_t ss_vu __attribute__((vector_size(4 * SS_LANES)));
typedef uint64_t ss_vq __attribute__((vector_size(4 * SS_LANES)));
typedef uint16_t ss_vh __attribute__((vector_size(2 * SS_LANES)));

SS_INLINE ss_vf ss_vset(float x) { return x - (ss_vf){0}; }
SS_INLINE ss_vf ss_vload(const float *p) { ss_vf v; memcpy(&v, p, sizeof v); return v; }
SS_INLINE void ss_vstore(float *p, ss_vf v) { memcpy(p, &v, sizeof v); }

/* a * b + c, rounded once where the machine can. */
SS_INLINE ss_vf ss_vfma(ss_vf a, ss_vf b, ss_vf c) {
#if SS_LANES == 16
    return (ss_vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SS_LANES == 8
    return (ss_vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
    return (ss_vf)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON)
    return (ss_vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* The product of the low halves of each lane; what their high halves are does not matter. */
SS_INLINE ss_vq ss_vmul_low(ss_vq a, ss_vq b) {
#if SS_LANES == 16
    return (ss_vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif SS_LANES == 8
    return (ss_vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (ss_vq)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

/* bf16 in memory, f32 in registers. */
SS_INLINE ss_vf ss_vload_bf16(const uint16_t *p) {
    ss_vh h;
    memcpy(&h, p, sizeof h);
    return (ss_vf)(__builtin_convertvector(h, ss_vu) << 16);
}

/* Fetches so many bytes into the cache. */
SS_INLINE void ss_fetch(const char *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

/* max and select by a mask of all ones or zeros per lane. */
SS_INLINE ss_vf ss_vselect(ss_vi mask, ss_vf a, ss_vf b) {
    return (ss_vf)(((ss_vi)a & mask) | ((ss_vi)b & ~mask));
}
/* Where either is NaN: b. */
SS_INLINE ss_vf ss_vmax(ss_vf a, ss_vf b) {
#if SS_LANES == 16
    return (ss_vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif SS_LANES == 8
    return (ss_vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return ss_vselect(a > b, a, b);
#endif
}
/* Lanes from the n-th on filled. */
SS_INLINE ss_vf ss_vfill(ss_vf v, int64_t n, float with) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ss_vi lane;
    memcpy(&lane, numbers, sizeof lane);
    return ss_vselect(lane < (int32_t)n, v, ss_vset(with));
}
/* Sum, and maximum of numbers, of all lanes. */
SS_INLINE float ss_vsum(ss_vf v) {
#if SS_LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < SS_LANES; i++) total += v[i];
    return total;
#endif
}
SS_INLINE float ss_vlargest(ss_vf v) {
#if SS_LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float largest = v[0];
    for (int i = 1; i < SS_LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
#endif
}

/* 2^f for |f| <= 1/2 by a polynomial, within 1e-7 or, where it is rounded to bf16 anyway, 3e-6. */
SS_INLINE ss_vf ss_vexp2_series(ss_vf f, const int rough) {
    if (rough) {
        ss_vf p = ss_vset(9.58285294e-3f);
        p = ss_vfma(p, f, ss_vset(5.59064262e-2f));
        p = ss_vfma(p, f, ss_vset(2.40240991e-1f));
        p = ss_vfma(p, f, ss_vset(6.93124175e-1f));
        return ss_vfma(p, f, ss_vset(1.0f));
    }
    ss_vf p = ss_vset(1.54614478e-4f);
    p = ss_vfma(p, f, ss_vset(1.33908668e-3f));
    p = ss_vfma(p, f, ss_vset(9.61805694e-3f));
    p = ss_vfma(p, f, ss_vset(5.55035695e-2f));
    p = ss_vfma(p, f, ss_vset(2.40226507e-1f));
    p = ss_vfma(p, f, ss_vset(6.93147182e-1f));
    return ss_vfma(p, f, ss_vset(1.0f));
}
/* 2^x, 0 below the smallest normal number; right up to x < 127.5. */
SS_INLINE ss_vf ss_vexp2(ss_vf x, const int rough) {
#if SS_LANES == 16 && defined(__AVX512DQ__)
    const ss_vf f = (ss_vf)_mm512_reduce_ps((__m512)x, 0); /* x less the nearest integer */
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)ss_vset(-126.0f), _CMP_NLT_UQ);
    return (ss_vf)_mm512_maskz_scalef_ps(normal, (__m512)ss_vexp2_series(f, rough), (__m512)(x - f));
#else
    const ss_vf a = ss_vmax(ss_vset(-127.0f), x);
    const ss_vf shifted = a + 12582912.0f; /* rounds: its low bits are i */
    const ss_vf p = ss_vexp2_series(a - (shifted - 12582912.0f), rough);
    return p * (ss_vf)(((ss_vi)shifted + 127) << 23); /* for i = -127 this factor is 0 */
#endif
}

/* -- products of pairs of bf16: each lane of 32 bits holds two neighbours of the summed dimension -- */

#if SS_LANES == 16 && defined(__AVX512BF16__)
#define SS_BF16_DOT 1
#endif
#if SS_LANES == 16
/* Two rows of 32 neighbours to pairs of one of each: a low, b high. */
SS_INLINE void ss_vpair_bf16(ss_vu a, ss_vu b, ss_vu pairs[2]) {
    const ss_vu lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const ss_vu first = lanes | (lanes + 32) << 16; /* elements k of a and of b */
    pairs[0] = (ss_vu)_mm512_permutex2var_epi16((__m512i)a, (__m512i)first, (__m512i)b);
    pairs[1] = (ss_vu)_mm512_permutex2var_epi16((__m512i)a, (__m512i)(first + 0x100010u), (__m512i)b);
}
#endif
#ifdef SS_BF16_DOT
SS_INLINE ss_vu ss_vuset(uint32_t x) { return x - (ss_vu){0}; }
/* acc + a.low b.low + a.high b.high */
SS_INLINE ss_vf ss_vdot_bf16(ss_vf acc, ss_vu a, ss_vu b) {
    return (ss_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
/* 32 neighbours, low first, as 16 pairs. */
SS_INLINE ss_vu ss_vpack_bf16(ss_vf low, ss_vf high) {
    return (ss_vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

/* -- f64 --------------------------------------------------------------------------------------- */

typedef double ss_vd __attribute__((vector_size(4 * SS_LANES)));

SS_INLINE ss_vd ss_vdset(double x) { return x - (ss_vd){0}; }
SS_INLINE ss_vd ss_vdfma(ss_vd a, ss_vd b, ss_vd c) {
#if SS_LANES == 16
    return (ss_vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif SS_LANES == 8
    return (ss_vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    return (ss_vd)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}
/* Where either is NaN: b. */
SS_INLINE ss_vd ss_vdmax(ss_vd a, ss_vd b) {
    for (int i = 0; i < SS_LANES / 2; i++) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
SS_INLINE ss_vd ss_vdfill(ss_vd v, int64_t n, double with) {
    for (int i = 0; i < SS_LANES / 2; i++) v[i] = i < n ? v[i] : with;
    return v;
}
SS_INLINE double ss_vdsum(ss_vd v) {
    double total = 0;
    for (int i = 0; i < SS_LANES / 2; i++) total += v[i];
    return total;
}
SS_INLINE double ss_vdlargest(ss_vd v) {
    double largest = v[0];
    for (int i = 1; i < SS_LANES / 2; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
}
SS_INLINE ss_vd ss_vdexp2(ss_vd x) {
    for (int i = 0; i < SS_LANES / 2; i++) x[i] = exp2(x[i]);
    return x;
}
