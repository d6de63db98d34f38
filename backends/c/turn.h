/* Squares of words, turned in registers: SS_LANES vectors become as many, one of each lane. */
#pragma once
#include "vector.h"

#if defined(__AVX__) && SS_LANES >= 8
#define TURNS 1
#else
#define TURNS 0
#endif

#if TURNS
/* The same for eight vectors of eight, in place. */
SS_INLINE void turn_eight(__m256 *r) {
    __m256 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* r[i + c]: words c and 4 + c of rows i .. i + 3 */
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 low = r[i], high = r[4 + i];
        r[i] = _mm256_permute2f128_ps(low, high, 0x20);
        r[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
#endif

/* Lane l of vector c, which goes to out[c * stride], is lane c of v[l]. */
SS_INLINE void turn_vectors(const ss_vf *v, float *out, int64_t stride) {
#if SS_LANES == 16
    __m512i r[16], t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* r[4 q + i]: words 4 l + i of rows 4 q .. 4 q + 3 in lane l */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        float *o = out + i * stride;
        _mm512_storeu_ps(o, (__m512)_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
        _mm512_storeu_ps(o + 4 * stride, (__m512)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
        _mm512_storeu_ps(o + 8 * stride, (__m512)_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
        _mm512_storeu_ps(o + 12 * stride, (__m512)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
#elif TURNS
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = (__m256)v[i];
    turn_eight(r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) _mm256_storeu_ps(out + i * stride, r[i]);
#else
    for (int c = 0; c < SS_LANES; c++)
        for (int l = 0; l < SS_LANES; l++) out[c * stride + l] = v[l][c];
#endif
}

/* to[c][l] = from[l][c] for a square of words, rows so many words apart. */
SS_INLINE void turn_square(const void *from, int64_t from_row, void *to, int64_t to_row) {
    ss_vf v[SS_LANES];
#pragma GCC unroll 16
    for (int l = 0; l < SS_LANES; l++) v[l] = ss_vload((const float *)from + l * from_row);
    turn_vectors(v, to, to_row);
}

/* What a word is made of: an f32; a bf16 widened to it, two of bf16, or one and a zero; the same of f32
 * that are rounded to bf16. */
typedef enum { ONE_F32, ONE_HALF, TWO_HALVES, LOW_HALF, ONE_ROUNDED, TWO_ROUNDED, LOW_ROUNDED } ss_word;

SS_INLINE int64_t element_size(ss_word kind) { return kind == ONE_F32 || kind >= ONE_ROUNDED ? 4 : 2; }
SS_INLINE int is_pair(ss_word kind) { return kind == TWO_HALVES || kind == TWO_ROUNDED; }
/* Of a pair that has no second half. */
SS_INLINE ss_word low_of(ss_word kind) {
    return kind == TWO_HALVES ? LOW_HALF : kind == TWO_ROUNDED ? LOW_ROUNDED : kind;
}

/* Words whose elements are neighbours in memory, the second halves of pairs `next` elements further. */
typedef struct {
    ss_word kind;
    int64_t next;
} Words;

/* `count` halves, and zeros behind them. */
SS_INLINE ss_vu some_halves(const char *p, int64_t count) {
#if SS_LANES == 16
    return (ss_vu)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
    ss_vh h = {0};
    memcpy(&h, p, 2 * count);
    return __builtin_convertvector(h, ss_vu);
#endif
}

/* The same of f32. */
SS_INLINE ss_vf some_singles(const char *p, int64_t count) {
#if SS_LANES == 16
    return (ss_vf)_mm512_maskz_loadu_ps((1u << count) - 1, p);
#else
    ss_vf v = {0};
    memcpy(&v, p, 4 * count);
    return v;
#endif
}

/* f32 that are rounded to bf16, which are the upper halves; NaN stays NaN. */
SS_INLINE ss_vu rounded_bits(ss_vf x) {
    const ss_vu b = (ss_vu)x, nan = (ss_vu)(x != x);
    const ss_vu even = 0x7fffu + ((b >> 16) & 1u), quiet = 0x400000u & ~b;
    return (b + ((even & ~nan) | (quiet & nan))) & 0xffff0000u;
}

/* Pairs of the elements of two vectors, rounded to bf16. */
SS_INLINE ss_vu rounded_pairs(ss_vf low, ss_vf high) {
#ifdef SS_BF16_DOT
    const ss_vu lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i pairs = (__m512i)(lanes | (lanes + SS_LANES) << 16);
    return (ss_vu)_mm512_permutexvar_epi16(pairs, (__m512i)ss_vpack_bf16(low, high));
#else
    return rounded_bits(low) >> 16 | rounded_bits(high);
#endif
}

/* `count` words from p on, SS_LANES at most, and zeros behind them. */
SS_INLINE ss_vf some_words(Words w, const char *p, int64_t count) {
    switch (w.kind) {
    case ONE_F32: return some_singles(p, count);
    case ONE_HALF: return (ss_vf)(some_halves(p, count) << 16);
    case LOW_HALF: return (ss_vf)some_halves(p, count);
    case ONE_ROUNDED: return (ss_vf)rounded_bits(some_singles(p, count));
    case LOW_ROUNDED: return (ss_vf)(rounded_bits(some_singles(p, count)) >> 16);
    case TWO_ROUNDED:
        return (ss_vf)rounded_pairs(some_singles(p, count), some_singles(p + 4 * w.next, count));
    default: return (ss_vf)(some_halves(p, count) | some_halves(p + 2 * w.next, count) << 16);
    }
}

/* The square whose vector l is `count` words from p + l * step bytes on; zeros from vector `lanes` on. */
SS_INLINE void turn_words(Words w, const char *p, int64_t step, int64_t lanes, int64_t count, float *out) {
    ss_vf v[SS_LANES];
    if (lanes >= SS_LANES) {
#pragma GCC unroll 16
        for (int l = 0; l < SS_LANES; l++) v[l] = some_words(w, p + l * step, count);
    } else {
        for (int l = 0; l < SS_LANES; l++)
            v[l] = l < lanes ? some_words(w, p + l * step, count) : ss_vset(0.0f);
    }
    turn_vectors(v, out, SS_LANES);
}
