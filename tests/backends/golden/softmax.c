#include "prelude.h"

// v0 = amax.default: f32[64,1] %top (amax, attn)
// v1 = sub.Tensor: f32[64,768] %d (sub, attn)
// v2 = exp.default: f32[64,768] %e (exp, attn)
// v3 = sum.dim_IntList: f32[64,1] %s (sum, attn)
// v4 = div.Tensor: f32[64,768] %y (div, attn)
// v5 = mul.Tensor: f32[64,768] %z (mul, norm)
void k0_amax_mul(void *const *b) {
    const float *restrict p0 = b[0];
    float *restrict p1 = b[1];
    const float *restrict p2 = b[2];
#pragma omp parallel for schedule(static)
    for (int64_t i0 = 0; i0 < 64; i0++) {
        float t0 = -INFINITY; int n0 = 0;
        float a0 = -INFINITY; int m0 = 0;
#pragma omp simd reduction(max : a0) reduction(| : m0)
        for (int64_t j0 = 0; j0 < 768; j0++) {
            a0 = p0[i0 * 768 + j0] > a0 ? p0[i0 * 768 + j0] : a0; m0 |= p0[i0 * 768 + j0] != p0[i0 * 768 + j0];
        }
        t0 = a0 > t0 ? a0 : t0; n0 |= m0;
        const float v0 = n0 ? NAN : t0;
        double t3 = 0;
        float a3 = 0;
#pragma omp simd reduction(+ : a3)
        for (int64_t j0 = 0; j0 < 768; j0++) {
            const float v1 = (p0[i0 * 768 + j0] - v0);
            const float v2 = ss_expf(v1);
            p1[i0 * 768 + j0] = v2;
            a3 += v2;
        }
        t3 += a3;
        const float v3 = (float)(t3);
#pragma omp simd
        for (int64_t j0 = 0; j0 < 768; j0++) {
            const float v2 = p1[i0 * 768 + j0];
            const float v4 = (v2 / v3);
            const float v5 = (v4 * p2[j0]);
            p1[i0 * 768 + j0] = (float)(v5);
        }
    }
}
