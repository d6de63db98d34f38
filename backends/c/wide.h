/* The instructions of AVX-512 that are used here, in C for AVX2, so that what is built on them is
 * tested on machines without them (SS_EMULATE_AVX512). Slow; sums are rounded as there, but for the
 * order within a pair of bf16. Denormal numbers are kept where the machine takes products of bf16 for
 * zero.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512DQ__
#undef __AVX512BF16__
#undef __AVX512VNNI__
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1

#define SS_WIDE static __attribute__((noinline, unused))
#define SS_EACH(i, n) for (int i = 0; i < (n); i++)

typedef int8_t ss_w8 __attribute__((vector_size(64)));
typedef uint8_t ss_wu8 __attribute__((vector_size(64)));
typedef int8_t ss_half_w8 __attribute__((vector_size(32)));
typedef uint16_t ss_half_wu16 __attribute__((vector_size(32)));
typedef int16_t ss_w16 __attribute__((vector_size(64)));
typedef uint16_t ss_wu16 __attribute__((vector_size(64)));
typedef int32_t ss_w32 __attribute__((vector_size(64)));
typedef uint32_t ss_wu32 __attribute__((vector_size(64)));
typedef uint64_t ss_wu64 __attribute__((vector_size(64)));
typedef float ss_wf __attribute__((vector_size(64)));
typedef double ss_wd __attribute__((vector_size(64)));

/* Arithmetic. */
SS_WIDE ss_wf ss_wide_fma(ss_wf a, ss_wf b, ss_wf c) {
    SS_EACH(i, 16) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
SS_WIDE ss_wd ss_wide_fma_f64(ss_wd a, ss_wd b, ss_wd c) {
    SS_EACH(i, 8) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
}
SS_WIDE ss_wf ss_wide_max(ss_wf a, ss_wf b) {
    SS_EACH(i, 16) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
}
SS_WIDE ss_wu64 ss_wide_mul_low(ss_wu64 a, ss_wu64 b) {
    return (a & 0xffffffffu) * (b & 0xffffffffu);
}
SS_WIDE float ss_wide_sum(ss_wf v) {
    for (int n = 8; n; n /= 2) SS_EACH(i, n) v[i] += v[i + n];
    return v[0];
}
SS_WIDE float ss_wide_largest(ss_wf v) {
    for (int n = 8; n; n /= 2) SS_EACH(i, n) v[i] = v[i] > v[i + n] ? v[i] : v[i + n];
    return v[0];
}
/* x less the nearest integer; of an infinity, 0. */
SS_WIDE ss_wf ss_wide_reduce(ss_wf x) {
    SS_EACH(i, 16) x[i] = isinf(x[i]) ? 0 : x[i] - rintf(x[i]);
    return x;
}
/* Whether not x < y. */
SS_WIDE uint16_t ss_wide_not_less(ss_wf x, ss_wf y) {
    uint16_t mask = 0;
    SS_EACH(i, 16) mask |= !(x[i] < y[i]) << i;
    return mask;
}
/* x 2^y for an integer y. */
SS_WIDE ss_wf ss_wide_scale(uint16_t mask, ss_wf x, ss_wf y) {
    SS_EACH(i, 16) {
        const float steps = y[i] > 1000 ? 1000 : y[i] < -1000 ? -1000 : y[i];
        x[i] = !(mask >> i & 1) ? 0 : y[i] != y[i] ? y[i] : ldexpf(x[i], (int)steps);
    }
    return x;
}

/* Products that are added up. */
SS_WIDE ss_wf ss_wide_dot_bf16(ss_wf sums, ss_wu32 a, ss_wu32 b) {
    sums = ss_wide_fma((ss_wf)(a & 0xffff0000u), (ss_wf)(b & 0xffff0000u), sums);
    return ss_wide_fma((ss_wf)(a << 16), (ss_wf)(b << 16), sums);
}
SS_WIDE ss_w32 ss_wide_dot_bytes(ss_w32 sums, ss_wu8 a, ss_w8 b) {
    SS_EACH(i, 16) SS_EACH(k, 4) sums[i] += a[4 * i + k] * b[4 * i + k];
    return sums;
}
SS_WIDE ss_w32 ss_wide_dot_words(ss_w16 a, ss_w16 b) {
    ss_w32 sums;
    SS_EACH(i, 16) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
}

/* To other types. */
SS_WIDE uint16_t ss_wide_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
SS_WIDE ss_wu16 ss_wide_pack_bf16(ss_wf high, ss_wf low) {
    ss_wu16 v;
    SS_EACH(i, 16) v[i] = ss_wide_to_bf16(low[i]), v[16 + i] = ss_wide_to_bf16(high[i]);
    return v;
}

/* Memory; what is masked out is not touched. */
SS_WIDE __m256i ss_wide_some_halves(uint16_t mask, const void *p) {
    uint16_t halves[16] = {0};
    SS_EACH(i, 16) if (mask >> i & 1) memcpy(halves + i, (const uint16_t *)p + i, 2);
    __m256i v;
    memcpy(&v, halves, sizeof v);
    return v;
}
SS_WIDE ss_wf ss_wide_some_singles(uint16_t mask, const void *p) {
    float singles[16] = {0};
    SS_EACH(i, 16) if (mask >> i & 1) memcpy(singles + i, (const float *)p + i, 4);
    ss_wf v;
    memcpy(&v, singles, sizeof v);
    return v;
}
SS_WIDE ss_w32 ss_wide_load(const void *p) {
    ss_w32 v;
    memcpy(&v, p, sizeof v);
    return v;
}
SS_WIDE void ss_wide_store(void *p, ss_w32 v) { memcpy(p, &v, sizeof v); }

/* Elements in another order. */
SS_WIDE ss_wu16 ss_wide_permute(ss_wu16 at, ss_wu16 v) {
    ss_wu16 w;
    SS_EACH(i, 32) w[i] = v[at[i] & 31];
    return w;
}
SS_WIDE ss_wu16 ss_wide_permute_two(ss_wu16 a, ss_wu16 at, ss_wu16 b) {
    ss_wu16 w;
    SS_EACH(i, 32) w[i] = at[i] & 32 ? b[at[i] & 31] : a[at[i] & 31];
    return w;
}
/* Of each group of 16 bytes the words (or pairs of words) first and first + 1 of both. */
SS_WIDE ss_w32 ss_wide_zip(ss_w32 a, ss_w32 b, int first) {
    ss_w32 v;
    SS_EACH(i, 16) v[i] = (i & 1 ? b : a)[i / 4 * 4 + first + i % 4 / 2];
    return v;
}
SS_WIDE ss_wu64 ss_wide_zip_pairs(ss_wu64 a, ss_wu64 b, int first) {
    ss_wu64 v;
    SS_EACH(i, 8) v[i] = (i & 1 ? b : a)[i / 2 * 2 + first];
    return v;
}
SS_WIDE ss_w32 ss_wide_shuffle(ss_w32 a, ss_w32 b, int which) {
    ss_w32 v;
    SS_EACH(i, 16) v[i] = (i < 8 ? a : b)[(which >> i / 4 * 2 & 3) * 4 + i % 4];
    return v;
}

#define _mm512_fmadd_ps(a, b, c) ((__m512)ss_wide_fma((ss_wf)(a), (ss_wf)(b), (ss_wf)(c)))
#define _mm512_fmadd_pd(a, b, c) ((__m512d)ss_wide_fma_f64((ss_wd)(a), (ss_wd)(b), (ss_wd)(c)))
#define _mm512_max_ps(a, b) ((__m512)ss_wide_max((ss_wf)(a), (ss_wf)(b)))
#define _mm512_mul_epu32(a, b) ((__m512i)ss_wide_mul_low((ss_wu64)(a), (ss_wu64)(b)))
#define _mm512_reduce_add_ps(v) ss_wide_sum((ss_wf)(v))
#define _mm512_reduce_max_ps(v) ss_wide_largest((ss_wf)(v))
#define _mm512_reduce_ps(v, digits) ((__m512)ss_wide_reduce((ss_wf)(v)))
#define _mm512_cmp_ps_mask(a, b, not_less) ss_wide_not_less((ss_wf)(a), (ss_wf)(b))
#define _mm512_maskz_scalef_ps(m, a, b) ((__m512)ss_wide_scale(m, (ss_wf)(a), (ss_wf)(b)))
#define _mm512_dpbf16_ps(s, a, b) ((__m512)ss_wide_dot_bf16((ss_wf)(s), (ss_wu32)(a), (ss_wu32)(b)))
#define _mm512_dpbusd_epi32(s, a, b)                                                               \
    ((__m512i)ss_wide_dot_bytes((ss_w32)(s), (ss_wu8)(a), (ss_w8)(b)))
#define _mm512_madd_epi16(a, b) ((__m512i)ss_wide_dot_words((ss_w16)(a), (ss_w16)(b)))
#define _mm512_cvtne2ps_pbh(high, low) ss_wide_pack_bf16((ss_wf)(high), (ss_wf)(low))
#define _mm512_cvtepi8_epi16(x) ((__m512i)__builtin_convertvector((ss_half_w8)(x), ss_w16))
#define _mm512_cvtepu16_epi32(x) ((__m512i)__builtin_convertvector((ss_half_wu16)(x), ss_wu32))
#define _mm256_maskz_loadu_epi16(m, p) ss_wide_some_halves(m, p)
#define _mm512_maskz_loadu_ps(m, p) ((__m512)ss_wide_some_singles(m, p))
#define _mm512_set1_epi32(x) ((__m512i)((ss_w32){0} + (int32_t)(x)))
#define _mm512_loadu_si512(p) ((__m512i)ss_wide_load(p))
#define _mm512_storeu_ps(p, v) ss_wide_store(p, (ss_w32)(v))
#define _mm512_stream_si512(p, v) ss_wide_store(p, (ss_w32)(v))
#define _mm512_permutexvar_epi16(at, v) ((__m512i)ss_wide_permute((ss_wu16)(at), (ss_wu16)(v)))
#define _mm512_permutex2var_epi16(a, at, b)                                                        \
    ((__m512i)ss_wide_permute_two((ss_wu16)(a), (ss_wu16)(at), (ss_wu16)(b)))
#define _mm512_unpacklo_epi32(a, b) ((__m512i)ss_wide_zip((ss_w32)(a), (ss_w32)(b), 0))
#define _mm512_unpackhi_epi32(a, b) ((__m512i)ss_wide_zip((ss_w32)(a), (ss_w32)(b), 2))
#define _mm512_unpacklo_epi64(a, b) ((__m512i)ss_wide_zip_pairs((ss_wu64)(a), (ss_wu64)(b), 0))
#define _mm512_unpackhi_epi64(a, b) ((__m512i)ss_wide_zip_pairs((ss_wu64)(a), (ss_wu64)(b), 1))
#define _mm512_shuffle_i32x4(a, b, which)                                                          \
    ((__m512i)ss_wide_shuffle((ss_w32)(a), (ss_w32)(b), which))
