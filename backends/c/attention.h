/* Attention: what generated code and attention.c agree on.
 *
 * B batch, H heads of queries, G heads of keys and values (H / G of queries share one), T queries,
 * S keys, D size of a head of queries and keys, E of values. */
#pragma once
#include <stdint.h>

typedef enum { SS_ELEM_F32, SS_ELEM_BF16, SS_ELEM_F16, SS_ELEM_F64, SS_ELEM_BOOL } ss_element;

typedef struct { int64_t b, h, t, d; } ss_strides; /* in elements */

/* out = softmax(scores) v, head by head. Scores are scale q k^T + mask or, where the mask is of
 * bools, scale q k^T where it is true and `fill` elsewhere. */
typedef struct {
    int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
    double scale;
    int causal;    /* query t sees keys 0..t */
    int kind;      /* ss_element of everything but the mask and what is kept of rows */
    int mask_kind; /* of the mask; -1: none */
    double fill;
    int safe;      /* whether a query all of whose scores are -inf gets 0, or NaN */
    int drops;     /* whether weights are dropped: all but those whose draw is less than the limit */
    int32_t limit; /* of 2^24 */
    uint32_t site; /* the number of the draw in the program */
    double keep;   /* what kept weights are divided by */
    ss_strides q, k, v, out, mask, lse, grad, dq, dk, dv; /* lse.d: 0 for one number a row */
    int64_t scratch; /* bytes of one thread */
} ss_attention;

/* How many queries and keys make one block of scores; a panel is keys side by side in memory. */
#define SS_PANEL 32
#define SS_FORWARD_QUERIES 48
#define SS_FORWARD_KEYS 256
#define SS_BACKWARD_QUERIES 64
#define SS_BACKWARD_KEYS 128

/* b: q, k, v, mask if there is one, key of random numbers if weights are dropped, out, lse: of each
 * row the log-sum-exp of its scores or, as two numbers, the largest and the rest of it, which is not
 * lost beside a large one. At most `threads` threads take part. */
void ss_attention_forward(const ss_attention *s, void *const *b, void *scratch, int64_t threads);
/* b: grad, q, k, v, out, lse, mask and key as above, dq, dk, dv. */
void ss_attention_backward(const ss_attention *s, void *const *b, void *scratch, int64_t threads);
