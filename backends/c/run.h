/* What an executable and run.c agree on. */
#pragma once
#include <stdint.h>

typedef struct {
    void (*kernel)(void *const *buffers);
    void *const *buffers;
} ss_call;

void ss_run(const ss_call *calls, int64_t count);
