/* Peak rates of this machine, one line each: `name value`, in FLOP/s or byte/s.

   Built with -O3 -march=native -fopenmp. A rate is the best of several short runs on all threads.
   Lines are flushed one by one: where an instruction is refused, the rates before it are known.
   `peaks travel` prints how long a cache line takes from one core to another, in seconds. */
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__AVX512F__) || defined(__AMX_TILE__)
#include <immintrin.h>
#endif

enum { RUNS = 60, MEMORY_RUNS = 10, LOOPS = 400000, CHAINS = 16, PASSES = 4000 };

#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float vec __attribute__((vector_size(32)));
#else
typedef float vec __attribute__((vector_size(16)));
#endif

static volatile float sink;

static void print(const char *name, double rate) {
  printf("%s %.6e\n", name, rate);
  fflush(stdout);
}

/* Best rate of `work`, which each thread runs; `each` is what one thread does in one run. */
static double best_rate(void (*work)(void), double each, int runs) {
  double best = 0;
  for (int run = 0; run < runs; run++) {
    double start = omp_get_wtime();
#pragma omp parallel
    work();
    double rate = each * omp_get_max_threads() / (omp_get_wtime() - start);
    if (rate > best) best = rate;
  }
  return best;
}

/* As many independent chains as hide the latency of a fused multiply-add on two ports. */
static void fma_fp32(void) {
  vec sum[CHAINS], a = {0}, b = {0};
  for (int c = 0; c < CHAINS; c++) sum[c] = a + (float)c;
  a += 0.999f;
  b += 0.001f;
  for (int i = 0; i < LOOPS; i++) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * a + b;
  }
  for (int c = 1; c < CHAINS; c++) sum[0] += sum[c];
  sink = sum[0][0];
}

#ifdef __AVX512BF16__
static void dot_bf16(void) {
  __m512 sum[CHAINS]; /* in registers: every loop over it is unrolled */
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_setzero_ps();
  for (int i = 0; i < LOOPS; i++) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) {
      sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
      __asm__ volatile("" : "+v"(sum[c]));
    }
  }
#pragma GCC unroll 16
  for (int c = 1; c < CHAINS; c++) sum[0] = _mm512_add_ps(sum[0], sum[c]);
  sink = _mm512_reduce_add_ps(sum[0]);
}
#endif

#ifdef __AMX_BF16__
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

static void tile_bf16(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config;
  static const uint8_t zeros[1024];
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int i = 0; i < LOOPS / 16; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
#endif

/* Memory far larger than the caches, touched first by the thread that uses it. */
static size_t length = (size_t)48 << 20;
static float *first, *second;

static void touch(void) {
#pragma omp for schedule(static)
  for (size_t i = 0; i < length; i++) first[i] = 1, second[i] = 0;
}

static void read_memory(void) {
  float sum = 0;
#pragma omp for schedule(static) nowait
  for (size_t i = 0; i < length; i += 16) {
    vec *p = (vec *)(first + i), part = p[0];
    for (size_t k = 1; k < 16 * sizeof(float) / sizeof(vec); k++) part += p[k];
    sum += part[0];
  }
  sink = sum;
}

/* What an optimizer does: reads two arrays and writes one of them. */
static void update_memory(void) {
#pragma omp for schedule(static)
  for (size_t i = 0; i < length; i++) first[i] = first[i] * 0.5f + second[i];
}

/* Two threads hand a number to and fro, each on a core of its own. */
static double travel(const int *cores) {
  static volatile int turn __attribute__((aligned(128)));
  double start = 0, end = 0;
#pragma omp parallel num_threads(2)
  {
    const int own = omp_get_thread_num();
    cpu_set_t core;
    CPU_ZERO(&core);
    CPU_SET(cores[own], &core);
    sched_setaffinity(0, sizeof core, &core);
#pragma omp barrier
    if (own == 0) start = omp_get_wtime();
    for (int i = 0; i < PASSES; i++)
      if (i % 2 == own)
        turn = i + 1;
      else
        while (turn <= i) {
        }
    if (own == 0) end = omp_get_wtime();
#pragma omp barrier
    if (own == 0) turn = 0;
  }
  return (end - start) / PASSES;
}

int main(int count, char **words) {
  if (count > 1 && strcmp(words[1], "travel") == 0) {
    int cores[2], found = 0;
    cpu_set_t allowed;
    double best = 1;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return 1;
    for (int c = 0; c < CPU_SETSIZE && found < 2; c++)
      if (CPU_ISSET(c, &allowed)) cores[found++] = c;
    for (int run = 0; run < 5 && found == 2; run++) {
      const double seconds = travel(cores);
      if (seconds < best) best = seconds;
    }
    if (found == 2) print("travel", best);
    return 0;
  }
  print("fma_fp32", best_rate(fma_fp32, 2.0 * LOOPS * CHAINS * sizeof(vec) / sizeof(float), RUNS));
#ifdef __AVX512BF16__
  print("dot_bf16", best_rate(dot_bf16, 2.0 * LOOPS * CHAINS * 32, RUNS));
#endif
  size_t bytes = length * sizeof(float), threads = (size_t)omp_get_max_threads();
  if (posix_memalign((void **)&first, 64, bytes) || posix_memalign((void **)&second, 64, bytes))
    return 1;
#pragma omp parallel
  touch();
  print("read_bytes", best_rate(read_memory, (double)bytes / threads, MEMORY_RUNS));
  print("update_bytes", best_rate(update_memory, 3.0 * bytes / threads, MEMORY_RUNS));
#ifdef __AMX_BF16__
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
    print("tile_bf16", best_rate(tile_bf16, 2.0 * (LOOPS / 16) * 4 * 16 * 16 * 32, RUNS));
#endif
  return 0;
}
