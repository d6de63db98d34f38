/* Tile registers: 16 rows of 64 bytes. The instructions where the machine has them; with
 * SS_EMULATE_AMX the same in plain C, so that what is built on them is tested anywhere. */
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(SS_EMULATE_AMX)
#define SS_AMX 1

static __thread struct { uint32_t row[16][16]; } ss_tile[8];

static inline void ss_tile_start(void) { memset(ss_tile, 0, sizeof ss_tile); }
static inline void ss_tile_stop(void) {}
static inline int ss_tile_allowed(void) { return 1; }
static inline float ss_tile_bf16(uint32_t half) {
    const uint32_t bits = half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
#define ss_tile_zero(t) memset(&ss_tile[t], 0, sizeof ss_tile[t])
#define ss_tile_load(t, p, stride)                                                                \
    for (int r = 0; r < 16; r++) memcpy(ss_tile[t].row[r], (const char *)(p) + r * (stride), 64)
#define ss_tile_store(t, p, stride)                                                               \
    for (int r = 0; r < 16; r++) memcpy((char *)(p) + r * (stride), ss_tile[t].row[r], 64)
/* c[m, n] += sum over pairs k of a[m, k] . b[k, n] */
static inline void ss_tile_multiply(int c, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                const uint32_t x = ss_tile[a].row[m][k], y = ss_tile[b].row[k][n];
                float sum;
                memcpy(&sum, &ss_tile[c].row[m][n], 4);
                sum += ss_tile_bf16(x & 0xffff) * ss_tile_bf16(y & 0xffff);
                sum += ss_tile_bf16(x >> 16) * ss_tile_bf16(y >> 16);
                memcpy(&ss_tile[c].row[m][n], &sum, 4);
            }
}

#elif defined(__AMX_BF16__) && defined(__linux__)
#define SS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process its tile registers when it asks (arch_prctl ARCH_REQ_XCOMP_PERM, 18). */
static inline int ss_tile_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
static inline void ss_tile_start(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
}
static inline void ss_tile_stop(void) { _tile_release(); }
#define ss_tile_zero(t) _tile_zero(t)
#define ss_tile_load(t, p, stride) _tile_loadd(t, p, stride)
#define ss_tile_store(t, p, stride) _tile_stored(t, p, stride)
#define ss_tile_multiply(c, a, b) _tile_dpbf16ps(c, a, b)

#else
#define SS_AMX 0
#endif
