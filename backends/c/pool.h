/* The threads of a step. */
#pragma once
#include <stdint.h>

/* One part of some work; `worker` is less than the number of threads, and no two calls that run at
 * one time have the same. */
typedef void (*ss_part)(void *context, int64_t part, int64_t worker);

/* Calls `part` for 0 .. parts - 1 in any order, and returns when all are done. */
void ss_parallel(ss_part part, void *context, int64_t parts);

/* How many threads work, the caller among them. */
int64_t ss_threads(void);
