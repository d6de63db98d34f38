/* A stretch of a program's instructions in one call. */
#include "run.h"

#include "far.h"

__thread int ss_declined;

int64_t ss_run(const ss_call *calls, int64_t count) {
    int64_t done = 0;
    for (; done < count; done++) {
        calls[done].kernel(calls[done].buffers);
        if (ss_declined) break;
    }
    ss_declined = 0;
    ss_finish_stores();
    return done;
}
