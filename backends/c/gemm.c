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
 * Where one stride does not lead along a dimension, it has digits, and packing goes by lists of
 * positions made from them. A needs no packing even so: each row begins somewhere, and one list says
 * where the elements are from there. So windows of images share in the cache what they have in common.
 * C is then turned before it is handed over.
 *
 * A `unit` is what one lane of a multiply-add takes of K: one f32, a pair of bf16 or four i8 where
 * the machine multiplies those. bf16 elsewhere is widened to f32 while packing, i8 to pairs of i16.
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
    AT_ONCE = SS_LANES == 8 ? 4 : 1, /* units of K in one turn of a tile's loop */
    KC = 384,                /* the most units of K in a packed panel of B */
    MC = 264,                /* about the most rows of A that share a packed panel */
    AMX_ROWS = 32,           /* the tile of machines with tile registers: 2 x 2 of them */
    AMX_COLS = 32,
    AMX_UNITS = 16,          /* units of K that one multiplication of tile registers takes */
    GROUP = 4,               /* panels that are packed together: columns are neighbours in memory */
    AHEAD = 16,              /* units of K that are fetched ahead where K is not contiguous */
    NEXT = 512,              /* bytes of weights that are, by windows */
    TILES = 512 << 10,       /* about the most bytes of tiles that wait for the next block of K */
    PACK_ROWS = 96,          /* rows of A that are packed together where they are neighbours in memory */
    REUSED = SS_LANES == 8 ? 128 : INT32_MAX, /* columns from which on packing A pays in any case */
    FEW = 48,                /* rows up to which it does not: they stay in the cache where they are */
    PACK_A = 20, PACK_B = 16, /* cost of packing one element, in multiply-adds */
    ALONE = 1 << 17,         /* multiply-adds below which one thread is faster */
    LARGE = 1 << 25,         /* multiply-adds from which on each thread has SHARE parts */
    SHARE = 4,
    FAR = 64 << 10,          /* bytes between scratch of two threads: cores fetch rows of tiles ahead */
};

/* Whether bf16 are multiplied in pairs, or widened to f32: known here, no kernel is there for both. */
#ifdef SS_BF16_DOT
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
#undef SS_AMX /* no machine has tile registers alone */
#define SS_AMX 0
#endif

/* i8 of a unit. Four are multiplied as i8 of A by u8 of B, which is 128 more than it should be. */
#if (SS_LANES == 16 && defined(__AVX512VNNI__)) || (SS_LANES == 8 && defined(__AVXVNNI__))
#define BYTES 4
#else
#define BYTES 2
#endif

static const double FEWER = 1.1; /* how much less time fewer parts must take */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
/* The size of blocks that are much alike: multiples of `unit`, no larger than a `limit` that is one. */
static int64_t even(int64_t size, int64_t limit, int64_t unit) {
    return most(1, blocks(blocks(size, most(1, blocks(size, limit))), unit)) * unit;
}

#include "pack.h"

/* -- the tile ----------------------------------------------------------------------------------- */

/* How rows of A lie: in memory, or packed, or as two lists say. */
enum { APART, PACKED, LISTED };

/* Rows of A, counted in bytes: unit k of row i is at p + i * row + 4 * k; of a listed one it is at
 * p + row * places[i] + units[k]. */
typedef struct {
    const char *p;
    int64_t row;
    const int64_t *places, *units;
} Rows;

/* What units are: f32, pairs of bf16, i8 or what they are widened to. */
enum { SINGLES, HALVES, INTEGERS };

/* acc + a b of i8 and u8, or of i16, in i32. */
SS_INLINE ss_vi multiply_add_integers(const char *a, ss_vi b, ss_vi acc) {
    uint32_t word;
    memcpy(&word, a, 4);
#if BYTES == 4 && SS_LANES == 16
    return (ss_vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)b, _mm512_set1_epi32(word));
#elif BYTES == 4
    return (ss_vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)b, _mm256_set1_epi32(word));
#elif SS_LANES == 16
    return acc + (ss_vi)_mm512_madd_epi16(_mm512_set1_epi32(word), (__m512i)b);
#elif SS_LANES == 8
    return acc + (ss_vi)_mm256_madd_epi16(_mm256_set1_epi32(word), (__m256i)b);
#elif defined(__SSE2__)
    return acc + (ss_vi)_mm_madd_epi16(_mm_set1_epi32(word), (__m128i)b);
#else
    return acc + (int16_t)word * (b << 16 >> 16) + (int16_t)(word >> 16) * (b >> 16);
#endif
}

SS_INLINE ss_vf multiply_add(const char *a, ss_vf b, ss_vf acc, const int units) {
#ifdef SS_BF16_DOT
    uint32_t word;
    memcpy(&word, a, 4);
    if (units == HALVES)
        return (ss_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(word), (__m512bh)b);
#endif
    float x;
    memcpy(&x, a, 4);
    return ss_vfma(ss_vset(x), b, acc);
}

#if BYTES == 4
SS_INLINE ss_vi add_bytes(ss_vi sums, const char *p) {
    const ss_vi ones = (ss_vi){0} + 0x01010101;
    ss_vi v;
    memcpy(&v, p, sizeof v);
#if SS_LANES == 16
    return (ss_vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)ones, (__m512i)v);
#else
    return (ss_vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)ones, (__m256i)v);
#endif
}
#endif

/* What rows of C are too much by where B is 128 more than it should be: 128 times the sum of A's row. */
static __attribute__((noinline)) void excess(const char *const *rows, int packed, int64_t units,
                                             int32_t *out) {
#if BYTES == 4
    const int64_t each = SS_LANES / ROWS, step = packed ? ROWS : 1; /* units of packed rows in a vector */
    ss_vi sums = {0};
    int64_t done = 0;
    if (packed && SS_LANES % ROWS == 0)
        for (; done + each <= units; done += each) sums = add_bytes(sums, rows[0] + 4 * ROWS * done);
    for (int i = 0; i < ROWS; i++) {
        int64_t k = done;
        int32_t sum = 0;
        if (packed) {
            for (int l = i; l < SS_LANES; l += ROWS) sum += sums[l];
        } else {
            ss_vi own = {0};
            for (; k + SS_LANES <= units; k += SS_LANES) own = add_bytes(own, rows[i] + 4 * k);
            for (int l = 0; l < SS_LANES; l++) sum += own[l];
        }
        for (; k < units; k++)
            for (int e = 0; e < 4; e++) sum += ((const int8_t *)rows[i])[4 * k * step + e];
        out[i] = 128 * sum;
    }
#endif
}

/* A tile, or several side by side: the next row begins `stride` floats further. */
typedef struct {
    float *p;
    int64_t stride;
} Tiles;

/* tile[ROWS, COLS] (+)= A[ROWS, units] * panel[units, COLS], the first `vecs` vectors of each row.
 * Each block of K is summed up by itself: a sum of 8192 terms in one go has several times the error.
 * Rows beyond `rows` repeat the last one. Constants after inlining: vecs, type, how. */
SS_INLINE void tile_body(const int vecs, const int type, const int how, int add, int64_t units,
                         int64_t rows, Rows a, const float *panel, int64_t cols, Tiles tile) {
    ss_vf acc[ROWS][VECS]; /* one of the two is used */
    ss_vi sum[ROWS][VECS];
    const char *at[ROWS];
    const int64_t step = how == PACKED ? 4 * ROWS : 4;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        const int64_t row = least(i, rows - 1);
        at[i] = how == PACKED ? a.p + 4 * i : a.p + (how == LISTED ? a.places[row] : row) * a.row;
    }
    int32_t more[ROWS] = {0};
    if (type == INTEGERS && BYTES == 4) excess(at, how == PACKED, units, more);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) {
            acc[i][v] = ss_vset(0.0f);
            sum[i][v] = (ss_vi){0} - more[i];
        }
#pragma GCC unroll AT_ONCE
    for (int64_t k = 0; k < units; k++) {
        const int64_t unit = how == LISTED ? a.units[k] : k * step;
        ss_vf b[VECS];
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) b[v] = ss_vload(panel + k * cols + v * SS_LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const char *word = (how == PACKED ? at[0] + 4 * i : at[i]) + unit;
#pragma GCC unroll 3
            for (int v = 0; v < vecs; v++)
                if (type == INTEGERS)
                    sum[i][v] = multiply_add_integers(word, (ss_vi)b[v], sum[i][v]);
                else
                    acc[i][v] = multiply_add(word, b[v], acc[i][v], type);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) {
            float *out = tile.p + i * tile.stride + v * SS_LANES;
            if (type == INTEGERS)
                ss_vstore(out, (ss_vf)(add ? (ss_vi)ss_vload(out) + sum[i][v] : sum[i][v]));
            else
                ss_vstore(out, add ? ss_vload(out) + acc[i][v] : acc[i][v]);
        }
    }
}

typedef void (*Tile)(int add, int64_t units, int64_t rows, Rows a, const float *panel, int64_t cols,
                     Tiles tile);

#define TILE(vecs, type, how)                                                                     \
    static void tile_##vecs##type##how(int add, int64_t units, int64_t rows, Rows a,              \
                                       const float *panel, int64_t cols, Tiles tile) {            \
        tile_body(vecs, type, how, add, units, rows, a, panel, cols, tile);                       \
    }
#define HOWS(vecs, type) TILE(vecs, type, 0) TILE(vecs, type, 1) TILE(vecs, type, 2)
#define NAMES(vecs, type) {tile_##vecs##type##0, tile_##vecs##type##1, tile_##vecs##type##2}
#ifdef SS_BF16_DOT
#define HALVES_TILES(vecs) HOWS(vecs, 1)
#define HALVES_NAMES(vecs) NAMES(vecs, 1)
#else
#define HALVES_TILES(vecs)
#define HALVES_NAMES(vecs) {0}
#endif
#define TILES(vecs) HOWS(vecs, 0) HALVES_TILES(vecs) TILE(vecs, 2, 0) TILE(vecs, 2, 1)
#define TYPES(vecs) {NAMES(vecs, 0), HALVES_NAMES(vecs), {tile_##vecs##20, tile_##vecs##21}}
TILES(1)
TILES(2)
#if SS_LANES == 8
static const Tile TILE_OF[VECS][3][3] = {TYPES(1), TYPES(2)};
#else
TILES(3)
static const Tile TILE_OF[VECS][3][3] = {TYPES(1), TYPES(2), TYPES(3)};
#endif

#if SS_AMX
/* tile[32, 32] (+)= A[32, units] * panel[units, 32]; units is a multiple of AMX_UNITS. */
static void amx_tile(int add, int64_t units, Rows a, const float *panel, Tiles to) {
    const int64_t wide = 4 * AMX_COLS, row = 4 * to.stride;
    float *tile = to.p, *low = tile + 16 * to.stride;
    if (add) {
        ss_tile_load(0, tile, row);
        ss_tile_load(1, tile + 16, row);
        ss_tile_load(2, low, row);
        ss_tile_load(3, low + 16, row);
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
    ss_tile_store(0, tile, row);
    ss_tile_store(1, tile + 16, row);
    ss_tile_store(2, low, row);
    ss_tile_store(3, low + 16, row);
}
#endif

/* -- one thread's part -------------------------------------------------------------------------- */

typedef struct {
    const ss_gemm *g;
    int64_t each;             /* elements of a unit */
    int amx;
    int direct;               /* whether A is read where it is */
    int64_t rows, cols;       /* of a tile, and of a panel */
    int64_t k, units, width;  /* what is summed up, the same in units, these padded */
    int64_t block;            /* units of a block of K: blocks are much alike */
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
    const ss_windows *w = s.g->windows;
    s.k = k;
    s.units = blocks(w ? w->channels : k, s.each) * (w ? w->taps : 1);
    s.width = s.amx ? blocks(s.units, AMX_UNITS) * AMX_UNITS : s.units;
    s.block = even(s.width, KC, AMX_UNITS);
    return s;
}

/* How many products may be computed together: all those that have one A. */
static int64_t batches(const ss_gemm *g) {
    return g->a_batch == 0 && g->grouping == SS_UNGROUPED ? g->batch : 1;
}

/* Whether the units of listed rows of A are words of memory. */
static int whole_units(const ss_gemm *g, int64_t each) {
    if (g->type == SS_F32 || g->windows) return g->type == SS_F32 || each == 2;
    const int last = SS_DIGITS - 1;
    return each == 2 && g->a_sum->stride[last] == 1 && g->a_sum->size[last] % 2 == 0;
}

static Shape shape_of(const ss_gemm *g) {
    Shape s = {.g = g, .amx = use_amx(g), .rows = ROWS, .cols = COLS};
    s.each = each_of((Source){.type = g->type});
    if (s.amx) s.rows = AMX_ROWS, s.cols = AMX_COLS;
    /* Two panels of two vectors take less time than one of three and one of one. */
    if (!s.amx && VECS == 3 && blocks(g->n, SS_LANES) == 4) s.cols = 2 * SS_LANES;
    s = of_length(s, g->k);
    const int whole = g->k % s.each == 0 && g->grouping != SS_GROUPS_OF_SUM;
    const int words = g->type == SS_F32 || (whole && s.each * size_of(g->type) == 4);
    s.direct = g->a_col == 1 && !g->a_sum && words;
    s.direct = s.direct && (s.amx ? s.width == s.units : g->m <= FEW || batches(g) * g->n < REUSED);
    const int reused = !g->windows && SS_LANES == 8; /* packed rows are read faster there */
    if (g->windows || g->a_sum) s.direct = !s.amx && !reused && whole_units(g, s.each);
    s.mc = least(MC / s.rows, blocks(g->m, s.rows)) * s.rows;
    const int64_t one = blocks(g->n, s.cols), all = batches(g) * one;
    if (g->order) s.mc = most(1, least(s.mc, TILES / (4 * one * s.cols)) / s.rows) * s.rows;
    const int64_t fit = TILES / (4 * s.mc * s.cols);
    s.panels = most(1, least(s.width <= KC ? least(fit, GROUP) : fit, all));
    if (g->order) s.panels = least(all, most(1, s.direct ? 1 : fit / one) * one);
    return s;
}

static int64_t panel_floats(const Shape *s) { return least(s->width, KC) * s->cols; }
/* Room for panels; none where all are packed before. */
static int64_t panels_floats(const Shape *s) { return s->g->b_packed ? 0 : GROUP * panel_floats(s); }
static int64_t tiles_floats(const Shape *s) { return s->panels * s->mc * s->cols; }
/* Room for tiles as they are handed over: turned, their `mc` columns padded to vectors, or in order. */
static int64_t handed_floats(const Shape *s) {
    if (s->g->windows) return s->panels * s->cols * blocks(s->mc, SS_LANES) * SS_LANES;
    return s->g->order ? s->mc * s->g->order->each : 0;
}
/* A machine with tile registers packs the last rows, which are fewer than a tile, in any case. */
static int64_t packed_floats(const Shape *s) {
    return (s->direct ? (s->amx ? s->rows : 0) : s->mc) * least(s->width, KC);
}

int64_t ss_gemm_scratch(const ss_gemm *g) {
    Shape s = shape_of(g);
    const int64_t floats =
        panels_floats(&s) + packed_floats(&s) + tiles_floats(&s) + handed_floats(&s);
    return blocks(4 * floats, 64) * 64 + FAR;
}

/* A part of C: rows [i0, i1) and columns [j0, j1) of matrices [first, first + count). */
typedef struct {
    int64_t first, count, i0, i1, j0, j1;
} Part;

/* A block of K: its units, these padded, and lists of where its elements are, if there are any; of
 * listed rows that are read where they are, how many bytes the units are from where one begins. */
typedef struct {
    int64_t u, units, wide;
    Sum a, b;
    int64_t bytes[KC];
} Block;

/* The units of windows, tap by tap of one channel after the other, of two where units are pairs. */
static void list_windows(const Shape *s, Block *k) {
    const ss_windows *w = s->g->windows;
    const int64_t each = s->each, size = size_of(s->g->type);
    int64_t channel = k->u / w->taps * each, tap = k->u % w->taps;
    for (int64_t u = 0; u < k->units; u++) {
        const int64_t at = channel + w->a_tap[tap];
        if (s->direct)
            k->bytes[u] = at * size;
        else
            for (int64_t e = 0; e < each; e++) k->a.at[each * u + e] = at + e;
        if (++tap == w->taps) tap = 0, channel += each;
    }
    k->a.units = k->units;
    k->a.elements = each * k->units;
    k->a.runs = 0;
}

static void start_block(const Shape *s, Source left, Source right, int64_t u, Block *k) {
    const int64_t each = s->each;
    k->u = u;
    k->units = least(s->block, s->units - u);
    k->wide = least(s->block, s->width - u);
    if (s->g->windows) {
        list_windows(s, k);
        return;
    }
    const int64_t elements = least(each * k->units, s->k - each * u);
    if (listed(left)) {
        list_sum(left, each * u, elements, k->units, &k->a);
        for (int64_t i = 0; s->direct && i < k->units; i++)
            k->bytes[i] = k->a.at[each * i] * size_of(left.type);
    }
    if (listed(right)) list_sum(right, each * u, elements, k->units, &k->b);
}

/* `at`: where rows begin that are listed. */
static void pack_a(const Shape *s, Source a, int64_t i, int64_t rows, const int64_t *at, const Block *k,
                   float *packed) {
#if SS_AMX
    if (s->amx) {
        for (int64_t r = s->direct ? rows / s->rows * s->rows : 0; r < rows; r += s->rows) {
            const int64_t count = least(s->rows, rows - r);
            float *out = packed + (s->direct ? 0 : r * k->wide);
            if (listed(a))
                pack_rows_listed(a, &k->a, at + r, count, k->wide, out);
            else
                pack_rows(a, k->u, k->units, s->k, i + r, count, k->wide, out);
        }
        return;
    }
#endif
    if (s->direct) return;
    if (listed(a)) {
        for (int64_t r = 0; r < rows; r += ROWS)
            pack_listed(a, &k->a, at + r, least(ROWS, rows - r), ROWS, packed + r * k->units);
        return;
    }
    int64_t r = 0;
    if (a.j_stride == 1) {
        const int64_t floats = ROWS * k->units, some = PACK_ROWS / ROWS;
        for (int64_t count; (count = least(some, (rows - r) / ROWS)) > 0; r += count * ROWS)
            pack_lanes(a, k->u, k->units, s->k, i + r, count, ROWS, floats, packed + r * k->units);
    }
    for (; r < rows; r += ROWS)
        pack(a, k->u, k->units, s->k, i + r, least(ROWS, rows - r), ROWS, packed + r * k->units);
}

/* Where panel `q` of a part is: in matrix `batch`, columns [j, j + cols). */
typedef struct {
    int64_t batch, j, cols;
} Panel;

static Panel panel_of(const Shape *s, const Part *p, int64_t q) {
    const int64_t across = blocks(p->j1 - p->j0, s->cols), j = p->j0 + q % across * s->cols;
    return (Panel){q / across, j, least(s->cols, p->j1 - j)};
}

/* Packs panels [q, q + count) of B, one each `floats`; `step` is how many bytes its matrices are apart. */
static void pack_b(const Shape *s, Source b, int64_t step, const Part *p, int64_t q, int64_t count,
                   const Block *k, float *panels, int64_t floats) {
    const char *start = b.p;
    const Panel first = panel_of(s, p, q), last = panel_of(s, p, q + count - 1);
    const int whole = first.batch == last.batch && last.cols == s->cols;
    const int lanes = b.j_stride == 1 && !listed(b) && whole;
    if (lanes) {
        b.p += first.batch * step;
        pack_lanes(b, k->u, k->units, s->k, first.j, count, s->cols, floats, panels);
    }
    for (int64_t c = 0; c < count; c++) {
        float *out = panels + c * floats;
        memset(out + k->units * s->cols, 0, 4 * (k->wide - k->units) * s->cols);
        if (lanes) continue;
        const Panel at = panel_of(s, p, q + c);
        b.p = start + at.batch * step;
        if (b.windows) {
            pack_taps(b, k->u, k->units, at.j, at.cols, s->cols, out);
        } else if (listed(b)) {
            int64_t js[COLS < AMX_COLS ? AMX_COLS : COLS];
            list(b.j, b.j_stride, at.j, at.cols, js);
            pack_listed(b, &k->b, js, at.cols, s->cols, out);
        } else {
            pack(b, k->u, k->units, s->k, at.j, at.cols, s->cols, out);
        }
    }
    for (int64_t i = 0; BYTES == 4 && b.type == SS_I8 && i < count * floats; i += SS_LANES)
        ss_vstore(panels + i, (ss_vf)((ss_vu)ss_vload(panels + i) ^ 0x80808080u));
}

/* Where panel `q` of a packed B begins: all panels of one block of K, then those of the next. */
static int64_t packed_at(const Shape *s, const Block *k, int64_t q) {
    return (k->u * blocks(s->g->n, s->cols) + q * k->wide) * s->cols;
}

/* tiles[rows, cols] (+)= A[rows, block of K] * panel. */
static void multiply(const Shape *s, Source a, const float *packed, const int64_t *at, int64_t i,
                     int64_t rows, const Block *k, int64_t cols, const float *panel, Tiles tiles) {
    const int64_t size = size_of(a.type), stride = a.j_stride * size;
    const char *direct = a.p + i * stride + 4 * k->u;
#if SS_AMX
    if (s->amx) {
        for (int64_t r = 0; r < rows; r += s->rows) {
            const int whole = s->direct && r + s->rows <= rows;
            const float *own = packed + (s->direct ? 0 : r * k->wide);
            const Rows source = {whole ? direct + r * stride : (const char *)own,
                                 whole ? stride : 4 * k->wide};
            const Tiles to = {tiles.p + r * tiles.stride, tiles.stride};
            amx_tile(k->u > 0, k->wide, source, panel, to);
        }
        return;
    }
#endif
    const int how = !s->direct ? PACKED : listed(a) ? LISTED : APART;
    const int type = a.type == SS_I8 ? INTEGERS : s->each == 2 ? HALVES : SINGLES;
    const Tile tile = TILE_OF[blocks(cols, SS_LANES) - 1][type][how];
    for (int64_t r = 0; r < rows; r += ROWS) {
        Rows source = {(const char *)(packed + r * k->units)};
        if (how == APART) source = (Rows){direct + r * stride, stride};
        if (how == LISTED) source = (Rows){a.p, size, at + r, k->bytes};
        const Tiles to = {tiles.p + r * tiles.stride, tiles.stride};
        tile(k->u > 0, k->units, least(ROWS, rows - r), source, panel, s->cols, to);
    }
}

/* Hands the tiles of panels [from, from + count) to the epilogue: rows from `i` on, and as many columns
 * at once as belong to one matrix, so that it walks along memory. */
static void finish(const Shape *s, const Part *p, int64_t i, int64_t rows, int64_t from, int64_t count,
                   Tiles tiles, void *const *buffers) {
    const int64_t across = blocks(p->j1 - p->j0, s->cols);
    for (int64_t q = 0, many; q < count; q += many) {
        const Panel at = panel_of(s, p, from + q);
        many = least(count - q, across - (from + q) % across);
        const int64_t cols = least(many * s->cols, p->j1 - at.j);
        s->g->finish(buffers, p->first + at.batch, i, at.j, rows, cols, tiles.p + q * s->cols,
                     tiles.stride);
    }
}

/* The same of windows: image by image, turned first. */
static void finish_turned(const Shape *s, const Part *p, int64_t i, int64_t rows, int64_t from,
                          int64_t count, Tiles tiles, float *turned, void *const *buffers) {
    const int64_t places = s->g->windows->places, j = p->j0 + from * s->cols;
    const int64_t cols = least(count * s->cols, p->j1 - j);
    for (int64_t r = 0, some; r < rows; r += some) {
        const int64_t image = (i + r) / places, place = (i + r) % places;
        some = least(rows - r, places - place);
        const int64_t width = blocks(some, SS_LANES) * SS_LANES;
        const Source rowwise = {(const char *)(tiles.p + r * tiles.stride), SS_F32, 1, tiles.stride};
        pack(rowwise, 0, cols, cols, 0, some, width, turned);
        s->g->finish(buffers, image, j, place, cols, some, turned, width);
    }
}

/* The same of columns in another order: matrix by matrix. */
static void finish_ordered(const Shape *s, const Part *p, int64_t i, int64_t rows, int64_t from,
                           int64_t count, Tiles tiles, float *ordered, void *const *buffers) {
    enum { SOME = 64 };
    const ss_order *o = s->g->order;
    const int64_t one = blocks(s->g->n, s->cols);
    for (int64_t q = 0; q < count; q += one) {
        const int64_t first = (p->first + (from + q) / one) * o->each, cols = least(o->each, o->all - first);
        const float *tile = tiles.p + q * s->cols;
        for (int64_t c = 0; c < cols; c += SOME) {
            int64_t at[SOME];
            const int64_t some = least(SOME, cols - c);
            list(&o->at, 0, c, some, at);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < some; j++)
                    ordered[r * cols + c + j] = tile[r * tiles.stride + at[j]];
        }
        s->g->finish(buffers, 0, i, first, rows, cols, ordered, cols);
    }
}

/* `right` is B of the first matrix, that of the next is `step` bytes further. */
static void product(const Shape *s, Source left, Source right, int64_t step, Part p,
                    void *const *buffers, float *scratch) {
    float *panels = scratch, *packed = panels + panels_floats(s);
    const Tiles tiles = {packed + packed_floats(s), s->panels * s->cols};
    const ss_windows *w = s->g->windows;
    const int64_t all = p.count * blocks(p.j1 - p.j0, s->cols);
    const int64_t high = even(p.i1 - p.i0, s->mc, s->rows), floats = panel_floats(s);
    int64_t at[MC];
    Block k;
    for (int64_t i = p.i0; i < p.i1; i += high) {
        const int64_t rows = least(high, p.i1 - i);
        if (listed(left)) list(w ? &w->rows : 0, left.j_stride, i, rows, at);
        for (int64_t from = 0; from < all; from += s->panels) {
            const int64_t count = least(s->panels, all - from);
            for (int64_t u = 0; u < s->units; u += s->block) {
                if (s->units > KC || from == 0) {
                    start_block(s, left, right, u, &k);
                    pack_a(s, left, i, rows, at, &k, packed);
                }
                for (int64_t q = 0; q < count; q++) {
                    const float *panel = panels + q % GROUP * floats;
                    const Tiles own = {tiles.p + q * s->cols, tiles.stride};
                    if (s->g->b_packed)
                        panel = (const float *)right.p + packed_at(s, &k, p.j0 / s->cols + from + q);
                    else if (q % GROUP == 0)
                        pack_b(s, right, step, &p, from + q, least(GROUP, count - q), &k, panels, floats);
                    const int64_t cols = panel_of(s, &p, from + q).cols;
                    multiply(s, left, packed, at, i, rows, &k, cols, panel, own);
                }
            }
            if (s->units == 0) memset(tiles.p, 0, 4 * tiles_floats(s));
            float *handed = tiles.p + tiles_floats(s);
            if (w)
                finish_turned(s, &p, i, rows, from, count, tiles, handed, buffers);
            else if (s->g->order)
                finish_ordered(s, &p, i, rows, from, count, tiles, handed, buffers);
            else
                finish(s, &p, i, rows, from, count, tiles, buffers);
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

/* B of the matrix at `p`. */
static Source right_of(const ss_gemm *g, const void *p) {
    const ss_type type = g->b_rounded ? SS_F32 : g->type;
    return (Source){p, type, g->b_row, g->b_col, g->b_sum, g->b_cols, g->windows, g->b_rounded};
}

/* A part, group by group. */
static void part(const Job *job, Part p, float *scratch) {
    const ss_gemm *g = job->s.g;
    const int64_t size = size_of(g->type), step = g->b_batch * size;
    Source left = {job->a + p.first * g->a_batch * size, g->type, g->a_col, g->a_row, g->a_sum};
    left.windows = g->windows;
    Source right = right_of(g, job->b + p.first * step);
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
    const double b = s->g->b_packed ? 0 : PACK_B * (double)cols * blocks(rows, s->mc);
    return ((double)rows * cols + a + b) * s->units;
}

/* `parts` parts or more where the matrix has that many tiles, or fewer, but one for each thread, where
 * that takes much less time, given that each part packs its rows of A and its columns of B itself. */
static Cut cut(const Shape *s, int64_t parts, int64_t threads) {
    const ss_gemm *g = s->g;
    const int64_t high = blocks(g->m, s->rows), wide = g->order ? 1 : blocks(g->n, s->cols);
    const int64_t deep = most(1, batches(g) / parts), groups = blocks(g->batch, deep);
    const int64_t each = least(blocks(parts, groups), high * wide);
    const int64_t needed = least(blocks(threads, groups), each);
    Cut best = {0};
    double least_cost = 0;
    for (int64_t across = 1; across <= least(wide, each); across++)
        for (int64_t down = 1; down <= least(high, blocks(each, across)); down++) {
            Cut c = {.groups = groups, .deep = deep};
            c.high = blocks(high, down) * s->rows;
            c.wide = g->order ? g->n : blocks(wide, across) * s->cols;
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

typedef struct {
    Shape s;
    Source b;
    float *out;
} Packing;

static void pack_some(void *context, int64_t group, int64_t worker) {
    (void)worker;
    const Packing *job = context;
    const Shape *s = &job->s;
    const int64_t q = group * GROUP, count = least(GROUP, blocks(s->g->n, s->cols) - q);
    const Part whole = {.count = 1, .i1 = s->g->m, .j1 = s->g->n};
    Block k;
    for (int64_t u = 0; u < s->units; u += s->block) {
        start_block(s, (Source){0}, job->b, u, &k);
        float *panels = job->out + packed_at(s, &k, q);
        pack_b(s, job->b, 0, &whole, q, count, &k, panels, k.wide * s->cols);
    }
}

void ss_gemm_pack(const ss_gemm *g, const void *b, void *packed) {
    Packing job = {shape_of(g), right_of(g, b), packed};
    ss_parallel(pack_some, &job, blocks(blocks(g->n, job.s.cols), GROUP));
}
