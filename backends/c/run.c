/* A stretch of a program's instructions in one call. */
#include "run.h"

void ss_run(const ss_call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].buffers);
}
