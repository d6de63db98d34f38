/* Where the elements of a dimension are that several strides walk. */
#pragma once
#include "gemm.h"

/* at[i] = where element `from + i` of a dimension is, counted in elements. */
static void list(const ss_digits *d, int64_t stride, int64_t from, int64_t count, int64_t *at) {
    if (!d) {
        for (int64_t i = 0; i < count; i++) at[i] = (from + i) * stride;
        return;
    }
    int64_t digit[SS_DIGITS], sum = 0;
    for (int64_t r = SS_DIGITS - 1, left = from; r >= 0; left /= d->size[r], r--) {
        digit[r] = left % d->size[r];
        sum += digit[r] * d->stride[r];
    }
    for (int64_t i = 0; i < count; i++) {
        at[i] = sum;
        for (int64_t r = SS_DIGITS - 1; r >= 0; r--) {
            sum += d->stride[r];
            if (++digit[r] < d->size[r]) break;
            sum -= digit[r] * d->stride[r];
            digit[r] = 0;
        }
    }
}
