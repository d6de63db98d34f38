/* What the arithmetics of attention share: parts of threads, clips, and how a call begins. */
#pragma once
#include "attention.h"

#include "pool.h"

#include "amx.h"
#include "draws.h"
#include "prelude.h"
#include "turn.h"
#include "vector.h"

#if SS_LANES != 16
#undef SS_AMX
#define SS_AMX 0
#endif
/* Whether products of pairs may use tile registers; known at the first call. */
#if SS_AMX
static int ss_use_tiles = -1;
#else
enum { ss_use_tiles = 0 };
#endif

#define SS_AHEAD 32 /* rows that are fetched ahead while packing */
#define SS_POINTERS 16 /* more than a call has */
#define SS_UNSEEN -1e9 /* a score of that or less weighs nothing beside one that a query may see */
#define SS_LOG2E 1.44269504088896340736

SS_INLINE int64_t ss_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
SS_INLINE int64_t ss_least(int64_t a, int64_t b) { return a < b ? a : b; }
SS_INLINE int64_t ss_most(int64_t a, int64_t b) { return a > b ? a : b; }

SS_INLINE int64_t ss_element_size(int kind) {
    return kind == SS_ELEM_F64 ? 8 : kind == SS_ELEM_F32 ? 4 : 2;
}

SS_INLINE ss_vf ss_vload_f16(const _Float16 *p) {
    ss_vf v;
    for (int i = 0; i < SS_LANES; i++) v[i] = (float)p[i];
    return v;
}

/* The next `bytes` of a thread's scratch, on a cache line of their own. */
SS_INLINE void *ss_take(char **at, int64_t bytes) {
    void *p = *at;
    *at += ss_up(bytes, 64);
    return p;
}

/* What a product of blocks leaves out under a causal mask, by the first row m of a tile. */
typedef struct {
    int64_t columns; /* nothing is wanted right of column m + columns */
    int64_t end;     /* terms from m + end on are zero */
    int64_t begin;   /* terms before m + begin are zero */
} ss_clip;
#define SS_ALL ((ss_clip){INT64_MAX / 2, INT64_MAX / 2, -INT64_MAX / 2})

/* The first (or behind the last) of `count` items of thread t of n. */
SS_INLINE int64_t ss_share(int64_t count, int t, int n) { return count * t / n; }

/* About how much work a block of queries is. */
SS_INLINE int64_t ss_block_cost(const ss_attention *s, int64_t t0) {
    return 1 + (s->causal ? ss_least(s->keys, t0 + SS_FORWARD_QUERIES) : s->keys);
}

#if SS_LANES == 16
#define SS_TALL 12
#define SS_MID 8
#define SS_LOW 4
#elif SS_LANES == 8
#define SS_TALL 6
#define SS_MID 4
#define SS_LOW 2
#elif defined(__ARM_NEON)
#define SS_TALL 8
#define SS_MID 4
#define SS_LOW 4
#else
#define SS_TALL 4
#define SS_MID 4
#define SS_LOW 4
#endif

/* -- one call ---------------------------------------------------------------------------------- */

typedef void (*part_of_thread)(const ss_attention *, void *const *, void *, int, int);

typedef struct {
    part_of_thread part;
    const ss_attention *s;
    void *const *b;
    void *scratch;
    int count;
} Job;

static void take(void *context, int64_t number, int64_t worker) {
    const Job *job = context;
    (void)worker;
#if SS_AMX
    if (ss_use_tiles) ss_tile_start();
#endif
    job->part(job->s, job->b, job->scratch, (int)number, job->count);
#if SS_AMX
    if (ss_use_tiles) ss_tile_stop();
#endif
}

static void run(part_of_thread part, const ss_attention *s, void *const *b, void *scratch,
                int64_t threads) {
#if SS_AMX
    if (ss_use_tiles < 0) ss_use_tiles = ss_tile_allowed();
#endif
    Job job = {part, s, b, scratch, (int)ss_least(ss_threads(), threads)};
    ss_parallel(take, &job, job.count);
}

/* What a mask of bools turns out to be. */
enum { SS_ANY, SS_HIDES_LATER, SS_HIDES_JUST_LATER };

/* Of one query, whether later keys are hidden, an earlier one is seen, and all of them are. */
static int ss_mask_of_row(const uint8_t *shown, int64_t step, int64_t earlier, int64_t keys) {
    uint8_t later = 0, any = 0, all = 1;
    for (int64_t j = earlier; j < keys; j++) later |= shown[j * step];
    for (int64_t j = 0; j < earlier; j++) any |= shown[j * step], all &= shown[j * step] != 0;
    return later || !any ? SS_ANY : all ? SS_HIDES_JUST_LATER : SS_HIDES_LATER;
}

/* Models keep a triangle of bools in a buffer: what it says is known only here. Where hidden scores
 * weigh nothing beside others, and each query sees something, later keys may be left out. */
static int ss_mask_found(const ss_attention *s, const uint8_t *shown) {
    if (s->mask_kind != SS_ELEM_BOOL || s->causal || s->fill > SS_UNSEEN) return SS_ANY;
    int found = SS_HIDES_JUST_LATER;
    for (int64_t b = 0; b < (s->mask.b ? s->batch : 1); b++)
        for (int64_t h = 0; h < (s->mask.h ? s->heads : 1); h++)
            for (int64_t t = 0; t < s->queries && found != SS_ANY; t++) {
                const uint8_t *row = shown + b * s->mask.b + h * s->mask.h + t * s->mask.t;
                found = (int)ss_least(
                    found, ss_mask_of_row(row, s->mask.d, ss_least(t + 1, s->keys), s->keys));
            }
    return found;
}

/* The call without what the mask, the pointer at `at` of `count`, turns out not to be needed for. */
typedef struct {
    ss_attention s;
    void *b[SS_POINTERS];
} Settled;

static void settle(Settled *to, const ss_attention *s, void *const *b, int at, int count) {
    const int found = ss_mask_found(s, b[at]);
    to->s = *s;
    memcpy(to->b, b, count * sizeof *b);
    if (found != SS_ANY) to->s.causal = 1;
    if (found != SS_HIDES_JUST_LATER) return;
    to->s.mask_kind = -1;
    memmove(to->b + at, to->b + at + 1, (count - at - 1) * sizeof *b);
}

static void forward(part_of_thread part, const ss_attention *s, void *const *b, void *scratch,
                    int64_t threads) {
    Settled call;
    settle(&call, s, b, 3, 5 + (s->mask_kind >= 0) + s->drops);
    run(part, &call.s, call.b, scratch, threads);
}

static void backward(part_of_thread part, const ss_attention *s, void *const *b, void *scratch,
                     int64_t threads) {
    Settled call;
    settle(&call, s, b, 6, 9 + (s->mask_kind >= 0) + s->drops);
    run(part, &call.s, call.b, scratch, threads);
}
