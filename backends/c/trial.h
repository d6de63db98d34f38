/* A product by itself, for finding out how long it takes on this machine. */
#pragma once
#include "gemm.h"

/* Where the result belongs; strides count elements. */
typedef struct {
    ss_type type;
    int64_t batch, row, offset;
    ss_digits cols;
} ss_target;

/* A product whose result is stored, and no more than that. */
void ss_try_product(const ss_gemm *product, const void *a, const void *b, void *out,
                    const ss_target *target, void *scratch, int64_t threads);
