/* What generated kernels share: conversions, PyTorch's integer arithmetic, vectorizable math. */
#pragma once
#include <math.h>
#include <stdint.h>

#ifndef SS_INLINE
#define SS_INLINE static inline __attribute__((always_inline, unused))
#endif

/* Products that are rounded once, where the machine has them. */
#ifdef __FMA__
#define SS_FMAF(a, b, c) __builtin_fmaf(a, b, c)
#else
#define SS_FMAF(a, b, c) ((a) * (b) + (c))
#endif

SS_INLINE uint32_t ss_bits(float x) { union { float f; uint32_t u; } p = {.f = x}; return p.u; }
SS_INLINE float ss_float(uint32_t x) { union { uint32_t u; float f; } p = {.u = x}; return p.f; }

SS_INLINE int ss_signbitf(float x) { return (int32_t)ss_bits(x) < 0; }
SS_INLINE int ss_signbit(double x) { return __builtin_signbit(x) != 0; }

/* -- 16-bit floats: computed in f32, rounded to nearest even ----------------------------------- */

SS_INLINE float ss_from_bf16(uint16_t x) { return ss_float((uint32_t)x << 16); }
SS_INLINE uint32_t ss_bf16_bits(float x) {
    const uint32_t b = ss_bits(x), even = 0x7fffu + ((b >> 16) & 1u), quiet = 0x400000u & ~b;
    return (b + (x != x ? quiet : even)) & 0xffff0000u; /* a NaN stays one */
}
SS_INLINE float ss_round_bf16(float x) { return ss_float(ss_bf16_bits(x)); }
SS_INLINE uint16_t ss_to_bf16(float x) { return (uint16_t)(ss_bf16_bits(x) >> 16); }
/* of a number that is one already */
SS_INLINE uint16_t ss_high_half(float x) { return (uint16_t)(ss_bits(x) >> 16); }
SS_INLINE float ss_round_f16(float x) { return (float)(_Float16)x; }

/* -- maximum and minimum: a NaN on either side gives NaN ---------------------------------------- */

SS_INLINE float ss_maxf(float a, float b) { return a != a ? a : (a > b ? a : b); }
SS_INLINE float ss_minf(float a, float b) { return a != a ? a : (a < b ? a : b); }
SS_INLINE double ss_max(double a, double b) { return a != a ? a : (a > b ? a : b); }
SS_INLINE double ss_min(double a, double b) { return a != a ? a : (a < b ? a : b); }

/* -- division and remainder -------------------------------------------------------------------- */

/* Division by zero is an error in PyTorch; a kernel has no way to raise one and gives 0. */
SS_INLINE int64_t ss_truncdivi(int64_t a, int64_t b) {
    return b == 0 ? 0 : b == -1 ? (int64_t)(0 - (uint64_t)a) : a / b;
}
SS_INLINE int64_t ss_fmodi(int64_t a, int64_t b) { return b == 0 || b == -1 ? 0 : a % b; }
SS_INLINE int64_t ss_remainderi(int64_t a, int64_t b) {
    int64_t r = ss_fmodi(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
SS_INLINE int64_t ss_floordivi(int64_t a, int64_t b) {
    int64_t r = ss_fmodi(a, b);
    return ss_truncdivi(a, b) - (r != 0 && (r < 0) != (b < 0));
}
#define SS_FLOAT_DIVISION(T, f)                                                                   \
    SS_INLINE T ss_remainder##f(T a, T b) {                                                       \
        T r = fmod##f(a, b);                                                                      \
        return r != 0 && (b < 0) != (r < 0) ? r + b : r;                                          \
    }                                                                                             \
    SS_INLINE T ss_floordiv##f(T a, T b) {                                                        \
        if (b == 0) return a / b;                                                                 \
        T r = fmod##f(a, b), q = (a - r) / b;                                                     \
        if (r != 0 && (b < 0) != (r < 0)) q -= 1;                                                 \
        if (q == 0) return copysign##f(0, a / b);                                                 \
        T down = floor##f(q);                                                                     \
        return q - down > (T)0.5 ? down + 1 : down;                                               \
    }
SS_FLOAT_DIVISION(float, f)
SS_FLOAT_DIVISION(double, )

SS_INLINE int64_t ss_ipow(int64_t a, int64_t n) {
    if (n < 0) return a == 1 ? 1 : a == -1 ? ((n & 1) ? -1 : 1) : 0;
    uint64_t r = 1, x = (uint64_t)a;
    for (; n; n >>= 1, x *= x)
        if (n & 1) r *= x;
    return (int64_t)r;
}
SS_INLINE int64_t ss_shl(int64_t a, int64_t n, int bits) {
    return n < 0 || n >= bits ? 0 : (int64_t)((uint64_t)a << n);
}
SS_INLINE int64_t ss_shr(int64_t a, int64_t n, int bits) {
    return n < 0 || n >= bits ? (a < 0 ? -1 : 0) : a >> n;
}

/* -- f32 functions without branches or calls, so that loops of them vectorize ------------------- */

/* x - j log(2), with log(2) in two parts; and (e^f - 1 - f) / f^2 for |f| <= log(2) / 2. */
SS_INLINE float ss_beyond(float j, float x) {
    return SS_FMAF(j, -1.42860677e-6f, SS_FMAF(j, -6.93145752e-1f, x));
}
SS_INLINE float ss_exp_series(float f) {
    float r = 1.37805939e-3f;
    r = SS_FMAF(r, f, 8.37312452e-3f);
    r = SS_FMAF(r, f, 4.16695364e-2f);
    r = SS_FMAF(r, f, 1.66664720e-1f);
    r = SS_FMAF(r, f, 4.99999851e-1f);
    return r;
}
/* exp: 2^i * e^f with |f| <= log(2) / 2; two factors 2^(i/2) reach denormals and infinity.
   x is held within [-104, 89] by its bits: integers compare in one instruction, NaN or not. */
SS_INLINE float ss_expf(float x) {
    uint32_t u = ss_bits(x), low = 0xc2d00000u;
    int32_t high = 0x42b20000;
    u = u < low ? u : low;
    float a = ss_float((uint32_t)((int32_t)u < high ? (int32_t)u : high));
    float z = SS_FMAF(1.442695f, a, 12582912.0f); /* its last bits are i */
    float j = z - 12582912.0f;
    float f = ss_beyond(j, a);
    float r = ss_exp_series(f);
    r = SS_FMAF(r, f, 1.0f);
    r = SS_FMAF(r, f, 1.0f);
    int32_t i = (int32_t)(ss_bits(z) - 0x4b400000u), h = i >> 1;
    r = r * ss_float((uint32_t)(h + 127) << 23) * ss_float((uint32_t)(i - h + 127) << 23);
    return x != x ? x : r;
}
/* log: x = 2^i * m with m in [2/3, 4/3]; log(m) by a polynomial in m - 1. */
SS_INLINE float ss_logf(float x) {
    int tiny = x < 1.17549435e-38f;
    float a = tiny ? x * 8388608.0f : x;
    float i = tiny ? -23.0f : 0.0f;
    uint32_t e = (ss_bits(a) - 0x3f2aaaabu) & 0xff800000u;
    float m = ss_float(ss_bits(a) - e);
    i = SS_FMAF((float)(int32_t)e, 1.19209290e-7f, i);
    float f = m - 1.0f, s = f * f;
    float r = SS_FMAF(-0.130187988f, f, 0.140889585f);
    float t = SS_FMAF(-0.121489584f, f, 0.139809534f);
    r = SS_FMAF(r, s, t);
    r = SS_FMAF(r, f, -0.166845024f);
    r = SS_FMAF(r, f, 0.200121149f);
    r = SS_FMAF(r, f, -0.249996364f);
    r = SS_FMAF(r, f, 0.333331943f);
    r = SS_FMAF(r, f, -0.500000000f);
    r = SS_FMAF(r, s, f);
    r = SS_FMAF(i, 0.693147182f, r);
    r = x == INFINITY ? x : r;
    r = x == 0.0f ? -INFINITY : r;
    r = x < 0.0f ? NAN : r;
    return x != x ? x : r;
}
SS_INLINE float ss_erff(float a) {
    float t = fabsf(a), s = a * a;
    float r = SS_FMAF(-1.72853470e-5f, t, 3.83197126e-4f);
    float u = SS_FMAF(-3.88396438e-3f, t, 2.42546219e-2f);
    r = SS_FMAF(r, s, u);
    r = SS_FMAF(r, t, -1.06777877e-1f);
    r = SS_FMAF(r, t, -6.34846687e-1f);
    r = SS_FMAF(r, t, -1.28717512e-1f);
    r = SS_FMAF(r, t, -t);
    float large = copysignf(1.0f - ss_expf(r), a);
    large = t > 4.0f ? copysignf(1.0f, a) : large;
    float p = -5.96761703e-4f;
    p = SS_FMAF(p, s, 4.99119423e-3f);
    p = SS_FMAF(p, s, -2.67681349e-2f);
    p = SS_FMAF(p, s, 1.12819925e-1f);
    p = SS_FMAF(p, s, -3.76125336e-1f);
    p = SS_FMAF(p, s, 1.28379166e-1f);
    p = SS_FMAF(p, a, a);
    float y = t > 0.927734375f ? large : p;
    return a != a ? a : y;
}
/* tanh: e / (e + 2) with e = e^2|x| - 1 = 2^i (e^f - 1) + (2^i - 1), which loses nothing near zero. */
SS_INLINE float ss_tanhf(float x) {
    float t = fabsf(x);
    float a = 10.0f < t ? 10.0f : t;
    float z = SS_FMAF(2.885390f, a, 12582912.0f); /* its last bits are i */
    float j = z - 12582912.0f;
    float f = ss_beyond(j, a + a);
    float r = ss_exp_series(f);
    r = SS_FMAF(r * f, f, f);
    float scale = ss_float((ss_bits(z) << 23) + 0x3f800000u);
    float e = SS_FMAF(scale, r, scale - 1.0f);
    return copysignf(e / (e + 2.0f), x);
}
SS_INLINE float ss_sigmoidf(float x) { return 1.0f / (1.0f + ss_expf(-x)); }
SS_INLINE double ss_exp(double x) { return exp(x); }
SS_INLINE double ss_log(double x) { return log(x); }
SS_INLINE double ss_erf(double x) { return erf(x); }
SS_INLINE double ss_tanh(double x) { return tanh(x); }
SS_INLINE double ss_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

/* -- activations and their gradients ------------------------------------------------------------ */

/* The normal distribution up to x, given e = exp(-x^2 / 2): below zero e times a function of
 * u = 1 / (1 + p |x|) that is almost a polynomial. So what is left far below zero is as exact as the
 * rest, and one exponential is enough for the density too. */
SS_INLINE float ss_normalf(float x, float e) {
    float u = 1.0f / SS_FMAF(0.347499996f, fabsf(x), 1.0f);
    float r = -0.0287954956f;
    r = SS_FMAF(r, u, 0.144776553f);
    r = SS_FMAF(r, u, -0.263654858f);
    r = SS_FMAF(r, u, 0.173190832f);
    r = SS_FMAF(r, u, -0.0302085746f);
    r = SS_FMAF(r, u, 0.108564809f);
    r = SS_FMAF(r, u, 0.118569687f);
    r = SS_FMAF(r, u, 0.138936371f);
    r = SS_FMAF(r, u, 0.13862066f);
    r = r * u * e;
    return x < 0.0f ? r : 1.0f - r;
}
SS_INLINE double ss_normal(double x, double e) {
    (void)e;
    return 0.5 * (1 + erf(x * 0.70710678118654752440));
}

#define SS_ACTIVATIONS(T, f)                                                                      \
    SS_INLINE T ss_gelu_erf##f(T x) { return x * ss_normal##f(x, ss_exp##f(x * x * (T)-0.5)); }   \
    SS_INLINE T ss_gelu_tanh##f(T x) {                                                            \
        T u = (T)0.79788456080286535588 * (x + (T)0.044715 * x * x * x);                          \
        return (T)0.5 * x * ((T)1 + ss_tanh##f(u));                                               \
    }                                                                                             \
    SS_INLINE T ss_gelu_erf_grad##f(T x) {                                                        \
        T e = ss_exp##f(x * x * (T)-0.5);                                                         \
        return ss_normal##f(x, e) + x * (e * (T)0.39894228040143267794);                          \
    }                                                                                             \
    SS_INLINE T ss_gelu_tanh_grad##f(T x) {                                                       \
        T k = (T)0.79788456080286535588, c = (T)0.044715, x2 = x * x;                             \
        T t = ss_tanh##f(k * (x + c * x2 * x)), left = (T)0.5 * x;                                \
        return (T)0.5 * ((T)1 + t) + left * (((T)1 - t * t) * (k * ((T)1 + (T)3 * c * x2)));      \
    }                                                                                             \
    SS_INLINE T ss_silu_grad##f(T x) {                                                            \
        T s = ss_sigmoid##f(x);                                                                   \
        return s * ((T)1 + x * ((T)1 - s));                                                       \
    }
SS_ACTIVATIONS(float, f)
SS_ACTIVATIONS(double, )

/* -- random bits: Philox4x32-10, word `i mod 4` of block `i div 4` ------------------------------ */

SS_INLINE uint32_t ss_philox(int64_t seed, int64_t step, uint32_t site, int64_t i) {
    uint32_t c0 = (uint32_t)(i >> 2), c1 = site, c2 = (uint32_t)step, c3 = (uint32_t)(step >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    uint32_t low = (i & 1) ? c1 : c0, high = (i & 1) ? c3 : c2;
    return (i & 2) ? high : low;
}
