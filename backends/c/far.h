/* Stores past the caches, for what is not read before it would have left them: a line is then not
 * fetched only to be overwritten, and what is read soon stays. */
#pragma once
#include <stdint.h>

/* Copies to `to`. Other threads see it behind `ss_finish_stores`, which is where work is handed from one
 * to another: in the pool, and at the end of a run. */
void ss_store_far(void *to, const void *from, int64_t bytes);

static inline void ss_finish_stores(void) {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}
