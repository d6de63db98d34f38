/* Packing the sides of a product, from where they are to the order in which tiles read them.
 *
 * A part of gemm.c, whose constants (ROWS, COLS, KC, AHEAD) it uses. What is packed is
 * out[units, width]: units of K, each with `width` lanes, rows of A or columns of B. Three ways:
 *
 * - lanes are neighbours in memory: a vector of lanes a unit;
 * - units are neighbours in memory: squares of them are turned in registers;
 * - by lists of positions, where a side has digits: vectors or squares where positions happen to be
 *   neighbours, one element at a time elsewhere.
 */
#pragma once
#include "digits.h"
#include "prelude.h"
#include "turn.h"
#include "vector.h"

/* What a lane is of bf16, and of f32 that are rounded to it. */
enum { HALF = PAIRS ? TWO_HALVES : ONE_HALF, ROUNDED = PAIRS ? TWO_ROUNDED : ONE_ROUNDED };

/* A matrix as the tile sees it: `k` along units, `j` across lanes. */
typedef struct {
    const char *p;
    ss_type type;
    int64_t k_stride, j_stride;  /* elements */
    const ss_digits *k, *j;      /* instead of a stride, or 0 */
    const ss_windows *windows;   /* whose elements it has, or 0 */
    int rounded;                 /* whether f32 are rounded to bf16: of weights */
} Source;

static int64_t size_of(ss_type type) { return type == SS_F32 ? 4 : type == SS_BF16 ? 2 : 1; }

/* Whether one has to be told where its elements are. */
static int listed(Source s) { return s.k || s.j || s.windows; }

/* What a lane of a unit is made of. */
SS_INLINE ss_word word_of(Source s) {
    return s.rounded ? (ss_word)ROUNDED : s.type == SS_F32 ? ONE_F32 : (ss_word)HALF;
}

/* Elements of K in a unit. */
SS_INLINE int64_t each_of(Source s) {
    return s.type == SS_I8 ? BYTES : 1 + is_pair(word_of(s));
}

/* How many of the positions from `at` on are neighbours in memory, up to `limit`. */
SS_INLINE int64_t neighbours(const int64_t *at, int64_t limit) {
    int64_t n = 1;
    while (n < limit && at[n] == at[0] + n) n++;
    return n;
}

/* The element `at`, or it and the element `next`, which is a zero where it is not `paired`. */
SS_INLINE float lane(const char *p, const ss_word kind, int64_t at, int64_t next, int paired) {
    const uint16_t *halves = (const uint16_t *)p;
    const float *singles = (const float *)p;
    uint32_t word;
    if (kind == ONE_F32) return singles[at];
    if (kind == ONE_ROUNDED)
        word = (uint32_t)ss_to_bf16(singles[at]) << 16;
    else if (kind == TWO_ROUNDED)
        word = ss_to_bf16(singles[at]) | (paired ? (uint32_t)ss_to_bf16(singles[next]) << 16 : 0);
    else if (kind == ONE_HALF)
        word = (uint32_t)halves[at] << 16;
    else
        word = halves[at] | (paired ? (uint32_t)halves[next] << 16 : 0);
    float x;
    memcpy(&x, &word, 4);
    return x;
}

/* i8 from element `at` on, `step` apart, as one word: as they are, or widened to i16. */
SS_INLINE uint32_t word_of_bytes(const int8_t *bytes, int64_t at, int64_t step, int64_t count) {
    uint32_t word = 0;
    for (int64_t e = 0; e < count; e++) {
        const int8_t x = bytes[at + e * step];
        word |= BYTES == 4 ? (uint32_t)(uint8_t)x << 8 * e : (uint32_t)(uint16_t)x << 16 * e;
    }
    return word;
}

/* One unit of one lane; what lies beyond K is zero. */
SS_INLINE float unit(Source s, int64_t u, int64_t j, int64_t k_end) {
    if (s.type == SS_I8) {
        const int64_t k = BYTES * u;
        const uint32_t word = word_of_bytes(
            (const int8_t *)s.p, k * s.k_stride + j * s.j_stride, s.k_stride, least(BYTES, k_end - k));
        float x;
        memcpy(&x, &word, 4);
        return x;
    }
    const int64_t k = each_of(s) * u, at = k * s.k_stride + j * s.j_stride;
    return lane(s.p, word_of(s), at, at + s.k_stride, k + 1 < k_end);
}

typedef int8_t Bytes __attribute__((vector_size(SS_LANES)));

/* One vector of lanes of unit `u` of i8, where lanes are neighbours in memory. */
SS_INLINE ss_vf lanes_of_bytes(Source s, int64_t u, int64_t j, int64_t k_end) {
    const char *bytes = s.p + BYTES * u * s.k_stride + j;
    ss_vi word = {0};
    for (int64_t e = 0; e < BYTES && BYTES * u + e < k_end; e++) {
        Bytes b;
        memcpy(&b, bytes + e * s.k_stride, sizeof b);
        const ss_vi x = __builtin_convertvector(b, ss_vi);
        word |= BYTES == 4 ? (x & 0xff) << 8 * e : (x & 0xffff) << 16 * e;
    }
    return (ss_vf)word;
}

/* A square, turned: lane l is a vector of neighbours from element at[l] on, out[c] holds element c
 * of each lane. */
#if SS_LANES == 16
SS_INLINE void turn(Source s, const int64_t *at, float *out, int64_t out_stride) {
    ss_vf r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (s.type == SS_I8) {
            r[i] = BYTES == 4 ? ss_vload((const float *)(s.p + at[i]))
                              : (ss_vf)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(s.p + at[i])));
            continue;
        }
        const uint16_t *halves = (const uint16_t *)s.p + at[i];
        r[i] = s.type == SS_F32 ? ss_vload((const float *)s.p + at[i])
               : PAIRS          ? ss_vload((const float *)halves)
                                : ss_vload_bf16(halves);
    }
    turn_vectors(r, out, out_stride);
}
#endif
#if TURNS
/* Eight units from element `at` on. */
SS_INLINE __m256 eight(Source s, int64_t at) {
    const uint16_t *halves = (const uint16_t *)s.p + at;
    if (s.type == SS_F32) return _mm256_loadu_ps((const float *)s.p + at);
    if (s.type == SS_I8)
        return BYTES == 4 ? _mm256_loadu_ps((const float *)(s.p + at))
                          : (__m256)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(s.p + at)));
    if (PAIRS) return _mm256_loadu_ps((const float *)halves);
    float wide[8];
    for (int i = 0; i < 8; i++) {
        const uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(wide + i, &bits, 4);
    }
    return _mm256_loadu_ps(wide);
}

/* The same for eight lanes, to out[8, width]; where a row is wider than `width`, the next overwrites
 * what is over, and the last has `width` elements. */
SS_INLINE void turn8(Source s, const int64_t *at, float *out, int64_t width) {
    __m256 r[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = eight(s, at[i]);
    turn_eight(r);
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
                       int64_t width, float *out) {
    const int64_t each = each_of(s);
    int64_t at[8], u = 0;
    for (int64_t l = 0; l < 8; l++) at[l] = (j + least(l, lanes - 1)) * s.j_stride + u0 * each;
    const int64_t size = size_of(s.type), next = 8 * s.j_stride * size;
    for (; u + 8 <= units; u += 8) {
        for (int64_t l = 0; l < 8; l++) __builtin_prefetch(s.p + at[l] * size + next);
        if (width == ROWS)
            turn8(s, at, out + u * ROWS, ROWS);
        else
            turn8(s, at, out + u * width, width);
        for (int l = 0; l < 8; l++) at[l] += 8 * each;
    }
    for (; u < units; u++)
        for (int64_t l = 0; l < lanes; l++)
            out[u * width + l] = unit(s, u0 + u, j + l, k_end);
}
#endif

/* Lanes of one unit, `vectors` vectors of neighbours in memory. */
SS_INLINE void lanes(const Words w, const char *p, const int vectors, float *out) {
    int v = 0;
#if SS_LANES == 16
    for (; w.kind == TWO_HALVES && v + 2 <= vectors; v += 2) {
        ss_vu rows[2], pairs[2];
        memcpy(rows, p + 2 * v * SS_LANES, sizeof *rows);
        memcpy(rows + 1, p + 2 * (v * SS_LANES + w.next), sizeof *rows);
        ss_vpair_bf16(rows[0], rows[1], pairs);
        memcpy(out + v * SS_LANES, pairs, sizeof pairs);
    }
#endif
    for (; v < vectors; v++)
        ss_vstore(out + v * SS_LANES, some_words(w, p + v * SS_LANES * element_size(w.kind), SS_LANES));
}

/* The same of several panels, `floats` apart; constants after inlining: the kind of `w`, width. */
SS_INLINE void lanes_of_panels(const Words w, const char *p, int64_t count, const int64_t width, int64_t floats,
                               float *out) {
    const int64_t wide = width * element_size(w.kind), some = 2 * SS_LANES / width;
    int64_t c = 0;
    if (width % SS_LANES == 0) {
        for (; c < count; c++) lanes(w, p + c * wide, width / SS_LANES, out + c * floats);
        return;
    }
    for (; some * width == 2 * SS_LANES && c + some <= count; c += some) {
        float all[2 * SS_LANES];
        lanes(w, p + c * wide, 2, all);
        for (int64_t i = 0; i < some; i++) memcpy(out + (c + i) * floats, all + i * width, 4 * width);
    }
    for (; c < count; c++) {
        float *o = out + c * floats;
        for (int64_t l = 0; l < width; l++) {
            const int64_t at = c * width + l;
            o[l] = lane(p, w.kind, at, at + w.next, is_pair(w.kind));
        }
    }
}

SS_INLINE void pack_panels(const ss_word kind, Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j,
                           int64_t count, const int64_t width, int64_t floats, float *out) {
    const int64_t size = element_size(kind), each = 1 + is_pair(kind);
    const int64_t whole = least(units, (k_end - each * u0) / each), row = s.k_stride * size;
    const char *p = s.p + each * u0 * row + j * size;
    const Words words = {kind, s.k_stride};
    for (int64_t u = 0; u < whole; u++, p += each * row) {
        for (int64_t e = 0; e < each; e++) ss_fetch(p + (AHEAD * each + e) * row, count * width * size);
        lanes_of_panels(words, p, count, width, floats, out + u * width);
    }
    if (whole < units) lanes_of_panels((Words){low_of(kind)}, p, count, width, floats, out + whole * width);
}

SS_INLINE void pack_panels_of_bytes(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j, int64_t count,
                                    int64_t width, int64_t floats, float *out) {
    for (int64_t u = 0; u < units; u++)
        for (int64_t c = 0; c < count; c++) {
            const int64_t first = j + c * width;
            float *o = out + c * floats + u * width;
            int64_t l = 0;
            for (; l + SS_LANES <= width; l += SS_LANES)
                ss_vstore(o + l, lanes_of_bytes(s, u0 + u, first + l, k_end));
            for (; l < width; l++) o[l] = unit(s, u0 + u, first + l, k_end);
        }
}

#define PACK_PANELS(kind, width) pack_panels(kind, s, u0, units, k_end, j, count, width, floats, out)
#define PACK_WIDTHS(kind)                                                                         \
    do {                                                                                          \
        if (width == ROWS)                                                                        \
            PACK_PANELS(kind, ROWS);                                                              \
        else if (width == COLS)                                                                   \
            PACK_PANELS(kind, COLS);                                                              \
        else if (width == 2 * SS_LANES)                                                           \
            PACK_PANELS(kind, 2 * SS_LANES);                                                      \
        else                                                                                      \
            PACK_PANELS(kind, width);                                                             \
    } while (0)

/* `count` panels of `width` lanes each, `floats` apart, unit by unit, where lanes are neighbours in
 * memory. */
static void pack_lanes(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j, int64_t count,
                       int64_t width, int64_t floats, float *out) {
    if (s.type == SS_I8)
        pack_panels_of_bytes(s, u0, units, k_end, j, count, width, floats, out);
    else if (s.type == SS_F32)
        PACK_WIDTHS(ONE_F32);
    else
        PACK_WIDTHS(HALF);
}

/* out[units, width] = units [u0, u0 + units) of lanes [j0, j0 + count) that are neighbours in memory; lanes
 * beyond are zero. */
SS_INLINE void pack_neighbours(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j0, int64_t count,
                               int64_t width, float *out) {
    const ss_word kind = word_of(s);
    const int64_t size = element_size(kind), each = 1 + is_pair(kind);
    for (int64_t u = 0; u < units; u++) {
        const int64_t k = each * (u0 + u);
        const Words w = {k + 1 == k_end ? low_of(kind) : kind, s.k_stride};
        const char *p = s.p + (k * s.k_stride + j0) * size;
        float *o = out + u * width;
        int64_t l = 0;
        for (; l + SS_LANES <= width; l += SS_LANES)
            ss_vstore(o + l, some_words(w, p + l * size, least(SS_LANES, most(0, count - l))));
        for (; l < width; l++) {
            const int64_t next = l + s.k_stride;
            o[l] = l < count ? lane(p, kind, l, next, is_pair(w.kind)) : 0.0f;
        }
    }
}

/* out[units, width] = units [u0, u0 + units) of lanes [j0, j0 + count); lanes beyond are zero. */
static void pack(Source s, int64_t u0, int64_t units, int64_t k_end, int64_t j0, int64_t count,
                 int64_t width, float *out) {
    const int64_t each = each_of(s);
    int64_t j = 0;
    if (s.j_stride == 1 && s.type != SS_I8) {
        pack_neighbours(s, u0, units, k_end, j0, count, width, out);
        return;
    }
    if (s.j_stride == 1)
        for (; j + SS_LANES <= count; j += SS_LANES)
            for (int64_t u = 0; u < units; u++)
                ss_vstore(out + u * width + j, lanes_of_bytes(s, u0 + u, j0 + j, k_end));
#if TURNS
    else if (s.k_stride == 1 && k_end % each == 0) {
        for (; j + SS_LANES <= count; j += SS_LANES) {
            int64_t at[SS_LANES], u = 0;
            for (; u + SS_LANES <= units; u += SS_LANES) {
                for (int64_t l = 0; l < SS_LANES; l++)
                    at[l] = (j0 + j + l) * s.j_stride + (u0 + u) * each;
                turn(s, at, out + u * width + j, width);
            }
            for (; u < units; u++)
                for (int64_t l = 0; l < SS_LANES; l++)
                    out[u * width + j + l] = unit(s, u0 + u, j0 + j + l, k_end);
        }
        for (; j < count; j += least(8, count - j))
            pack_along(s, u0, units, k_end, j0 + j, least(8, count - j), width, out + j);
    }
#endif
    if (j == width) return;
    for (int64_t u = 0; u < units; u++) {
        for (int64_t l = j; l < count; l++)
            out[u * width + l] = unit(s, u0 + u, j0 + l, k_end);
        for (int64_t l = count > j ? count : j; l < width; l++) out[u * width + l] = 0.0f;
    }
}

/* Positions of the elements of a block of K, which make up `units` units; `runs`: whether eight units
 * are neighbours in memory somewhere. */
typedef struct {
    int64_t at[2 * KC], elements, units;
    int runs;
} Sum;

static void list_sum(Source s, int64_t from, int64_t elements, int64_t units, Sum *k) {
    const int64_t many = 8 * each_of(s);
    list(s.k, s.k_stride, from, elements, k->at);
    k->elements = elements;
    k->units = units;
    k->runs = 0;
    for (int64_t i = 0; i + many <= elements && !k->runs; i++)
        k->runs = neighbours(k->at + i, many) == many;
}

/* Unit `u` of lanes which are neighbours in memory. */
SS_INLINE void across(const char *p, const ss_word kind, const Sum *k, int64_t u, int64_t j, const int lanes,
                      float *out) {
    const int64_t i = kind == TWO_HALVES ? 2 * u : u;
    const int paired = kind == TWO_HALVES && i + 1 < k->elements;
    const int64_t at = k->at[i] + j, next = paired ? k->at[i + 1] + j : 0;
    if (kind == ONE_F32) {
        memcpy(out, (const float *)p + at, 4 * lanes);
        return;
    }
    const uint16_t *low = (const uint16_t *)p + at, *high = (const uint16_t *)p + next;
    uint32_t words[SS_LANES];
    if (kind == ONE_HALF)
        for (int l = 0; l < lanes; l++) words[l] = (uint32_t)low[l] << 16;
    else if (paired)
        for (int l = 0; l < lanes; l++) words[l] = low[l] | (uint32_t)high[l] << 16;
    else
        for (int l = 0; l < lanes; l++) words[l] = low[l];
    memcpy(out, words, 4 * lanes);
}

#if TURNS
/* All units of at most eight lanes, eight at a time where they are neighbours in memory and a row of
 * the panel has `room` for so many lanes or no others. */
SS_INLINE void listed_along(Source s, const ss_word kind, const Sum *k, const int64_t *js, int64_t lanes,
                            int64_t room, int64_t width, float *out) {
    const int squares = room >= 8 || room == width;
    const int64_t each = kind == TWO_HALVES ? 2 : 1, many = 8 * each;
    for (int64_t u = 0; u < k->units;) {
        const int64_t *ks = k->at + each * u;
        float *o = out + u * width;
        if (squares && each * u + many <= k->elements && neighbours(ks, many) == many) {
            int64_t at[8];
            for (int l = 0; l < 8; l++) at[l] = js[least(l, lanes - 1)] + ks[0];
            turn8(s, at, o, width);
            u += 8;
            continue;
        }
        for (int64_t l = 0; l < lanes; l++) across(s.p, kind, k, u, js[l], 1, o + l);
        u++;
    }
}
#endif

/* How many vectors of neighbours the first columns are. */
SS_INLINE int64_t whole_vectors(const int64_t *js, int64_t count) {
    int64_t v = 0;
    while ((v + 1) * SS_LANES <= count && neighbours(js + v * SS_LANES, SS_LANES) == SS_LANES) v++;
    return v;
}

SS_INLINE void pack_kind(Source s, const ss_word kind, const Sum *k, const int64_t *js, int64_t count,
                         int64_t width, float *out) {
    enum { FEW = 4, SOME = SS_LANES > 8 ? 8 : FEW };
    const int64_t vectors = whole_vectors(js, count), each = kind == TWO_HALVES ? 2 : 1;
    for (int64_t u = 0; vectors && u < k->units; u++) {
        const int64_t *at = k->at + each * u;
        const int paired = each == 2 && 2 * u + 1 < k->elements;
        const Words words = {each == 2 && !paired ? LOW_HALF : kind, paired ? at[1] - at[0] : 0};
        for (int64_t v = 0; v < vectors; v++) {
            const char *p = s.p + (at[0] + js[v * SS_LANES]) * (kind == ONE_F32 ? 4 : 2);
            ss_vstore(out + u * width + v * SS_LANES, some_words(words, p, SS_LANES));
        }
    }
    for (int64_t j = vectors * SS_LANES, lanes; j < count; j += lanes) {
        const int64_t run = neighbours(js + j, least(SS_LANES, count - j));
        float *o = out + j;
        lanes = run == SS_LANES ? run : run >= SOME ? SOME : run >= FEW ? FEW : 1;
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
        else if (lanes == SOME)
            for (int64_t u = 0; u < k->units; u++)
                across(s.p, kind, k, u, js[j], SOME, o + u * width);
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
static void pack_listed(Source s, const Sum *k, const int64_t *js, int64_t count, int64_t width, float *out) {
    if (s.type == SS_F32)
        pack_kind(s, ONE_F32, k, js, count, width, out);
    else
        pack_kind(s, HALF, k, js, count, width, out);
}

SS_INLINE void pack_taps_as(const ss_word kind, Source s, int64_t u0, int64_t units, int64_t j0,
                            int64_t count, int64_t width, float *out) {
    const ss_windows *w = s.windows;
    const int64_t size = element_size(kind), step = s.j_stride * size, each = 1 + is_pair(kind);
    for (int64_t u = 0, taps; u < units; u += taps) {
        const int64_t channel = (u0 + u) / w->taps * each, end = units - u;
        const int64_t *tap = w->b_tap + (u0 + u) % w->taps;
        const int64_t left = least(end, w->b_tap + w->taps - tap);
        for (taps = 1; taps < left && tap[taps] - tap[0] < SS_LANES; taps++) {}
        const int alone = is_pair(kind) && channel + 1 == w->channels;
        const char *p = s.p + (channel * s.k_stride + j0 * s.j_stride + tap[0]) * size;
        if (4 * taps <= SS_LANES) { /* to turn so few takes longer */
            for (int64_t t = 0; t < taps; t++)
                for (int64_t j = 0; j < width; j++) {
                    const int64_t at = j * s.j_stride + tap[t] - tap[0];
                    out[(u + t) * width + j] =
                        j < count ? lane(p, kind, at, at + s.k_stride, !alone) : 0.0f;
                }
            continue;
        }
        for (int64_t j = 0; j < width; j += SS_LANES) {
            float square[SS_LANES * SS_LANES];
            const int64_t reach = tap[taps - 1] - tap[0] + 1;
            for (int64_t l = 0; l < least(SS_LANES, count - j); l++)
                __builtin_prefetch(p + (j + l) * step + NEXT);
            if (alone)
                turn_words((Words){low_of(kind)}, p + j * step, step, count - j, reach, square);
            else
                turn_words((Words){kind, s.k_stride}, p + j * step, step, count - j, reach, square);
            for (int64_t t = 0; t < taps; t++)
                memcpy(out + (u + t) * width + j, square + (tap[t] - tap[0]) * SS_LANES, 4 * SS_LANES);
        }
    }
}

/* As pack, of weights: unit (channel, tap), two channels where units are pairs. */
static void pack_taps(Source s, int64_t u0, int64_t units, int64_t j0, int64_t count, int64_t width, float *out) {
    switch ((int)word_of(s)) {
    case ONE_F32: pack_taps_as(ONE_F32, s, u0, units, j0, count, width, out); break;
    case ROUNDED: pack_taps_as(ROUNDED, s, u0, units, j0, count, width, out); break;
    default: pack_taps_as(HALF, s, u0, units, j0, count, width, out);
    }
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
        for (int64_t u = 0; u < units; u++) out[r * width + u] = unit(s, u0 + u, i0 + r, k_end);
    }
}

/* The same, element k of a row being at k->at[k] from where the row begins, at js[row]. */
static void pack_rows_listed(Source s, const Sum *k, const int64_t *js, int64_t count, int64_t width,
                             float *out) {
    memset(out, 0, 4 * AMX_ROWS * width);
    for (int64_t r = 0; r < count; r++)
        for (int64_t u = 0; u < k->units; u++)
            across(s.p, TWO_HALVES, k, u, js[r], 1, out + r * width + u);
}
#endif
