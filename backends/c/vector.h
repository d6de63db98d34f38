/* Vectors of f32 of the machine's own width: AVX-512, AVX2, or what the compiler makes of 16 bytes
 * (SSE, NEON). Defining SS_NARROW as 8 or 4 before including this takes a narrower width. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
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

/* bf16 in memory, f32 in registers. */
SS_INLINE ss_vf ss_vload_bf16(const uint16_t *p) {
    ss_vh h;
    memcpy(&h, p, sizeof h);
    return (ss_vf)(__builtin_convertvector(h, ss_vu) << 16);
}
/* Rounds to nearest even; NaN stays NaN. */
SS_INLINE void ss_vstore_bf16(uint16_t *p, ss_vf x) {
    ss_vu bits = (ss_vu)x;
    ss_vu r = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    ss_vu nan = (ss_vu)(x != x);
    r = (r & ~nan) | (0x7fc0u & nan);
    ss_vh h = __builtin_convertvector(r, ss_vh);
    memcpy(p, &h, sizeof h);
}

/* max and select by a mask of all ones or zeros per lane. */
SS_INLINE ss_vf ss_vselect(ss_vi mask, ss_vf a, ss_vf b) {
    return (ss_vf)(((ss_vi)a & mask) | ((ss_vi)b & ~mask));
}
SS_INLINE ss_vf ss_vmax(ss_vf a, ss_vf b) { return ss_vselect(a > b, a, b); }
SS_INLINE float ss_vsum(ss_vf v) {
    float total = 0;
    for (int i = 0; i < SS_LANES; i++) total += v[i];
    return total;
}
