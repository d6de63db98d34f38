/* A product with a plain store, for finding out how long it takes on this machine. */
#include <string.h>

#include "gemm.h"

enum { RESULT, ROWS, WIDTH, TYPE };

/* C[image, row, place]: columns go on from one image to the next. */
static void store(void *const *b, int64_t batch, int64_t row, int64_t col, int64_t rows, int64_t cols,
                  const float *tile, int64_t stride) {
    const int64_t *about = b[1], width = about[WIDTH];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            const int64_t image = batch + (col + j) / width, place = (col + j) % width;
            const int64_t at = (image * about[ROWS] + row + i) * width + place;
            uint32_t bits;
            memcpy(&bits, tile + i * stride + j, 4);
            if (about[TYPE] == SS_F32)
                ((uint32_t *)b[0])[at] = bits;
            else
                ((uint16_t *)b[0])[at] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
}

/* `about`: nothing, rows, columns of an image, type. */
void ss_try_product(const ss_gemm *product, const ss_frame *frame, const void *a, const void *x,
                    int64_t offset, void *out, int64_t *about, void *scratch, int64_t room,
                    int64_t threads) {
    ss_gemm g = *product;
    void *buffers[] = {out, about};
    g.finish = store;
    if (frame) ss_frame_run(frame, x, scratch);
    const char *b = (const char *)(frame ? scratch : x) + offset;
    ss_gemm_run(&g, a, b, 0, buffers, (char *)scratch + room, threads);
}
