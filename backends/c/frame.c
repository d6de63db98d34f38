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

/* A line of places, each with its channels from the first of them on: `x` is at the first place. */
static void line(const ss_frame *f, const char *x, char *out) {
    const int64_t size = f->itemsize, each = 4 / size, channels = f->size[1];
    const int64_t words = (channels + each - 1) / each;
    const int64_t step = f->stride[1] * size, along = f->stride[4] * size, wide = 4 * words;
    const Words pair = {size == 4 ? SS_F32 : SS_BF16, 1, f->stride[1]}, single = {SS_BF16, 1, 0};
    const int64_t whole = channels / each; /* words of which no half is missing */
    float square[SS_LANES * SS_LANES];
    memset(out, 0, f->before[2] * wide);
    out += f->before[2] * wide;
    for (int64_t c = 0; c < f->size[4]; c += SS_LANES) {
        const int64_t places = f->size[4] - c < SS_LANES ? f->size[4] - c : SS_LANES;
        const char *from = x + c * along;
        char *to = out + c * wide;
        for (int64_t w = 0; w < words; w += SS_LANES) {
            const int64_t some = words - w < SS_LANES ? words - w : SS_LANES;
            const int64_t lanes = whole - w < some ? whole - w : some;
            const char *at = from + w * each * step;
            if (along == size)
                turn_words(pair, at, each * step, lanes, places, square);
            else
                for (int64_t p = 0; p < places; p++)
                    for (int64_t l = 0; l < lanes; l++)
                        for (int64_t e = 0; e < each; e++)
                            memcpy((char *)(square + p * SS_LANES + l) + e * size,
                                   at + (l * each + e) * step + p * along, size);
            for (int64_t l = lanes; l < some; l++)
                for (int64_t p = 0; p < places; p++) {
                    const ss_vf last = some_words(single, at + l * each * step + p * along, 1);
                    square[p * SS_LANES + l] = last[0];
                }
            if (some == SS_LANES)
                for (int64_t p = 0; p < places; p++)
                    memcpy(to + p * wide + 4 * w, square + p * SS_LANES, 4 * SS_LANES);
            else
                for (int64_t p = 0; p < places; p++)
                    memcpy(to + p * wide + 4 * w, square + p * SS_LANES, 4 * some);
        }
    }
    out += f->size[4] * wide;
    memset(out, 0, (f->framed[2] - f->before[2] - f->size[4]) * wide);
}

static void lines(void *context, int64_t p, int64_t worker) {
    (void)worker;
    const Job *job = context;
    const ss_frame *f = job->f;
    const int64_t all = f->size[0] * f->framed[0] * f->framed[1], each = 4 / f->itemsize;
    const int64_t bytes = f->framed[2] * ((f->size[1] + each - 1) / each) * 4;
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
