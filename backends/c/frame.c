/* Images in frames of zeros, so that no window of a convolution reaches beyond its image. */
#include <string.h>

#include "gemm.h"
#include "pool.h"
#include "turn.h"

typedef struct {
    const ss_frame *f;
    const char *x;
    char *out;
} Job;

#define ROW(type)                                                                                 \
    static void row_of_##type(const ss_frame *f, const void *from, void *to) {                    \
        const int64_t before = f->before[2], end = before + f->size[4], step = f->stride[4];      \
        const type *restrict x = from;                                                            \
        type *restrict out = to;                                                                  \
        for (int64_t c = 0; c < before; c++) out[c] = 0;                                          \
        for (int64_t c = end; c < f->framed[2]; c++) out[c] = 0;                                  \
        if (step == 1)                                                                            \
            for (int64_t c = before; c < end; c++) out[c] = x[c - before];                        \
        else                                                                                      \
            for (int64_t c = before; c < end; c++) out[c] = x[(c - before) * step];               \
    }
ROW(uint32_t)
ROW(uint16_t)

/* One row of an image, of f32 or bf16. */
static void row(const ss_frame *f, const void *from, void *to) {
    if (f->itemsize == 4)
        row_of_uint32_t(f, from, to);
    else
        row_of_uint16_t(f, from, to);
}

static void image(void *context, int64_t p, int64_t worker) {
    (void)worker;
    const Job *job = context;
    const ss_frame *f = job->f;
    const int64_t wide = f->framed[2] * f->itemsize, plane = f->framed[1] * wide;
    const int64_t n = p / f->size[1], channel = p % f->size[1];
    const char *x = job->x + (n * f->stride[0] + channel * f->stride[1]) * f->itemsize;
    char *out = job->out + p * f->framed[0] * plane;
    for (int64_t d = 0; d < f->framed[0]; d++) {
        const int64_t z = d - f->before[0];
        for (int64_t r = 0; r < f->framed[1]; r++, out += wide) {
            const int64_t y = r - f->before[1];
            if (z < 0 || z >= f->size[2] || y < 0 || y >= f->size[3])
                memset(out, 0, wide);
            else
                row(f, x + (z * f->stride[2] + y * f->stride[3]) * f->itemsize, out);
        }
    }
}

void ss_frame_run(const ss_frame *f, const void *x, void *out) {
    Job job = {f, x, out};
    ss_parallel(image, &job, f->size[0] * f->size[1]);
}

/* -- by place ----------------------------------------------------------------------------------- */

enum { PARTS = 32 };

/* Channels [first, all) of a line of places, and zeros up to channel `padded`, one by one. */
#define CHANNELS(type)                                                                            \
    static void channels_of_##type(const ss_frame *f, int64_t first, int64_t padded, const void *from, \
                                   void *to) {                                                    \
        const int64_t places = f->size[4], along = f->stride[4];                                  \
        for (int64_t c = first; c < padded; c++) {                                                \
            const type *restrict x = (const type *)from + c * f->stride[1];                       \
            type *restrict out = (type *)to + c;                                                  \
            if (c < f->size[1])                                                                   \
                for (int64_t p = 0; p < places; p++) out[p * padded] = x[p * along];              \
            else                                                                                  \
                for (int64_t p = 0; p < places; p++) out[p * padded] = 0;                         \
        }                                                                                         \
    }
CHANNELS(uint32_t)
CHANNELS(uint16_t)

/* Of four bytes that the channels of a place take. */
static int64_t words_of(const ss_frame *f) { return (f->size[1] * f->itemsize + 3) / 4; }

/* A line of places, each with its channels from the first of them on: `x` is at the first place. */
static void line(const ss_frame *f, const char *x, char *out) {
    const int64_t size = f->itemsize, each = 4 / size, step = f->stride[1] * size * each;
    const int64_t words = words_of(f), wide = 4 * words;
    const Words kind = {size == 4 ? ONE_F32 : TWO_HALVES, f->stride[1]};
    memset(out, 0, f->before[2] * wide);
    out += f->before[2] * wide;
    int64_t w = 0;
    for (; f->stride[4] == 1 && w + SS_LANES <= f->size[1] / each; w += SS_LANES)
        for (int64_t c = 0; c < f->size[4]; c += SS_LANES) {
            float square[SS_LANES * SS_LANES];
            const int64_t places = f->size[4] - c < SS_LANES ? f->size[4] - c : SS_LANES;
            turn_words(kind, x + c * size + w * step, step, SS_LANES, places, square);
            for (int64_t p = 0; p < places; p++)
                memcpy(out + (c + p) * wide + 4 * w, square + p * SS_LANES, 4 * SS_LANES);
        }
    if (size == 4)
        channels_of_uint32_t(f, w, words, x, out);
    else
        channels_of_uint16_t(f, 2 * w, 2 * words, x, out);
    out += f->size[4] * wide;
    memset(out, 0, (f->framed[2] - f->before[2] - f->size[4]) * wide);
}

static void lines(void *context, int64_t p, int64_t worker) {
    (void)worker;
    const Job *job = context;
    const ss_frame *f = job->f;
    const int64_t all = f->size[0] * f->framed[0] * f->framed[1], bytes = f->framed[2] * 4 * words_of(f);
    for (int64_t i = all * p / PARTS; i < all * (p + 1) / PARTS; i++) {
        const int64_t n = i / f->framed[1] / f->framed[0];
        const int64_t z = i / f->framed[1] % f->framed[0] - f->before[0], y = i % f->framed[1] - f->before[1];
        const int64_t at = n * f->stride[0] + z * f->stride[2] + y * f->stride[3];
        if (z < 0 || z >= f->size[2] || y < 0 || y >= f->size[3])
            memset(job->out + i * bytes, 0, bytes);
        else
            line(f, job->x + at * f->itemsize, job->out + i * bytes);
    }
}

void ss_frame_by_place(const ss_frame *f, const void *x, void *out) {
    Job job = {f, x, out};
    ss_parallel(lines, &job, PARTS);
}
