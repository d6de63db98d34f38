/* Images in frames of zeros, so that no window of a convolution reaches beyond its image. */
#include <string.h>

#include "gemm.h"
#include "pool.h"

typedef struct {
    const ss_frame *f;
    const char *x;
    char *out;
} Job;

/* One row of an image. */
static void row(const ss_frame *f, const char *from, char *to) {
    const int64_t each = f->itemsize, width = f->size[4], step = f->stride[4];
    memset(to, 0, f->before[2] * each);
    to += f->before[2] * each;
    if (step == 1)
        memcpy(to, from, width * each);
    else
        for (int64_t c = 0; c < width; c++) memcpy(to + c * each, from + c * step * each, each);
    memset(to + width * each, 0, (f->framed[2] - f->before[2] - width) * each);
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
