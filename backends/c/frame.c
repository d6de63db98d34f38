/* Images in frames of zeros, so that no window of a convolution reaches beyond its image. */
#include <string.h>

#include "gemm.h"
#include "pool.h"

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
