/* One pool of threads for all generated code of a process.
 *
 * The caller publishes a piece of work as a number of parts, a share of them for each thread: the
 * first parts for the caller, the last for the last worker. So what a thread wrote in one piece of
 * work it mostly finds in its own caches in the next; other cores' may be far away. Who has
 * finished its share takes parts from the ends of those of others, and the caller waits only for parts
 * that somebody has begun. So a worker that has lost its core to another process holds nothing up.
 * Workers spin for a moment after their last part, then sleep.
 *
 * Generated code says `#pragma omp parallel for schedule(static)`. The compiler makes of that a
 * function and a call of GOMP_parallel; this file has a GOMP_parallel of its own, hidden within the
 * library, that calls the function once for each of a number of virtual threads.
 *
 * Each library has this code; all of a process use the pool of the one that was loaded first, which
 * `ss_pool_adopt` tells them.
 */
#define _GNU_SOURCE
#include "pool.h"

#include "far.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define HIDDEN __attribute__((visibility("hidden")))

enum {
    MOST_WORKERS = 256,
    SHARE = 4,              /* parts of a loop for each thread */
    SPIN = 100000,          /* nanoseconds that a worker waits awake */
    STACK = 1 << 20,
};

/* -- the work on offer -------------------------------------------------------------------------- */

/* What is left of a thread's share: the number of the piece of work and the parts [next, end), in one
 * word, so that taking a part is one exchange. Each is in cache lines of its own. */
typedef struct {
    _Alignas(128) _Atomic uint64_t left;
} Share;

enum { PART_BITS = 20 };
#define MASK ((UINT64_C(1) << PART_BITS) - 1)
static uint64_t share_of(uint64_t number, uint64_t next, uint64_t end) {
    return number << 2 * PART_BITS | end << PART_BITS | next;
}

static struct {
    _Atomic(ss_part) part;
    _Atomic(void *) context;
    _Atomic int64_t limit;      /* workers from this number on take no part: there were more before */
    _Atomic uint32_t published; /* changes with each piece of work; workers sleep on it */
    _Atomic int sleepers;
    _Atomic int resting;        /* whether workers sleep at once, as others need their cores */
    _Alignas(128) _Atomic int64_t done;
    _Alignas(128) pthread_mutex_t owner; /* held while a piece of work is under way */
    uint64_t number;
    int64_t started, wanted;    /* threads, the caller among them */
    Share shares[MOST_WORKERS];
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .started = 1, .wanted = 1};

static __thread int inside; /* whether this thread runs a part */

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Takes and runs parts of one share until none are left: its own from the front, others' from the
 * back. How many. */
static int64_t take_share(int64_t worker, int64_t whose) {
    _Atomic uint64_t *left = &pool.shares[whose].left;
    int64_t taken = 0;
    uint64_t seen = atomic_load(left), next, end;
    while ((next = seen & MASK) < (end = seen >> PART_BITS & MASK)) {
        if (worker >= atomic_load(&pool.limit)) break; /* that of this work, or its exchange fails */
        const uint64_t part = worker == whose ? next : end - 1;
        const uint64_t rest = worker == whose ? seen + 1 : seen - (UINT64_C(1) << PART_BITS);
        if (!atomic_compare_exchange_weak(left, &seen, rest)) continue;
        inside = 1;
        /* The work cannot change while one of its parts is not done. */
        atomic_load(&pool.part)(atomic_load(&pool.context), (int64_t)part, worker);
        inside = 0;
        taken++;
        seen = atomic_load(left);
    }
    return taken;
}

/* Takes and runs parts until there are none left. */
static void take_parts(int64_t worker) {
    const int64_t threads = atomic_load(&pool.limit);
    int64_t taken = 0;
    for (int64_t i = 0; i < threads; i++) taken += take_share(worker, (worker + i) % threads);
    ss_finish_stores();
    if (taken) atomic_fetch_add(&pool.done, taken);
}

/* -- workers ------------------------------------------------------------------------------------ */

static void sleep_until_published(uint32_t seen) {
#if defined(__linux__)
    atomic_fetch_add(&pool.sleepers, 1);
    syscall(SYS_futex, &pool.published, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
#else
    (void)seen;
    sched_yield();
#endif
}

static void wake_workers(void) {
#if defined(__linux__)
    if (atomic_load(&pool.sleepers))
        syscall(SYS_futex, &pool.published, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

static void *work(void *argument) {
    const int64_t worker = (int64_t)(intptr_t)argument;
    uint32_t seen = 0;
    for (;;) {
        int64_t until = now() + SPIN;
        uint32_t published;
        for (int turn = 1; (published = atomic_load(&pool.published)) == seen; turn++) {
            pause_briefly();
            if (atomic_load(&pool.resting) || (turn % 64 == 0 && now() > until)) {
                sleep_until_published(seen);
                until = now() + SPIN;
            }
        }
        seen = published;
        take_parts(worker);
    }
    return NULL;
}

/* A process that was forked has none of its parent's threads. */
static void forget_workers(void) {
    pool.started = 1;
    pthread_mutex_init(&pool.owner, NULL);
    atomic_store(&pool.sleepers, 0);
}

static void start_workers(void) {
    static int prepared;
    if (!prepared) prepared = 1, pthread_atfork(NULL, NULL, forget_workers);
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    while (pool.started < pool.wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &small, work, (void *)(intptr_t)pool.started)) break;
        pool.started++;
    }
    pthread_attr_destroy(&small);
}

/* -- calls -------------------------------------------------------------------------------------- */

static void run_alone(ss_part part, void *context, int64_t parts) {
    for (int64_t i = 0; i < parts; i++) part(context, i, 0);
}

static void own_parallel(ss_part part, void *context, int64_t parts) {
    if (parts < 2 || parts > (int64_t)MASK || pool.wanted < 2 || inside ||
        pthread_mutex_trylock(&pool.owner)) {
        run_alone(part, context, parts);
        return;
    }
    if (pool.started < pool.wanted) start_workers();
    ss_finish_stores();
    atomic_store(&pool.part, part);
    atomic_store(&pool.context, context);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.limit, pool.wanted);
    atomic_store(&pool.resting, 0);
    pool.number++;
    for (int64_t w = pool.wanted; w-- > 0;) {
        const int64_t next = w * parts / pool.wanted, end = (w + 1) * parts / pool.wanted;
        atomic_store(&pool.shares[w].left, share_of(pool.number, next, end));
    }
    atomic_fetch_add(&pool.published, 1);
    wake_workers();
    take_parts(0);
    for (int turn = 0; atomic_load(&pool.done) < parts; turn++)
        turn < 1024 ? pause_briefly() : (void)sched_yield();
    pthread_mutex_unlock(&pool.owner);
}

static int64_t own_threads(void) { return pool.wanted; }

static void own_resize(int64_t threads) {
    pool.wanted = threads < 1 ? 1 : threads > MOST_WORKERS ? MOST_WORKERS : threads;
}

static void own_rest(void) { atomic_store(&pool.resting, 1); }

typedef struct {
    void (*parallel)(ss_part, void *, int64_t);
    int64_t (*threads)(void);
    void (*resize)(int64_t);
    void (*rest)(void);
} Pool;

static const Pool own = {own_parallel, own_threads, own_resize, own_rest};
static const Pool *current = &own;

/* This library's pool, for other libraries to adopt. */
const void *ss_pool_own(void) { return &own; }
void ss_pool_adopt(const void *other) { current = other; }
void ss_pool_resize(int64_t threads) { current->resize(threads); }
/* Sends workers to sleep until there is work: the library that is called next has threads of its own. */
void ss_pool_rest(void) { current->rest(); }

HIDDEN void ss_parallel(ss_part part, void *context, int64_t parts) {
    current->parallel(part, context, parts);
}
HIDDEN int64_t ss_threads(void) { return current->threads(); }

/* -- what the compiler calls for `#pragma omp parallel` ------------------------------------------ */

static __thread int thread_number, thread_count = 1;

typedef struct {
    void (*body)(void *);
    void *data;
    int count;
} Region;

static void virtual_thread(void *context, int64_t part, int64_t worker) {
    const Region *region = context;
    (void)worker;
    const int number = thread_number, count = thread_count;
    thread_number = (int)part, thread_count = region->count;
    region->body(region->data);
    thread_number = number, thread_count = count;
}

HIDDEN void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    const int64_t most = ss_threads();
    Region region = {body, data, threads ? (int)threads : most > 1 ? (int)(SHARE * most) : 1};
    ss_parallel(virtual_thread, &region, region.count);
}
HIDDEN int omp_get_thread_num(void) { return thread_number; }
HIDDEN int omp_get_num_threads(void) { return thread_count; }
HIDDEN int omp_get_max_threads(void) { return (int)ss_threads(); }
