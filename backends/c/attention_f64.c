/* Attention in f64, which few programs call: compiled by itself. */
#include "attention_f64.h"

#include "attention_call.h"

#define NAME(x) ss_attention_##x##_of_f64
#define SS_F64
#define REAL double
#define LANES (SS_LANES / 2)
#define VEC ss_vd
#define UNIT double
#define KU 1
#define VSET(x) ss_vdset(x)
#define VFMA(a, b, c) ss_vdfma(a, b, c)
#define VSTEP(acc, a, b) ss_vdfma(ss_vdset(a), b, acc)
#define VUNITS(p) (p)[0]
#define ONES 1
#define UVEC ss_vd
#define VMAX(a, b) ss_vdmax(a, b)
#define VEXP2(x) ss_vdexp2(x)
#define VFILL(v, n, x) ss_vdfill(v, n, x)
#define VSUM(x) ss_vdsum(x)
#define VLARGEST(x) ss_vdlargest(x)
#define RLOG(x) log(x)
#include "attention_kernel.h"

void ss_attention_forward_f64(const ss_attention *s, void *const *b, void *scratch, int64_t threads) {
    forward(ss_attention_forward_of_f64, s, b, scratch, threads);
}

void ss_attention_backward_f64(const ss_attention *s, void *const *b, void *scratch, int64_t threads) {
    backward(ss_attention_backward_of_f64, s, b, scratch, threads);
}
