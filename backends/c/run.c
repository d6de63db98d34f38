/* A stretch of a program's instructions in one call. */
#include "run.h"

#include "far.h"

__thread int ss_declined;

int64_t ss_run(const ss_call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        calls[i].kernel(calls[i].buffers);
        if (ss_declined) {
            ss_declined = 0;
            ss_finish_stores();
            return i;
        }
    }
    ss_finish_stores();
    return count;
}
