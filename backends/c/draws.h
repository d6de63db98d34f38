/* Random numbers of many elements at once: those that ss_philox gives one by one. */
#pragma once
#include <stdint.h>

#define SS_MOST_BLOCKS 16 /* that ss_words may compute; of four words each */

/* The words of as many blocks, from `block` on, as vectors hold; how many blocks that is. */
int64_t ss_words(int64_t seed, int64_t step, uint32_t site, int64_t block,
                 uint32_t words[4 * SS_MOST_BLOCKS]);
/* to[0..n) = elements `first`.. of a draw, uniform in [0, 1). */
void ss_uniform(int64_t seed, int64_t step, uint32_t site, int64_t first, int64_t n, float *to);
