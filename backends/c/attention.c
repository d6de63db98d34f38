/* Attention in blocks: forward and gradients, without the scores in memory.
 *
 * For each block of queries: scores of a block of keys, their weights, what they add to the output;
 * the largest score so far and the sum of weights are corrected on the way. The gradients compute the
 * weights again from the log-sum-exp. Threads split heads and blocks of queries (gradients: heads of
 * keys), never a sum: results are equal for every number of threads.
 *
 * Source: Dao, "FlashAttention-2", algorithms 1 and 2. */
#include "attention_call.h"

#define NAME(x) ss_attention_##x##_f32
#define REAL float
#define LANES SS_LANES
#define VEC ss_vf
#define UNIT float
#define KU 1
#define VSET(x) ss_vset(x)
#define VFMA(a, b, c) ss_vfma(a, b, c)
#define VSTEP(acc, a, b) ss_vfma(ss_vset(a), b, acc)
#define VUNITS(p) (p)[0]
#define ONES 1
#define UVEC ss_vf
#define VMAX(a, b) ss_vmax(a, b)
#define VEXP2(x) ss_vexp2(x, 0)
#define VFILL(v, n, x) ss_vfill(v, n, x)
#define VSUM(x) ss_vsum(x)
#define VLARGEST(x) ss_vlargest(x)
#define RLOG(x) logf(x)
#include "attention_kernel.h"

/* Products of pairs of bf16 where the machine has them; elsewhere bf16 is computed in f32. */
#ifdef SS_BF16_DOT
#define NAME(x) ss_attention_##x##_bf16
#define REAL float
#define LANES SS_LANES
#define VEC ss_vf
#define UNIT uint32_t
#define KU 2
#define VSET(x) ss_vset(x)
#define VFMA(a, b, c) ss_vfma(a, b, c)
#define VSTEP(acc, a, b) ss_vdot_bf16(acc, ss_vuset(a), b)
#define VUNITS(p) ss_vpack_bf16((p)[0], (p)[1])
#define ONES 0x3f803f80u
#define UVEC ss_vu
#define VMAX(a, b) ss_vmax(a, b)
#define VEXP2(x) ss_vexp2(x, 1)
#define VFILL(v, n, x) ss_vfill(v, n, x)
#define VSUM(x) ss_vsum(x)
#define VLARGEST(x) ss_vlargest(x)
#define RLOG(x) logf(x)
#include "attention_kernel.h"
#else
#define ss_attention_forward_bf16 ss_attention_forward_f32
#define ss_attention_backward_bf16 ss_attention_backward_f32
#endif

void ss_attention_forward(const ss_attention *s, void *const *b, void *scratch, int64_t threads) {
    forward(s->kind == SS_ELEM_BF16 ? ss_attention_forward_bf16 : ss_attention_forward_f32, s, b, scratch,
            threads);
}

void ss_attention_backward(const ss_attention *s, void *const *b, void *scratch, int64_t threads) {
    backward(s->kind == SS_ELEM_BF16 ? ss_attention_backward_bf16 : ss_attention_backward_f32, s, b, scratch,
             threads);
}
