/* What an executable, its kernels and run.c agree on. */
#pragma once
#include <stdint.h>

typedef struct {
    void (*kernel)(void *const *buffers);
    void *const *buffers;
} ss_call;

/* Set by a kernel that has done nothing, as what it was given is an error or not for it. */
extern __thread int ss_declined __attribute__((visibility("hidden")));

/* Runs kernels in order; how many are done, which is `count` where none declined. */
int64_t ss_run(const ss_call *calls, int64_t count);
