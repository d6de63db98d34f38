#include "trial.h"

#include <string.h>

#include "digits.h"
#include "vector.h"

enum { OUT, TARGET };
enum { SOME = 64 }; /* columns whose positions are found together */

/* out[first + at[j]] = values[j], or out[first + j] without `at`. */
SS_INLINE void put(ss_type type, void *out, int64_t first, const int64_t *at, int64_t count,
                   const float *values) {
    for (int64_t j = 0; j < count; j++) {
        const int64_t to = first + (at ? at[j] : j);
        uint32_t bits;
        memcpy(&bits, values + j, 4);
        if (type == SS_F32)
            ((uint32_t *)out)[to] = bits;
        else
            ((uint16_t *)out)[to] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

static void store(void *const *b, int64_t batch, int64_t row, int64_t col, int64_t rows, int64_t cols,
                  const float *tile, int64_t stride) {
    const ss_target *to = b[TARGET];
    for (int64_t from = 0; from < cols; from += SOME) {
        const int64_t count = cols - from < SOME ? cols - from : SOME;
        int64_t at[SOME];
        list(&to->cols, 0, col + from, count, at);
        const int together = at[count - 1] == at[0] + count - 1; /* neighbours in memory */
        for (int64_t i = 0; i < rows; i++) {
            const int64_t first = to->offset + batch * to->batch + (row + i) * to->row;
            const float *values = tile + i * stride + from;
            if (together)
                put(to->type, b[OUT], first + at[0], 0, count, values);
            else
                put(to->type, b[OUT], first, at, count, values);
        }
    }
}

void ss_try_product(const ss_gemm *product, const void *a, const void *b, void *out,
                    const ss_target *target, void *scratch, int64_t threads) {
    ss_gemm g = *product;
    void *buffers[] = {out, (void *)target};
    g.finish = store;
    ss_gemm_run(&g, a, b, 0, buffers, scratch, threads);
}
