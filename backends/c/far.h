/* Stores past the caches, for what is not read before it would have left them: a line is then not
 * fetched only to be overwritten, and what is read soon stays. */
#pragma once
#include <stdint.h>

/* Copies to `to`. Other threads see it once the pool's work is done. */
void ss_store_far(void *to, const void *from, int64_t bytes);
