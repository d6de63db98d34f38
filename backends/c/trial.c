#include "trial.h"

#include <string.h>

#include "digits.h"

enum { OUT, TARGET };
enum { SOME = 64 }; /* columns whose positions are found together */

static void store(void *const *b, int64_t batch, int64_t row, int64_t col, int64_t rows, int64_t cols,
                  const float *tile, int64_t stride) {
    const ss_target *to = b[TARGET];
    for (int64_t from = 0; from < cols; from += SOME) {
        const int64_t count = cols - from < SOME ? cols - from : SOME;
        int64_t at[SOME];
        list(&to->cols, 0, col + from, count, at);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t first = to->offset + batch * to->batch + (row + i) * to->row;
            for (int64_t j = 0; j < count; j++) {
                uint32_t bits;
                memcpy(&bits, tile + i * stride + from + j, 4);
                if (to->type == SS_F32)
                    ((uint32_t *)b[OUT])[first + at[j]] = bits;
                else
                    ((uint16_t *)b[OUT])[first + at[j]] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            }
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
