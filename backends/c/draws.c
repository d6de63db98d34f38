/* Philox4x32-10 by vectors of blocks. Source: see ir/ops/random.py. */
#include "draws.h"

#include "vector.h"

enum { ALONG = 2, LANES = SS_LANES / 2 }; /* vectors that are computed side by side */

/* Lanes of 64 bits hold a word in their low half, and in their high half what no round reads. */
int64_t ss_words(int64_t seed, int64_t step, uint32_t site, int64_t block,
                 uint32_t words[4 * SS_MOST_BLOCKS]) {
    const ss_vq zero = {0}, low = zero + 0xffffffffu;
    const ss_vq m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    ss_vq c[ALONG][4];
    _Pragma("GCC unroll 2") for (int v = 0; v < ALONG; v++) {
        for (int l = 0; l < LANES; l++) c[v][0][l] = (uint32_t)(block + v * LANES + l);
        c[v][1] = zero + site;
        c[v][2] = zero + (uint32_t)step;
        c[v][3] = zero + (uint32_t)(step >> 32);
    }
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        _Pragma("GCC unroll 2") for (int v = 0; v < ALONG; v++) {
            const ss_vq a = ss_vmul_low(c[v][0], m0), b = ss_vmul_low(c[v][2], m1);
            c[v][0] = b >> 32 ^ c[v][1] ^ (zero + k0);
            c[v][1] = b;
            c[v][2] = a >> 32 ^ c[v][3] ^ (zero + k1);
            c[v][3] = a;
        }
    _Pragma("GCC unroll 2") for (int v = 0; v < ALONG; v++) {
        const ss_vq x = (c[v][0] & low) | c[v][1] << 32, y = (c[v][2] & low) | c[v][3] << 32;
        for (int l = 0; l < LANES; l++) {
            memcpy(words + 4 * (v * LANES + l), &(uint64_t){x[l]}, 8);
            memcpy(words + 4 * (v * LANES + l) + 2, &(uint64_t){y[l]}, 8);
        }
    }
    return ALONG * LANES;
}

void ss_uniform(int64_t seed, int64_t step, uint32_t site, int64_t first, int64_t n, float *to) {
    uint32_t words[4 * SS_MOST_BLOCKS];
    for (int64_t i = first; i < first + n;) {
        const int64_t block = i >> 2, end = 4 * (block + ss_words(seed, step, site, block, words));
        const int64_t stop = end < first + n ? end : first + n;
        const uint32_t *word = words + (i & 3);
#pragma omp simd
        for (int64_t j = 0; j < stop - i; j++) to[i - first + j] = (float)(word[j] >> 8) * 0x1p-24f;
        i = stop;
    }
}
