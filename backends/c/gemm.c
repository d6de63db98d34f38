/* Matrix products of any size and layout: C = A B, with what follows done while C is in the cache.
 *
 * The product is computed in tiles of ROWS x COLS that stay in registers over a block of K. For each
 * MC rows of A and some panels of COLS columns of B
 *
 *     for each block of K:   pack A[rows, block], which stays in L2
 *         for each panel:    pack B[block, panel]
 *             for each ROWS rows of A:   tile += A[rows, block] * panel
 *     for each panel:        hand its tiles to the epilogue, which stores them
 *
 * A is read where it is when K is contiguous in it, unless packed rows are read so much faster that
 * packing them pays. Threads split rows and columns, never K: results are equal for every number of
 * threads.
 *
 * Where one stride does not lead along a dimension, as along the windows of a convolution, it has
 * digits, and packing goes by lists of positions made from them.
 *
 * A `unit` is what one lane of a multiply-add takes of K: one f32, or a pair of bf16 where the
 * machine multiplies pairs. bf16 elsewhere is widened to f32 while packing.
 *
 * Source of the loop order: Goto and van de Geijn, "Anatomy of high-performance matrix
 * multiplication", ACM TOMS 34(3), 2008.
 */
#include "gemm.h"

#include "amx.h"
#include "pool.h"
#include "vector.h"

enum {
#if SS_LANES == 16
    ROWS = 8,
    VECS = 3,
#elif SS_LANES == 8
    ROWS = 6,
    VECS = 2,
#else
    ROWS = 4,
    VECS = 3,
#endif
    COLS = VECS * SS_LANES,
    KC = 384,                /* units of K in a packed panel of B */
    MC = 256,                /* about the most rows of A that share a packed panel */
    AMX_ROWS = 32,           /* the tile of machines with tile registers: 2 x 2 of them */
    AMX_COLS = 32,
    AMX_UNITS = 16,          /* units of K that one multiplication of tile registers takes */
    GROUP = 4,               /* panels that are packed together: columns are neighbours in memory */
    AHEAD = 16,               /* units of K that are fetched ahead where K is not contiguous */
    TILES = 512 << 10,       /* about the most bytes of tiles that wait for the next block of K */
    PACK_UNITS = 32,         /* units of K that are packed of all rows before the next */
    REUSED = SS_LANES == 8 ? 128 : INT32_MAX, /* columns from which on packing A pays in any case */
    PACK_A = 20, PACK_B = 16, /* cost of packing one element, in multiply-adds */
    ALONE = 1 << 17,         /* multiply-adds below which one thread is faster */
    LARGE = 1 << 25,         /* multiply-adds from which on each thread has SHARE parts */
    SHARE = 4,
};

#if defined(__AVX512BF16__) && SS_LANES == 16
#define PAIRS 1
#else
#define PAIRS 0
#endif

static const double FEWER = 1.1; /* how much less time fewer parts must take */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

/* -- the tile ----------------------------------------------------------------------------------- */

/* Rows of A: unit k of row i is at p + i * row + k * unit bytes. */
typedef struct {
    const char *p;
    int64_t row, unit;
} Rows;

SS_INLINE ss_vf multiply_add(const char *a, ss_vf b, ss_vf acc, const int pairs) {
#if PAIRS
    if (pairs) {
        int32_t word;
        memcpy(&word, a, 4);
        return (ss_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
    }
#endif
    float x;
    memcpy(&x, a, 4);
    return ss_vfma(ss_vset(x), b, acc);
}

/* tile[ROWS, COLS] (+)= A[ROWS, units] * panel[units, COLS], the first `vecs` vectors of each row.
 * Rows beyond `rows` repeat the last one. Constants after inlining: vecs, pairs, packed. */
SS_INLINE void tile_body(const int vecs, const int pairs, const int packed, int add, int64_t units,
                         int64_t rows, Rows a, const float *panel, float *tile) {
    ss_vf acc[ROWS][VECS];
    const char *at[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        at[i] = packed ? a.p + 4 * i : a.p + least(i, rows - 1) * a.row;
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++)
            acc[i][v] = add ? ss_vload(tile + i * COLS + v * SS_LANES) : ss_vset(0.0f);
    }
    const int64_t step = packed ? 4 * ROWS : 4;
    for (int64_t k = 0; k < units; k++) {
        ss_vf b[VECS];
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) b[v] = ss_vload(panel + k * COLS + v * SS_LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const char *word = (packed ? at[0] + 4 * i : at[i]) + k * step;
#pragma GCC unroll 3
            for (int v = 0; v < vecs; v++) acc[i][v] = multiply_add(word, b[v], acc[i][v], pairs);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) ss_vstore(tile + i * COLS + v * SS_LANES, acc[i][v]);
    }
}

typedef void (*Tile)(int add, int64_t units, int64_t rows, Rows a, const float *panel, float *tile);

#define TILE(vecs, pairs, packed)                                                                 \
    static void tile_##vecs##pairs##packed(int add, int64_t units, int64_t rows, Rows a,          \
                                           const float *panel, float *tile) {                     \
        tile_body(vecs, pairs, packed, add, units, rows, a, panel, tile);                         \
    }
#define TILES(vecs) TILE(vecs, 0, 0) TILE(vecs, 0, 1) TILE(vecs, 1, 0) TILE(vecs, 1, 1)
#define NAMES(vecs) {{tile_##vecs##00, tile_##vecs##01}, {tile_##vecs##10, tile_##vecs##11}}
TILES(1)
TILES(2)
#if SS_LANES == 8
static const Tile TILE_OF[VECS][2][2] = {NAMES(1), NAMES(2)};
#else
TILES(3)
static const Tile TILE_OF[VECS][2][2] = {NAMES(1), NAMES(2), NAMES(3)};
#endif

#if SS_AMX
/* tile[32, 32] (+)= A[32, units] * panel[units, 32]; units is a multiple of AMX_UNITS. */
static void amx_tile(int add, int64_t units, Rows a, const float *panel, float *tile) {
    const int64_t wide = 4 * AMX_COLS;
    float *low = tile + 16 * AMX_COLS;
    if (add) {
        ss_tile_load(0, tile, wide);
        ss_tile_load(1, tile + 16, wide);
        ss_tile_load(2, low, wide);
        ss_tile_load(3, low + 16, wide);
    } else {
        ss_tile_zero(0);
        ss_tile_zero(1);
        ss_tile_zero(2);
        ss_tile_zero(3);
    }
    for (int64_t u = 0; u < units; u += AMX_UNITS) {
        ss_tile_load(4, a.p + 4 * u, a.row);
        ss_tile_load(5, a.p + 16 * a.row + 4 * u, a.row);
        ss_tile_load(6, panel + u * AMX_COLS, wide);
        ss_tile_load(7, panel + u * AMX_COLS + 16, wide);
        ss_tile_multiply(0, 4, 6);
        ss_tile_multiply(1, 4, 7);
        ss_tile_multiply(2, 5, 6);
        ss_tile_multiply(3, 5, 7);
    }
    ss_tile_store(0, tile, wide);
    ss_tile_store(1, tile + 16, wide);
    ss_tile_store(2, low, wide);
    ss_tile_store(3, low + 16, wide);
}
#endif

/* -- packing ------------------------------------------------------------------------------------ */

/* A matrix as the tile sees it: `k` along units, `j` across lanes. */
typedef struct {
    const char *p;
    ss_type type;
    int64_t k_stride, j_stride;  /* elements */
    const ss_digits *k, *j;      /* instead of a stride, or 0 */
} Source;

static int listed(Source s) { return s.k || s.j; }

/* at[i] = where element `from + i` of a dimension is, counted in elements. */
static void list(const ss_digits *d, int64_t stride, int64_t from, int64_t count, int64_t *at) {
    if (!d) {
        for (int64_t i = 0; i < count; i++) at[i] = (from + i) * stride;
        return;
    }
    int64_t digit[SS_DIGITS], sum = 0;
    for (int64_t r = SS_DIGITS - 1, left = from; r >= 0; left /= d->size[r], r--) {
        digit[r] = left % d->size[r];
        sum += digit[r] * d->stride[r];
    }
    for (int64_t i = 0; i < count; i++) {
        at[i] = sum;
        for (int64_t r = SS_DIGITS - 1; r >= 0; r--) {
            sum += d->stride[r];
            if (++digit[r] < d->size[r]) break;
            sum -= digit[r] * d->stride[r];
            digit[r] = 0;
        }
    }
}

/* How many of the positions from `at` on are neighbours in memory, up to `most`. */
SS_INLINE int64_t neighbours(const int64_t *at, int64_t most) {
    int64_t n = 1;
    while (n < most && at[n] == at[0] + n) n++;
    return n;
}

SS_INLINE float element(Source s, int64_t k, int64_t j) {
    int64_t at = k * s.k_stride + j * s.j_stride;
    if (s.type == SS_F32) return ((const float *)s.p)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)s.p)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

SS_INLINE uint32_t half(Source s, int64_t k, int64_t j) {
    return ((const uint16_t *)s.p)[k * s.k_stride + j * s.j_stride];
}

/* One unit of one lane; what lies beyond K is zero. */
SS_INLINE float unit(Source s, int64_t u, int64_t j, int64_t k_end, int pairs) {
    if (!pairs) return element(s, u, j);
    uint32_t low = half(s, 2 * u, j), high = 2 * u + 1 < k_end ? half(s, 2 * u + 1, j) : 0;
    uint32_t word = low | high << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* One vector of lanes of unit `u`, where lanes are contiguous in memory. */
SS_INLINE ss_vf lanes(Source s, int64_t u, int64_t j, int64_t k_end, int pairs) {
    if (s.type == SS_F32) return ss_vload((const float *)s.p + u * s.k_stride + j);
    const uint16_t *p = (const uint16_t *)s.p + j;
    if (!pairs) return ss_vload_bf16(p + u * s.k_stride);
    ss_vh low, high = {0};
    memcpy(&low, p + 2 * u * s.k_stride, sizeof low);
    if (2 * u + 1 < k_end) memcpy(&high, p + (2 * u + 1) * s.k_stride, sizeof high);
    return (ss_vf)(__builtin_convertvector(low, ss_vu) | __builtin_convertvector(high, ss_vu) << 16);
}

/* ROWS lanes of unit `u`, where lanes are contiguous in memory. */
SS_INLINE void rows_of(Source s, int64_t u, int64_t j, int64_t k_end, int pairs, float *out) {
    if (s.type == SS_F32) {
        memcpy(out, (const float *)s.p + u * s.k_stride + j, 4 * ROWS);
        return;
    }
    const int64_t k = pairs ? 2 * u : u;
    const uint16_t *low = (const uint16_t *)s.p + k * s.k_stride + j, *high = low + s.k_stride;
    uint32_t words[ROWS];
    if (!pairs)
        for (int l = 0; l < ROWS; l++) words[l] = (uint32_t)low[l] << 16;
    else if (k + 1 < k_end)
        for (int l = 0; l < ROWS; l++) words[l] = low[l] | (uint32_t)high[l] << 16;
    else
        for (int l = 0; l < ROWS; l++) words[l] = low[l];
    memcpy(out, words, sizeof words);
}

#if defined(__AVX__) && SS_LANES >= 8
#define TURNS 1
#else
#define TURNS 0
#endif

/* A square, turned: lane l is a vector of neighbours from element at[l] on, out[c] holds element c
 * of each lane. */
#if SS_LANES == 16
SS_INLINE void turn(Source s, const int64_t *at, int pairs, float *out, int64_t out_stride) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const uint16_t *halves = (const uint16_t *)s.p + at[i];
        r[i] = (__m512i)(s.type == SS_F32 ? ss_vload((const float *)s.p + at[i])
                         : pairs          ? ss_vload((const float *)halves)
                                          : ss_vload_bf16(halves));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* r[4 q + i]: words 4 l + i of rows 4 q .. 4 q + 3 in lane l */
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        float *o = out + i * out_stride;
        _mm512_storeu_ps(o, (__m512)_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
        _mm512_storeu_ps(o + 4 * out_stride, (__m512)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
        _mm512_storeu_ps(o + 8 * out_stride, (__m512)_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
        _mm512_storeu_ps(o + 12 * out_stride, (__m512)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
    }
}
#endif
#if TURNS
/* Eight units from element `at` on. */
SS_INLINE __m256 eight(Source s, int64_t at, int pairs) {
    const uint16_t *halves = (const uint16_t *)s.p + at;
    if (s.type == SS_F32) return _mm256_loadu_ps((const float *)s.p + at);
    if (pairs) return _mm256_loadu_ps((const float *)halves);
    float wide[8];
    for (int i = 0; i < 8; i++) {
        const uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(wide + i, &bits, 4);
    }
    return _mm256_loadu_ps(wide);
}

/* The same for eight lanes: r[c] holds element c of each. */
SS_INLINE void square(Source s, const int64_t *at, int pairs, __m256 *r) {
    __m256 t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = eight(s, at[i], pairs);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* r[i + c]: words c and 4 + c of rows i .. i + 3 */
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 low = r[i], high = r[4 + i];
        r[i] = _mm256_permute2f128_ps(low, high, 0x20);
        r[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}

/* out[8, width] = the square; where a row is wider than `width`, the next overwrites what is over,
 * and the last has `width` elements. */
SS_INLINE void turn8(Source s, const int64_t *at, int pairs, float *out, int64_t width) {
    __m256 r[8];
    square(s, at, pairs, r);
#pragma GCC unroll 8
    for (int c = 0; c < 7; c++) _mm256_storeu_ps(out + c * width, r[c]);
    if (width < 8) {
        float last[8];
        _mm256_storeu_ps(last, r[7]);
        memcpy(out + 7 * width, last, 4 * width);
    } else {
        _mm256_storeu_ps(out + 7 * width, r[7]);
    }
}
#endif
#if TURNS && SS_LANES == 8
#define turn turn8
#endif

#if TURNS
/* Units of lanes [j, j + lanes), at most 8 of them, where units are contiguous in memory; writes more
 * lanes than that where `width` has them. */
static void pack_along(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j, int64_t lanes,
                       int64_t width, int pairs, float *out) {
    int64_t at[8], u = 0;
    for (int64_t l = 0; l < 8; l++) at[l] = (j + least(l, lanes - 1)) * s.j_stride + u0 * (1 + pairs);
    for (; u + 8 <= units; u += 8) {
        if (width == ROWS)
            turn8(s, at, pairs, out + u * ROWS, ROWS);
        else
            turn8(s, at, pairs, out + u * width, width);
        for (int l = 0; l < 8; l++) at[l] += 8 * (1 + pairs);
    }
    for (; u < units; u++)
        for (int64_t l = 0; l < lanes; l++)
            out[u * width + l] = unit(s, u0 + u, j + l, k_end, pairs);
}
#endif

/* out[units, width] = units [u0, u0 + units) of lanes [j0, j0 + count); lanes beyond are zero. */
static void pack(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j0, int64_t count,
                 int64_t width, int pairs, float *out) {
    int64_t j = 0;
    if (s.j_stride == 1 && width == ROWS && count == ROWS) {
        const int64_t size = s.type == SS_F32 ? 4 : 2, each = (1 + pairs) * s.k_stride;
        for (int64_t u = 0; u < units; u++) {
            __builtin_prefetch(s.p + ((u0 + u + AHEAD) * each + j0) * size);
            rows_of(s, u0 + u, j0, k_end, pairs, out + u * ROWS);
        }
        return;
    }
    if (s.j_stride == 1)
        for (; j + SS_LANES <= count; j += SS_LANES)
            for (int64_t u = 0; u < units; u++)
                ss_vstore(out + u * width + j, lanes(s, u0 + u, j0 + j, k_end, pairs));
#if TURNS
    else if (s.k_stride == 1 && (!pairs || k_end % 2 == 0)) {
        for (; j + SS_LANES <= count; j += SS_LANES) {
            int64_t at[SS_LANES], u = 0;
            for (; u + SS_LANES <= units; u += SS_LANES) {
                for (int64_t l = 0; l < SS_LANES; l++)
                    at[l] = (j0 + j + l) * s.j_stride + (u0 + u) * (1 + pairs);
                turn(s, at, pairs, out + u * width + j, width);
            }
            for (; u < units; u++)
                for (int64_t l = 0; l < SS_LANES; l++)
                    out[u * width + j + l] = unit(s, u0 + u, j0 + j + l, k_end, pairs);
        }
        for (; j < count; j += least(8, count - j))
            pack_along(s, u0, units, k_end, j0 + j, least(8, count - j), width, pairs, out + j);
    }
#endif
    if (j == width) return;
    for (int64_t u = 0; u < units; u++) {
        for (int64_t l = j; l < count; l++)
            out[u * width + l] = unit(s, u0 + u, j0 + l, k_end, pairs);
        for (int64_t l = count > j ? count : j; l < width; l++) out[u * width + l] = 0.0f;
    }
}

/* What a lane of a unit is made of. */
enum { ONE_F32, ONE_HALF, TWO_HALVES };

/* The element `at`, or it and the element `next`, which is a zero where it is not `paired`. */
SS_INLINE float lane(const char *p, const int kind, int64_t at, int64_t next, int paired) {
    if (kind == ONE_F32) return ((const float *)p)[at];
    const uint16_t *halves = (const uint16_t *)p;
    const uint32_t high = kind == ONE_HALF ? halves[at] : paired ? halves[next] : 0;
    const uint32_t word = high << 16 | (kind == TWO_HALVES ? halves[at] : 0);
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* Positions of the elements of a block of K, which make up `units` units; `runs`: whether eight units
 * are neighbours in memory somewhere. */
typedef struct {
    int64_t at[2 * KC], elements, units;
    int runs;
} Sum;

static void list_sum(Source s, int64_t from, int64_t elements, int64_t units, int pairs, Sum *k) {
    const int64_t many = 8 * (1 + pairs);
    list(s.k, s.k_stride, from, elements, k->at);
    k->elements = elements;
    k->units = units;
    k->runs = 0;
    for (int64_t i = 0; i + many <= elements && !k->runs; i++)
        k->runs = neighbours(k->at + i, many) == many;
}

/* Unit `u` of lanes which are neighbours in memory. */
SS_INLINE void across(const char *p, const int kind, const Sum *k, int64_t u, int64_t j, const int lanes,
                      float *out) {
    const int64_t i = kind == TWO_HALVES ? 2 * u : u;
    const int paired = kind == TWO_HALVES && i + 1 < k->elements;
    const int64_t at = k->at[i] + j, next = paired ? k->at[i + 1] + j : 0;
    if (kind == ONE_F32) {
        memcpy(out, (const float *)p + at, 4 * lanes);
        return;
    }
    float all[SS_LANES];
    for (int l = 0; l < lanes; l++) all[l] = lane(p, kind, at + l, next + l, paired);
    memcpy(out, all, 4 * lanes);
}

#if TURNS
/* All units of at most eight lanes, eight at a time where they are neighbours in memory and a row of
 * the panel has `room` for so many lanes or no others. */
SS_INLINE void listed_along(Source s, const int kind, const Sum *k, const int64_t *js, int64_t lanes,
                            int64_t room, int64_t width, float *out) {
    const int squares = room >= 8 || room == width;
    const int64_t each = kind == TWO_HALVES ? 2 : 1, many = 8 * each;
    for (int64_t u = 0; u < k->units;) {
        const int64_t *ks = k->at + each * u;
        float *o = out + u * width;
        if (squares && each * u + many <= k->elements && neighbours(ks, many) == many) {
            int64_t at[8];
            for (int l = 0; l < 8; l++) at[l] = js[least(l, lanes - 1)] + ks[0];
            turn8(s, at, kind == TWO_HALVES, o, width);
            u += 8;
            continue;
        }
        for (int64_t l = 0; l < lanes; l++) across(s.p, kind, k, u, js[l], 1, o + l);
        u++;
    }
}
#endif

SS_INLINE void pack_kind(Source s, const int kind, const Sum *k, const int64_t *js, int64_t count,
                         int64_t width, float *out) {
    enum { FEW = 4 };
    for (int64_t j = 0, lanes; j < count; j += lanes) {
        const int64_t run = neighbours(js + j, least(SS_LANES, count - j));
        float *o = out + j;
        lanes = run == SS_LANES ? run : run >= FEW ? FEW : 1;
#if TURNS
        if (run < FEW && k->runs) {
            lanes = least(8, count - j);
            listed_along(s, kind, k, js + j, lanes, width - j, width, o);
            continue;
        }
#endif
        if (lanes == SS_LANES)
            for (int64_t u = 0; u < k->units; u++)
                across(s.p, kind, k, u, js[j], SS_LANES, o + u * width);
        else if (lanes == FEW)
            for (int64_t u = 0; u < k->units; u++)
                across(s.p, kind, k, u, js[j], FEW, o + u * width);
        else
            for (int64_t u = 0; u < k->units; u++)
                across(s.p, kind, k, u, js[j], 1, o + u * width);
    }
    for (int64_t u = 0; count < width && u < k->units; u++)
        memset(out + u * width + count, 0, 4 * (width - count));
}

/* As pack, element (k, j) being at k->at[k] + js[j]. */
static void pack_listed(Source s, const Sum *k, const int64_t *js, int64_t count, int64_t width, int pairs,
                        float *out) {
    if (s.type == SS_F32)
        pack_kind(s, ONE_F32, k, js, count, width, out);
    else if (pairs)
        pack_kind(s, TWO_HALVES, k, js, count, width, out);
    else
        pack_kind(s, ONE_HALF, k, js, count, width, out);
}

#if SS_AMX
/* out[AMX_ROWS, width] = `units` units from u0 on of rows [i0, i0 + count); beyond is zero. */
static void pack_rows(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t i0, int64_t count,
                      int64_t width, float *out) {
    memset(out, 0, 4 * AMX_ROWS * width);
    const int64_t elements = least(2 * units, k_end - 2 * u0);
    for (int64_t r = 0; r < count; r++) {
        if (s.k_stride == 1) {
            const uint16_t *row = (const uint16_t *)s.p + (i0 + r) * s.j_stride + 2 * u0;
            memcpy(out + r * width, row, 2 * elements);
            continue;
        }
        for (int64_t u = 0; u < units; u++) out[r * width + u] = unit(s, u0 + u, i0 + r, k_end, 1);
    }
}

/* The same, element k of a row being at k->at[k] from where the row begins. */
static void pack_rows_listed(Source s, const Sum *k, int64_t i0, int64_t count, int64_t width, float *out) {
    memset(out, 0, 4 * AMX_ROWS * width);
    for (int64_t r = 0; r < count; r++)
        for (int64_t u = 0; u < k->units; u++)
            across(s.p, TWO_HALVES, k, u, (i0 + r) * s.j_stride, 1, out + r * width + u);
}
#endif

/* -- one thread's part -------------------------------------------------------------------------- */

typedef struct {
    const ss_gemm *g;
    int pairs, amx;
    int direct;               /* whether A is read where it is */
    int64_t rows, cols;       /* of a tile */
    int64_t k, units, width;  /* what is summed up, the same in units, these padded */
    int64_t mc;               /* rows that share a panel */
    int64_t panels;           /* of which the tiles wait together for the next block of K */
} Shape;

static int use_amx(const ss_gemm *g) {
#if SS_AMX
    static int allowed = -1;
    if (allowed < 0) allowed = ss_tile_allowed();
    return allowed && g->type == SS_BF16;
#else
    return 0;
#endif
}

static Shape of_length(Shape s, int64_t k) {
    s.k = k;
    s.units = s.pairs ? (k + 1) / 2 : k;
    s.width = s.amx ? blocks(s.units, AMX_UNITS) * AMX_UNITS : s.units;
    return s;
}

/* How many products may be computed together: all those that have one A. */
static int64_t batches(const ss_gemm *g) {
    return g->a_batch == 0 && g->grouping == SS_UNGROUPED ? g->batch : 1;
}

static Shape shape_of(const ss_gemm *g) {
    Shape s = {.g = g, .amx = use_amx(g), .rows = ROWS, .cols = COLS};
    s.pairs = s.amx || (PAIRS && g->type == SS_BF16);
    if (s.amx) s.rows = AMX_ROWS, s.cols = AMX_COLS;
    s = of_length(s, g->k);
    const int even = g->k % 2 == 0 && g->grouping != SS_GROUPS_OF_SUM;
    s.direct = g->a_col == 1 && !g->a_sum && (g->type == SS_F32 || (s.pairs && even));
    if (!s.amx) s.direct = s.direct && batches(g) * g->n < REUSED;
    if (s.amx) s.direct = s.direct && s.width == s.units;
    s.mc = least(MC / s.rows, blocks(g->m, s.rows)) * s.rows;
    const int64_t fit = TILES / (4 * s.mc * s.cols), all = batches(g) * blocks(g->n, s.cols);
    s.panels = most(1, least(s.width <= KC ? least(fit, GROUP) : fit, all));
    return s;
}

static int64_t panel_floats(const Shape *s) { return least(s->width, KC) * s->cols; }
static int64_t tiles_floats(const Shape *s) { return s->panels * s->mc * s->cols; }
/* A machine with tile registers packs the last rows, which are fewer than a tile, in any case. */
static int64_t packed_floats(const Shape *s) {
    return (s->direct ? (s->amx ? s->rows : 0) : s->mc) * least(s->width, KC);
}

int64_t ss_gemm_scratch(const ss_gemm *g) {
    Shape s = shape_of(g);
    int64_t floats = GROUP * panel_floats(&s) + tiles_floats(&s) + packed_floats(&s);
    return blocks(4 * floats, 64) * 64;
}

/* A part of C: rows [i0, i1) and columns [j0, j1) of matrices [first, first + count). */
typedef struct {
    int64_t first, count, i0, i1, j0, j1;
} Part;

/* A block of K: its units, these padded, and lists of where its elements are, if there are any. */
typedef struct {
    int64_t u, units, wide;
    Sum a, b;
} Block;

static void start_block(const Shape *s, Source left, Source right, int64_t u, Block *k) {
    const int64_t each = 1 + s->pairs;
    k->u = u;
    k->units = least(KC, s->units - u);
    k->wide = least(KC, s->width - u);
    const int64_t elements = least(each * k->units, s->k - each * u);
    if (listed(left)) list_sum(left, each * u, elements, k->units, s->pairs, &k->a);
    if (listed(right)) list_sum(right, each * u, elements, k->units, s->pairs, &k->b);
}

static void pack_a(const Shape *s, Source a, int64_t i, int64_t rows, const Block *k, float *packed) {
#if SS_AMX
    if (s->amx) {
        for (int64_t r = s->direct ? rows / s->rows * s->rows : 0; r < rows; r += s->rows) {
            const int64_t count = least(s->rows, rows - r);
            float *out = packed + (s->direct ? 0 : r * k->wide);
            if (listed(a))
                pack_rows_listed(a, &k->a, i + r, count, k->wide, out);
            else
                pack_rows(a, k->u, k->units, s->k, i + r, count, k->wide, out);
        }
        return;
    }
#endif
    if (s->direct) return;
    if (listed(a)) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            int64_t at[ROWS];
            const int64_t count = least(ROWS, rows - r);
            list(a.j, a.j_stride, i + r, count, at);
            pack_listed(a, &k->a, at, count, ROWS, s->pairs, packed + r * k->units);
        }
        return;
    }
    /* All rows of a few units before the next units where rows are neighbours in memory. */
    const int64_t few = a.k_stride == 1 ? k->units : PACK_UNITS;
    for (int64_t v = 0; v < k->units; v += few)
        for (int64_t r = 0; r < rows; r += ROWS)
            pack(a, k->u + v, least(few, k->units - v), s->k, i + r, least(ROWS, rows - r), ROWS,
                 s->pairs, packed + r * k->units + v * ROWS);
}

/* Where panel `q` of a part is: in matrix `batch`, columns [j, j + cols). */
typedef struct {
    int64_t batch, j, cols;
} Panel;

static Panel panel_of(const Shape *s, const Part *p, int64_t q) {
    const int64_t across = blocks(p->j1 - p->j0, s->cols), j = p->j0 + q % across * s->cols;
    return (Panel){q / across, j, least(s->cols, p->j1 - j)};
}

/* Packs `count` whole panels from column `j` on, row by row, where columns are contiguous in memory. */
static void pack_rows_of_b(const Shape *s, Source b, int64_t j, int64_t count, const Block *k,
                           float *panels) {
    const int64_t floats = panel_floats(s), cols = s->cols;
    const int64_t each = (1 + s->pairs) * b.k_stride, size = b.type == SS_F32 ? 4 : 2;
    for (int64_t u = 0; u < k->units; u++) {
        const char *ahead = b.p + ((k->u + u + AHEAD) * each + j) * size;
        for (int64_t at = 0; at < count * cols * size; at += 64) __builtin_prefetch(ahead + at);
        for (int64_t c = 0; c < count; c++)
            for (int64_t v = 0; v < cols; v += SS_LANES)
                ss_vstore(panels + c * floats + u * cols + v,
                          lanes(b, k->u + u, j + c * cols + v, s->k, s->pairs));
    }
}

/* Packs panels [q, q + count) of B; `step` is how many bytes its matrices are apart. */
static void pack_b(const Shape *s, Source b, int64_t step, const Part *p, int64_t q, int64_t count,
                   const Block *k, float *panels) {
    const int64_t floats = panel_floats(s);
    const char *start = b.p;
    const Panel first = panel_of(s, p, q), last = panel_of(s, p, q + count - 1);
    const int whole = first.batch == last.batch && last.cols == s->cols;
    if (b.j_stride == 1 && !listed(b) && whole) {
        b.p += first.batch * step;
        pack_rows_of_b(s, b, first.j, count, k, panels);
    }
    for (int64_t c = 0; c < count; c++) {
        float *out = panels + c * floats;
        memset(out + k->units * s->cols, 0, 4 * (k->wide - k->units) * s->cols);
        if (b.j_stride == 1 && !listed(b) && whole) continue;
        const Panel at = panel_of(s, p, q + c);
        b.p = start + at.batch * step;
        if (listed(b)) {
            int64_t js[COLS < AMX_COLS ? AMX_COLS : COLS];
            list(b.j, b.j_stride, at.j, at.cols, js);
            pack_listed(b, &k->b, js, at.cols, s->cols, s->pairs, out);
        } else {
            pack(b, k->u, k->units, s->k, at.j, at.cols, s->cols, s->pairs, out);
        }
    }
}

/* tiles[rows, cols] (+)= A[rows, block of K] * panel. */
static void multiply(const Shape *s, Source a, const float *packed, int64_t i, int64_t rows,
                     const Block *k, int64_t cols, const float *panel, float *tiles) {
    const int64_t stride = a.j_stride * (a.type == SS_F32 ? 4 : 2);
    const char *direct = a.p + i * stride + 4 * k->u;
#if SS_AMX
    if (s->amx) {
        for (int64_t r = 0; r < rows; r += s->rows) {
            const int whole = s->direct && r + s->rows <= rows;
            const float *own = packed + (s->direct ? 0 : r * k->wide);
            const Rows source = {whole ? direct + r * stride : (const char *)own,
                                 whole ? stride : 4 * k->wide, 4};
            amx_tile(k->u > 0, k->wide, source, panel, tiles + r * s->cols);
        }
        return;
    }
#endif
    const Tile tile = TILE_OF[blocks(cols, SS_LANES) - 1][s->pairs][!s->direct];
    for (int64_t r = 0; r < rows; r += ROWS) {
        const char *own = (const char *)(packed + r * k->units);
        const Rows source = {s->direct ? direct + r * stride : own, stride, 4};
        tile(k->u > 0, k->units, least(ROWS, rows - r), source, panel, tiles + r * COLS);
    }
}

/* `right` is B of the first matrix, that of the next is `step` bytes further. */
static void product(const Shape *s, Source left, Source right, int64_t step, Part p,
                    void *const *buffers, float *scratch) {
    float *panels = scratch, *tiles = panels + GROUP * panel_floats(s);
    float *packed = tiles + tiles_floats(s);
    const int64_t all = p.count * blocks(p.j1 - p.j0, s->cols), each = s->mc * s->cols;
    Block k;
    for (int64_t i = p.i0; i < p.i1; i += s->mc) {
        const int64_t rows = least(s->mc, p.i1 - i);
        for (int64_t from = 0; from < all; from += s->panels) {
            const int64_t count = least(s->panels, all - from);
            for (int64_t u = 0; u < s->units; u += KC) {
                if (s->units > KC || from == 0) {
                    start_block(s, left, right, u, &k);
                    pack_a(s, left, i, rows, &k, packed);
                }
                for (int64_t q = 0; q < count; q++) {
                    const Panel at = panel_of(s, &p, from + q);
                    const float *panel = panels + q % GROUP * panel_floats(s);
                    if (q % GROUP == 0)
                        pack_b(s, right, step, &p, from + q, least(GROUP, count - q), &k, panels);
                    multiply(s, left, packed, i, rows, &k, at.cols, panel, tiles + q * each);
                }
            }
            if (s->units == 0) memset(tiles, 0, 4 * tiles_floats(s));
            for (int64_t q = 0; q < count; q++) {
                const Panel at = panel_of(s, &p, from + q);
                s->g->finish(buffers, p.first + at.batch, i, at.j, rows, at.cols, tiles + q * each,
                             s->cols);
            }
        }
    }
}

/* -- all threads -------------------------------------------------------------------------------- */

/* How the matrices are cut: `groups * down * across` parts of `deep` matrices, `high` rows and
 * `wide` columns. */
typedef struct {
    int64_t groups, down, across, deep, high, wide;
} Cut;

typedef struct {
    Shape s;
    Cut c;
    const char *a, *b;
    const int32_t *ends;
    void *const *buffers;
    char *scratch;
    int64_t each, parts, lanes; /* bytes of scratch of a thread; lanes: 0 where threads take parts */
} Job;

/* Where group `e` begins: at the end of the one before, within `size`. */
static int64_t begin(const Job *job, int64_t e, int64_t size) {
    return e == 0 ? 0 : least(most(job->ends[e - 1], 0), size);
}

/* A part, group by group. */
static void part(const Job *job, Part p, float *scratch) {
    const ss_gemm *g = job->s.g;
    const int64_t size = g->type == SS_F32 ? 4 : 2, step = g->b_batch * size;
    Source left = {job->a + p.first * g->a_batch * size, g->type, g->a_col, g->a_row, g->a_sum, 0};
    Source right = {job->b + p.first * step, g->type, g->b_row, g->b_col, g->b_sum, g->b_cols};
    if (g->grouping == SS_GROUPS_OF_ROWS) {
        for (int64_t e = 0; e < g->groups; e++) {
            Part own = p;
            own.i0 = most(p.i0, begin(job, e, g->m));
            own.i1 = least(p.i1, begin(job, e + 1, g->m));
            right.p = job->b + e * step;
            product(&job->s, left, right, step, own, job->buffers, scratch);
        }
        const Shape empty = of_length(job->s, 0);
        p.i0 = most(p.i0, begin(job, g->groups, g->m));
        product(&empty, left, right, step, p, job->buffers, scratch);
    } else if (g->grouping == SS_GROUPS_OF_SUM) {
        const int64_t from = begin(job, p.first, g->k), to = begin(job, p.first + 1, g->k);
        const Shape own = of_length(job->s, most(to - from, 0));
        left.p += from * g->a_col * size;
        right.p += from * g->b_row * size;
        product(&own, left, right, step, p, job->buffers, scratch);
    } else {
        product(&job->s, left, right, step, p, job->buffers, scratch);
    }
}

/* About how long a part of `rows` x `cols` takes: multiply-adds and the packing of both sides. */
static double part_cost(const Shape *s, int64_t rows, int64_t cols) {
    const double a = s->direct ? 0 : PACK_A * (double)rows;
    const double b = PACK_B * (double)cols * blocks(rows, s->mc);
    return ((double)rows * cols + a + b) * s->units;
}

/* `parts` parts or more where the matrix has that many tiles, or fewer, but one for each thread, where
 * that takes much less time, given that each part packs its rows of A and its columns of B itself. */
static Cut cut(const Shape *s, int64_t parts, int64_t threads) {
    const ss_gemm *g = s->g;
    const int64_t high = blocks(g->m, s->rows), wide = blocks(g->n, s->cols);
    const int64_t deep = most(1, batches(g) / parts), groups = blocks(g->batch, deep);
    const int64_t each = least(blocks(parts, groups), high * wide);
    const int64_t needed = least(blocks(threads, groups), each);
    Cut best = {0};
    double least_cost = 0;
    for (int64_t across = 1; across <= least(wide, each); across++)
        for (int64_t down = 1; down <= least(high, blocks(each, across)); down++) {
            Cut c = {.groups = groups, .deep = deep};
            c.high = blocks(high, down) * s->rows;
            c.wide = blocks(wide, across) * s->cols;
            c.down = blocks(g->m, c.high);
            c.across = blocks(g->n, c.wide);
            if (c.down * c.across < needed && down * across < each) continue;
            const int64_t turns = blocks(groups * c.down * c.across, threads);
            const int64_t cols = deep * least(c.wide, g->n);
            double cost = turns * part_cost(s, least(c.high, g->m), cols);
            if (c.down * c.across < each) cost *= FEWER;
            if (best.down && cost >= least_cost) continue;
            best = c;
            least_cost = cost;
        }
    return best;
}

static void one_part(const Job *job, int64_t p, int64_t slot) {
    const Cut c = job->c;
    const ss_gemm *g = job->s.g;
    const int64_t first = p / (c.down * c.across) * c.deep;
    const int64_t i = p / c.across % c.down * c.high, j = p % c.across * c.wide;
    const Part own = {first, least(c.deep, g->batch - first), i, least(i + c.high, g->m),
                      j,     least(j + c.wide, g->n)};
#if SS_AMX
    if (job->s.amx) ss_tile_start();
#endif
    part(job, own, (float *)(job->scratch + slot * job->each));
#if SS_AMX
    if (job->s.amx) ss_tile_stop();
#endif
}

static void take(void *context, int64_t p, int64_t worker) {
    const Job *job = context;
    if (!job->lanes) {
        one_part(job, p, worker);
        return;
    }
    for (int64_t q = p; q < job->parts; q += job->lanes) one_part(job, q, p);
}

/* Parts are taken as threads become free, a few for each: a thread that loses its core to another
 * process for a while holds up one part, not its share of the product. Where there are more threads
 * than the scratch was planned for, each place in the scratch has its own parts. */
void ss_gemm_run(const ss_gemm *g, const void *a, const void *b, const int32_t *ends,
                 void *const *buffers, void *scratch, int64_t threads) {
    Job job = {shape_of(g), .a = a, .b = b, .ends = ends, .buffers = buffers, .scratch = scratch};
    const int64_t sums = g->grouping == SS_GROUPS_OF_SUM ? 1 : g->batch; /* of length k */
    const double work = (double)sums * g->m * g->n * g->k + 8.0 * g->batch * g->m * g->n;
    const int64_t used = work < ALONE ? 1 : least(threads, ss_threads());
    job.each = ss_gemm_scratch(g);
    job.c = cut(&job.s, used == 1 ? 1 : work < LARGE ? used : SHARE * used, used);
    job.parts = job.c.groups * job.c.down * job.c.across;
    job.lanes = used == 1 ? 1 : ss_threads() > threads ? threads : 0;
    ss_parallel(take, &job, job.lanes ? job.lanes : job.parts);
}
