/* Attention in one arithmetic; attention.c includes this once for each that is used.
 *
 * NAME(x): x with the arithmetic's suffix. REAL, VEC: sums. UNIT, UVEC: what is multiplied: a number
 * or, where KU is 2, a pair of neighbours of the summed dimension. */

SS_INLINE VEC NAME(load)(const REAL *p) { VEC v; memcpy(&v, p, sizeof v); return v; }
SS_INLINE void NAME(store)(REAL *p, VEC v) { memcpy(p, &v, sizeof v); }
SS_INLINE UVEC NAME(units)(const UNIT *p) { UVEC v; memcpy(&v, p, sizeof v); return v; }

/* -- products ---------------------------------------------------------------------------------- */

/* c[ROWS][NV * LANES] (+)= a b, in registers. a: rows ra apart, terms ca; b: terms rb apart. */
#define SS_TILE(WHICH, ROWS, NV)                                                                   \
    SS_INLINE void NAME(WHICH##_##NV)(                                                             \
        int64_t k, const UNIT *a, int64_t ra, int64_t ca, const UNIT *b, int64_t rb, REAL *c,      \
        int64_t rc, int add) {                                                                     \
        VEC s[ROWS][NV];                                                                           \
        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                    \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)                                   \
                s[i][j] = add ? NAME(load)(c + i * rc + j * LANES) : (VEC){0};                     \
        for (int64_t p = 0; p < k; p++, a += ca, b += rb) {                                        \
            UVEC v[NV];                                                                            \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)                                   \
                v[j] = NAME(units)(b + j * LANES);                                                 \
            _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++) {                              \
                const UNIT x = a[i * ra];                                                          \
                _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)                               \
                    s[i][j] = VSTEP(s[i][j], x, v[j]);                                             \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                    \
            _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++)                                   \
                NAME(store)(c + i * rc + j * LANES, s[i][j]);                                      \
    }

SS_TILE(tall, SS_TALL, 1)
SS_TILE(mid, SS_MID, 1)
SS_TILE(low, SS_LOW, 1)
SS_TILE(tall, SS_TALL, 2)
SS_TILE(mid, SS_MID, 2)
SS_TILE(low, SS_LOW, 2)

/* One column of tiles, m rows (a multiple of SS_LOW) high, from column n on: `vectors` wide, or half
 * of that where the clip leaves out the other half. */
SS_INLINE void NAME(column)(
    const int vectors, int64_t n, int64_t m, int64_t k, const UNIT *a, int64_t ra, int64_t ca,
    const UNIT *b, int64_t rb, REAL *c, int64_t rc, int add, ss_clip clip) {
    for (int64_t i = 0, rows; i < m; i += rows) {
        rows = m - i >= SS_TALL ? SS_TALL : m - i >= SS_MID ? SS_MID : SS_LOW;
        const int64_t right = i + rows - 1 + clip.columns; /* the last column that is wanted */
        if (n > right) continue;
        const int64_t from = ss_most(0, i + clip.begin) / KU;
        const int64_t to = ss_least(k, (ss_most(0, i + rows + clip.end) + KU - 1) / KU);
        const UNIT *x = a + i * ra + from * ca, *y = b + from * rb;
        REAL *z = c + i * rc + n;
#define SS_CALL(NV)                                                                                \
    if (rows == SS_TALL) NAME(tall_##NV)(to - from, x, ra, ca, y, rb, z, rc, add);                 \
    else if (rows == SS_MID) NAME(mid_##NV)(to - from, x, ra, ca, y, rb, z, rc, add);              \
    else NAME(low_##NV)(to - from, x, ra, ca, y, rb, z, rc, add);
        if (vectors == 2 && n + LANES <= right) {
            SS_CALL(2)
        } else {
            SS_CALL(1)
        }
#undef SS_CALL
    }
}
static __attribute__((noinline)) void NAME(column_1)(
    int64_t n, int64_t m, int64_t k, const UNIT *a, int64_t ra, int64_t ca, const UNIT *b,
    int64_t rb, REAL *c, int64_t rc, int add, ss_clip clip) {
    NAME(column)(1, n, m, k, a, ra, ca, b, rb, c, rc, add, clip);
}
static __attribute__((noinline)) void NAME(column_2)(
    int64_t n, int64_t m, int64_t k, const UNIT *a, int64_t ra, int64_t ca, const UNIT *b,
    int64_t rb, REAL *c, int64_t rc, int add, ss_clip clip) {
    NAME(column)(2, n, m, k, a, ra, ca, b, rb, c, rc, add, clip);
}

#if KU == 2 && SS_AMX
/* The same by tile registers, 32 x 32 at a time; in whole tiles, so that m is rounded up to 16. */
static void NAME(tiles)(
    int64_t m, int64_t n, int64_t k, const UNIT *a, int64_t ra, const UNIT *b, int64_t rb,
    int64_t pb, REAL *c, int64_t rc, int add, ss_clip clip) {
    for (int64_t j = 0; j < n; j += 32)
        for (int64_t i = 0; i < m; i += 32) {
            const int wide = n - j > 16, tall = m - i > 16;
            const int64_t rows = tall ? 32 : 16;
            if (j > i + rows - 1 + clip.columns) continue;
            const int64_t from = ss_most(0, i + clip.begin) / 32 * 16;
            const int64_t to = ss_least(k, ss_up(ss_most(0, i + rows + clip.end), 32) / 2);
            const UNIT *x = a + i * ra, *y = b + j / SS_PANEL * pb;
            REAL *z = c + i * rc + j, *low = z + 16 * rc;
            ss_tile_zero(0);
            ss_tile_zero(1);
            ss_tile_zero(2);
            ss_tile_zero(3);
            if (add) {
                ss_tile_load(0, z, 4 * rc);
                if (wide) ss_tile_load(1, z + 16, 4 * rc);
                if (tall) ss_tile_load(2, low, 4 * rc);
                if (tall && wide) ss_tile_load(3, low + 16, 4 * rc);
            }
            for (int64_t u = from; u < to; u += 16) {
                ss_tile_load(4, x + u, 4 * ra);
                if (tall) ss_tile_load(5, x + 16 * ra + u, 4 * ra);
                ss_tile_load(6, y + u * rb, 4 * rb);
                if (wide) ss_tile_load(7, y + u * rb + 16, 4 * rb);
                ss_tile_multiply(0, 4, 6);
                if (wide) ss_tile_multiply(1, 4, 7);
                if (tall) ss_tile_multiply(2, 5, 6);
                if (tall && wide) ss_tile_multiply(3, 5, 7);
            }
            ss_tile_store(0, z, 4 * rc);
            if (wide) ss_tile_store(1, z + 16, 4 * rc);
            if (tall) ss_tile_store(2, low, 4 * rc);
            if (tall && wide) ss_tile_store(3, low + 16, 4 * rc);
        }
}
#endif

/* c[m][n] (+)= a[m][k] b[k][n]; k counts units; column j of b is at (j / 32) pb + j % 32. */
static void NAME(product)(
    int64_t m, int64_t n, int64_t k, const UNIT *a, int64_t ra, int64_t ca, const UNIT *b,
    int64_t rb, int64_t pb, REAL *c, int64_t rc, int add, ss_clip clip) {
#if KU == 2 && SS_AMX
    if (ss_use_tiles && ca == 1 && k % 16 == 0) {
        NAME(tiles)(m, n, k, a, ra, b, rb, pb, c, rc, add, clip);
        return;
    }
#endif
    for (int64_t j = 0; j < n;) {
        const UNIT *column = b + j / SS_PANEL * pb + j % SS_PANEL;
        if (n - j >= 2 * LANES) {
            NAME(column_2)(j, m, k, a, ra, ca, column, rb, c, rc, add, clip);
            j += 2 * LANES;
        } else {
            NAME(column_1)(j, m, k, a, ra, ca, column, rb, c, rc, add, clip);
            j += LANES;
        }
    }
}

/* -- packing ----------------------------------------------------------------------------------- */

/* One row of `depth` elements, zeros up to `width`. */
static void NAME(pack_row)(
    const void *p, int64_t at, int64_t step, int kind, int64_t depth, int64_t width, UNIT *row) {
#if KU == 2
    uint16_t *to = (uint16_t *)row;
    const uint16_t *from = (const uint16_t *)p + at;
    for (int64_t d = 0; d < depth; d++) to[d] = from[d * step];
#else
    REAL *to = row;
#define SS_COPY(T, f)                                                                              \
    {                                                                                              \
        const T *from = (const T *)p + at;                                                         \
        if (step == 1) for (int64_t d = 0; d < depth; d++) to[d] = f(from[d]);                     \
        else for (int64_t d = 0; d < depth; d++) to[d] = f(from[d * step]);                        \
    }
    if (kind == SS_ELEM_F32) SS_COPY(float, )
    else if (kind == SS_ELEM_BF16) SS_COPY(uint16_t, ss_from_bf16)
    else if (kind == SS_ELEM_F16) SS_COPY(_Float16, (REAL))
    else SS_COPY(double, (REAL))
#undef SS_COPY
#endif
    for (int64_t d = depth; d < width; d++) to[d] = 0;
}

/* rows[n][width]: a block as it is, each row padded with zeros. */
static void NAME(pack)(
    const void *p, int64_t at, ss_strides s, int kind, int64_t n, int64_t depth, int64_t width,
    UNIT *rows) {
    const int64_t size = ss_element_size(kind), row = s.t * size;
    const char *from = (const char *)p + at * size;
    const int whole = KU == 2 && s.d == 1 && depth == width; /* vectors of half a cache line */
    for (int64_t i = 0; i < n; i++, from += row, rows += width / KU) {
        ss_fetch(from + SS_AHEAD * row, depth * size);
        if (!whole)
            NAME(pack_row)(p, at + i * s.t, s.d, kind, depth, width, rows);
        else
            for (int64_t d = 0; d < width; d += 16) memcpy((uint16_t *)rows + d, from + 2 * d, 32);
    }
}

/* Columns for products that sum over `width`: [width / KU][32], from 32 packed rows. */
static void NAME(turn)(const UNIT *rows, int64_t width, UNIT *panel) {
    const int64_t units = width / KU;
#if TURNS
    if (sizeof(UNIT) == 4 && units % SS_LANES == 0) {
        for (int64_t u = 0; u < units; u += SS_LANES)
            for (int64_t l = 0; l < SS_PANEL; l += SS_LANES)
                turn_square(rows + l * units + u, units, panel + u * SS_PANEL + l, SS_PANEL);
        return;
    }
#endif
    for (int64_t u = 0; u < units; u++)
        for (int64_t l = 0; l < SS_PANEL; l++) panel[u * SS_PANEL + l] = rows[l * units + u];
}

/* Columns for products that sum over the rows: [n / KU][width], from packed rows; n is even. */
static void NAME(pair)(const UNIT *rows, int64_t n, int64_t width, UNIT *pairs) {
#if KU == 2
    for (int64_t i = 0; i < n; i += 2) {
        const uint16_t *a = (const uint16_t *)(rows + i * (width / 2)), *b = a + width;
        for (int64_t d = 0; d < width; d++)
            pairs[i / 2 * width + d] = (uint32_t)a[d] | (uint32_t)b[d] << 16;
    }
#else
    memcpy(pairs, rows, n * width * sizeof(UNIT));
#endif
}

static void NAME(unpack_row)(
    const REAL *row, REAL factor, void *p, int64_t at, int64_t step, int kind, int64_t depth) {
#if KU == 2
    uint16_t *out = (uint16_t *)p + at;
    int64_t done = 0;
    for (; step == 1 && done + 2 * LANES <= depth; done += 2 * LANES) {
        const VEC low = NAME(load)(row + done), high = NAME(load)(row + done + LANES);
        const UVEC u = ss_vpack_bf16(low * factor, high * factor);
        memcpy(out + done, &u, sizeof u);
    }
    for (int64_t d = done; d < depth; d++) out[d * step] = ss_to_bf16(row[d] * factor);
#else
#define SS_COPY(T, f)                                                                              \
    {                                                                                              \
        T *to = (T *)p + at;                                                                       \
        if (step == 1) for (int64_t d = 0; d < depth; d++) to[d] = f(row[d] * factor);             \
        else for (int64_t d = 0; d < depth; d++) to[d * step] = f(row[d] * factor);                \
    }
    if (kind == SS_ELEM_F32) SS_COPY(float, (float))
    else if (kind == SS_ELEM_BF16) SS_COPY(uint16_t, ss_to_bf16)
    else if (kind == SS_ELEM_F16) SS_COPY(_Float16, (_Float16))
    else SS_COPY(double, (double))
#undef SS_COPY
#endif
}

/* -- scores ------------------------------------------------------------------------------------ */

/* row[0..n) as scores that the mask is added to or chooses from: (score - from) unit. */
static void NAME(add_mask)(
    const ss_attention *s, const void *mask, int64_t at, int64_t n, REAL from, REAL unit,
    REAL *restrict row) {
    const REAL scale = (REAL)s->scale, fill = (REAL)s->fill;
    const int64_t step = s->mask.d;
#define SS_ADD(T, SCORE)                                                                           \
    {                                                                                              \
        const T *restrict m = (const T *)mask + at;                                                \
        if (step == 1) for (int64_t j = 0; j < n; j++) row[j] = (SCORE(m[j]) - from) * unit;       \
        else for (int64_t j = 0; j < n; j++) row[j] = (SCORE(m[j * step]) - from) * unit;          \
    }
#define SS_SUM(x) (row[j] * scale + (REAL)(x))
#define SS_SUM_BF16(x) (row[j] * scale + ss_from_bf16(x))
#define SS_CHOICE(x) ((x) ? row[j] * scale : fill)
    if (s->mask_kind == SS_ELEM_F32) SS_ADD(float, SS_SUM)
    else if (s->mask_kind == SS_ELEM_BF16) SS_ADD(uint16_t, SS_SUM_BF16)
    else if (s->mask_kind == SS_ELEM_F16) SS_ADD(_Float16, SS_SUM)
    else if (s->mask_kind == SS_ELEM_F64) SS_ADD(double, SS_SUM)
    else SS_ADD(uint8_t, SS_CHOICE)
#undef SS_CHOICE
#undef SS_SUM_BF16
#undef SS_SUM
#undef SS_ADD
}

SS_INLINE int64_t NAME(seen)(const ss_attention *s, int64_t query, int64_t k0, int64_t n) {
    return s->causal ? ss_most(0, ss_least(n, query + 1 - k0)) : n;
}

/* row[n..full) = with, where only what belongs to the vector of n is known. */
SS_INLINE void NAME(fill)(REAL *row, int64_t n, int64_t full, REAL with) {
    for (int64_t j = n / LANES * LANES; j < full; j += LANES)
        NAME(store)(row + j, VFILL(NAME(load)(row + j), n - j, with));
}

/* What the weights of keys k0.. are multiplied by: `factor` for those that are kept, else 0. */
static void NAME(draw)(
    const ss_attention *s, const int64_t *key, int64_t batch, int64_t head, int64_t query,
    int64_t k0, int64_t n, REAL factor, REAL *row) {
    const int64_t first = ((batch * s->heads + head) * s->queries + query) * s->keys + k0;
    uint32_t words[SS_FORWARD_KEYS + 4 * SS_MOST_BLOCKS];
    for (int64_t b = first >> 2, at = 0; 4 * b < first + n; at = 4 * (b - (first >> 2)))
        b += ss_words(key[0], key[1], s->site, b, words + at);
    const uint32_t *word = words + (first & 3);
    for (int64_t j = 0; j < n; j++) row[j] = (int32_t)(word[j] >> 8) < s->limit ? factor : 0;
}

/* -- forward ----------------------------------------------------------------------------------- */

/* What a row knows of the scores so far; the total is of exp(score - largest). */
typedef struct { REAL largest, total; } NAME(row);

/* Scores row[0..n) to weights in units, zeros up to width; the factor for what was summed before.
 * `kept` is what weights are multiplied by, or null; the total is of all.
 * The total is that of the weights as they are multiplied: it divides what they give, so that they
 * sum to one after rounding too and keep what all values have in common. */
SS_INLINE REAL NAME(weigh)(
    REAL *row, const REAL *kept, int64_t n, int64_t width, REAL c, NAME(row) *known) {
    const int64_t full = ss_up(n, KU * LANES);
    NAME(fill)(row, n, full, -INFINITY);
    VEC top = VSET((REAL)-INFINITY);
    for (int64_t j = 0; j < full; j += LANES) top = VMAX(NAME(load)(row + j), top);
    const REAL here = VLARGEST(top);
    const REAL largest = here > known->largest ? here : known->largest;
    const REAL from = largest == -INFINITY ? 0 : largest;
    VEC total = {0};
    for (int64_t j = 0; j < full; j += KU * LANES) {
        VEC p[KU];
        _Pragma("GCC unroll 2") for (int l = 0; l < KU; l++)
            p[l] = VEXP2((NAME(load)(row + j + l * LANES) - VSET(from)) * VSET(c));
        UVEC u = VUNITS(p);
        total = VSTEP(total, ONES, u);
        if (kept) {
            for (int l = 0; l < KU; l++) p[l] *= NAME(load)(kept + j + l * LANES);
            u = VUNITS(p);
        }
        memcpy((UNIT *)row + j / KU, &u, sizeof u);
    }
    memset((UNIT *)row + full / KU, 0, (width - full) / KU * sizeof(UNIT));
    const int first = known->largest == -INFINITY; /* nothing was summed before */
    const REAL factor = first ? 1 : VEXP2(VSET((known->largest - from) * c))[0];
    known->largest = largest;
    known->total = known->total * factor + VSUM(total);
    return factor;
}

typedef struct {
    UNIT *keys, *values, *q;
    REAL *scores, *out;
    NAME(row) *rows;
} NAME(forward_scratch);

/* Queries t0.. of one head, from packed keys and values. */
static void NAME(forward_block)(
    const ss_attention *s, void *const *b, NAME(forward_scratch) *w, int64_t batch, int64_t head,
    int64_t t0) {
    const int64_t n = ss_least(SS_FORWARD_QUERIES, s->queries - t0), m = ss_up(n, SS_LOW);
    const int64_t width = ss_up(s->depth, 16), high = ss_up(s->value_depth, 16);
    const int64_t ld = SS_FORWARD_KEYS;
    const int64_t end = s->causal ? ss_least(s->keys, t0 + n) : s->keys;
    const int has_mask = s->mask_kind >= 0;
    const REAL scale = has_mask ? 1 : (REAL)s->scale, c = scale * (REAL)SS_LOG2E;
    NAME(pack)(b[0], batch * s->q.b + head * s->q.h + t0 * s->q.t, s->q, s->kind, n, s->depth,
               width, w->q);
    for (int64_t i = 0; i < n; i++) w->rows[i] = (NAME(row)){-INFINITY, 0};
    memset(w->out, 0, m * high * sizeof(REAL));
    for (int64_t k0 = 0; k0 < end; k0 += ld) {
        const int64_t some = ss_least(ld, end - k0), wide = ss_up(some, SS_PANEL);
        const int64_t ahead = s->causal ? t0 - k0 : INT64_MAX / 4;
        NAME(product)(m, wide, width / KU, w->q, width / KU, 1, w->keys + k0 * (width / KU),
                      SS_PANEL, width / KU * SS_PANEL, w->scores, ld, 0,
                      (ss_clip){ahead, INT64_MAX / 4, -INT64_MAX / 4});
        for (int64_t i = 0; i < n; i++) {
            REAL *row = w->scores + i * ld;
            const int64_t seen = NAME(seen)(s, t0 + i, k0, some);
            if (has_mask)
                NAME(add_mask)(s, b[3], batch * s->mask.b + head * s->mask.h +
                               (t0 + i) * s->mask.t + k0 * s->mask.d, seen, 0, 1, row);
            REAL kept[SS_FORWARD_KEYS], factor;
            if (s->drops) {
                NAME(draw)(s, b[3 + has_mask], batch, head, t0 + i, k0, ss_up(seen, KU * LANES), 1,
                           kept);
                factor = NAME(weigh)(row, kept, seen, wide, c, &w->rows[i]);
            } else {
                factor = NAME(weigh)(row, 0, seen, wide, c, &w->rows[i]);
            }
            if (factor != 1)
                for (int64_t d = 0; d < high; d++) w->out[i * high + d] *= factor;
        }
        NAME(product)(m, high, wide / KU, (UNIT *)w->scores, ld, 1, w->values + k0 / KU * high,
                      high, SS_PANEL, w->out, high, 1,
                      (ss_clip){INT64_MAX / 4, ahead, -INT64_MAX / 4});
    }
    void *const *to = b + 3 + has_mask + s->drops;
    const REAL keep = s->drops ? (REAL)s->keep : 1, blind = s->safe ? 0 : (REAL)NAN;
    for (int64_t i = 0; i < n; i++) {
        const REAL total = w->rows[i].total, largest = w->rows[i].largest * scale;
        const REAL rest = total == 0 ? blind : RLOG(total);
        NAME(unpack_row)(w->out + i * high, total == 0 ? blind : 1 / (total * keep), to[0],
                         batch * s->out.b + head * s->out.h + (t0 + i) * s->out.t, s->out.d,
                         s->kind, s->value_depth);
        REAL *lse = (REAL *)to[1] + batch * s->lse.b + head * s->lse.h + (t0 + i) * s->lse.t;
        lse[0] = largest == -INFINITY ? 0 : largest;
        if (s->lse.d) lse[s->lse.d] = rest;
        else lse[0] += rest;
    }
}

/* Keys and values of one head, packed. */
static void NAME(forward_pack)(
    const ss_attention *s, void *const *b, NAME(forward_scratch) *w, int64_t batch, int64_t head) {
    const int64_t width = ss_up(s->depth, 16), units = width / KU;
    const int64_t high = ss_up(s->value_depth, 16);
    UNIT *rows = (UNIT *)w->scores; /* a panel of rows at a time */
    for (int64_t k = 0; k < s->keys; k += SS_PANEL) {
        const int64_t n = ss_least(SS_PANEL, s->keys - k);
        NAME(pack)(b[1], batch * s->k.b + head * s->k.h + k * s->k.t, s->k, s->kind, n, s->depth,
                   width, rows);
        memset(rows + n * units, 0, (SS_PANEL - n) * units * sizeof(UNIT));
        NAME(turn)(rows, width, w->keys + k * units);
        NAME(pack)(b[2], batch * s->v.b + head * s->v.h + k * s->v.t, s->v, s->kind, n,
                   s->value_depth, high, rows);
        memset(rows + n * (high / KU), 0, (SS_PANEL - n) * (high / KU) * sizeof(UNIT));
        NAME(pair)(rows, SS_PANEL, high, w->values + k * (high / KU));
    }
}

/* Thread `thread` of `threads`: blocks of queries of equal cost, whole heads as far as possible. */
static void NAME(forward)(
    const ss_attention *s, void *const *b, void *scratch, int thread, int threads) {
    const int64_t width = ss_up(s->depth, 16), high = ss_up(s->value_depth, 16);
    const int64_t keys = ss_up(s->keys, SS_PANEL), panel = SS_PANEL * ss_most(width, high);
    char *at = (char *)scratch + thread * s->scratch;
    NAME(forward_scratch) w;
    w.keys = ss_take(&at, keys * width / KU * sizeof(UNIT));
    w.values = ss_take(&at, keys * high / KU * sizeof(UNIT));
    w.q = ss_take(&at, SS_FORWARD_QUERIES * width / KU * sizeof(UNIT));
    w.out = ss_take(&at, SS_FORWARD_QUERIES * high * sizeof(REAL));
    w.scores =
        ss_take(&at, ss_most(SS_FORWARD_QUERIES * SS_FORWARD_KEYS, panel) * sizeof(REAL));
    w.rows = ss_take(&at, SS_FORWARD_QUERIES * sizeof(NAME(row)));
    const int64_t heads = s->batch * s->heads, group = s->heads / s->kv_heads;
    int64_t cost = 0, done = 0, packed = -1;
    for (int64_t t = 0; t < s->queries; t += SS_FORWARD_QUERIES)
        cost += ss_block_cost(s, t);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t t = 0; t < s->queries; t += SS_FORWARD_QUERIES) {
            const int64_t mine = done * threads / (cost * heads);
            done += ss_block_cost(s, t);
            if (mine != thread) continue;
            const int64_t batch = h / s->heads, head = h % s->heads;
            if (h / group != packed) NAME(forward_pack)(s, b, &w, batch, head / group);
            packed = h / group;
            NAME(forward_block)(s, b, &w, batch, head, t);
        }
}

/* -- backward ---------------------------------------------------------------------------------- */

typedef struct {
    UNIT *keys, *values;    /* columns for scores and for gradients of weights */
    UNIT *key_rows;         /* columns for gradients of queries */
    UNIT *q, *grad;         /* a block of queries and of gradients of the output */
    UNIT *q_rows, *grad_rows;
    UNIT *weights_t, *grads, *grads_t; /* of one block of scores; _t: summed over queries */
    UNIT *turned;           /* one of the latter with its rows and columns exchanged */
    REAL *scores, *grad_scores, *dq, *dk, *dv, *from, *lse, *delta;
} NAME(backward_scratch);

/* Weights from scores, and gradients of scores from products; `kept` as above. */
SS_INLINE void NAME(differentiate)(
    const REAL *row, const REAL *grad, const REAL *kept, REAL c, REAL lse, REAL delta, VEC *p,
    VEC *d) {
    const VEC x = VEXP2(VFMA(NAME(load)(row), VSET(c), VSET(-lse)));
    if (kept) {
        *p = x * NAME(load)(kept);
        *d = x * (NAME(load)(grad) * NAME(load)(kept) - VSET(delta));
    } else {
        *p = x;
        *d = x * (NAME(load)(grad) - VSET(delta));
    }
}

/* The sum over d of x[d] y[d]. */
static REAL NAME(dot)(
    const void *x, int64_t at_x, int64_t step_x, const void *y, int64_t at_y, int64_t step_y,
    int kind, int64_t depth) {
    REAL sum = 0;
    VEC sums = {0};
    int64_t d = 0;
#define SS_DOT(T, f, LOAD)                                                                         \
    {                                                                                              \
        const T *a = (const T *)x + at_x, *b = (const T *)y + at_y;                                \
        for (; step_x == 1 && step_y == 1 && d + LANES <= depth; d += LANES)                       \
            sums = VFMA(LOAD(a + d), LOAD(b + d), sums);                                           \
        for (; d < depth; d++) sum += f(a[d * step_x]) * f(b[d * step_y]);                         \
    }
#ifdef SS_F64
    SS_DOT(double, , NAME(load))
#else
    if (kind == SS_ELEM_F32) SS_DOT(float, , ss_vload)
    else if (kind == SS_ELEM_BF16) SS_DOT(uint16_t, ss_from_bf16, ss_vload_bf16)
    else SS_DOT(_Float16, (float), ss_vload_f16)
#endif
#undef SS_DOT
    return sum + VSUM(sums);
}

/* The same of whole rows, of which `seen` keys count; as products take them. Rows of pairs are two. */
SS_INLINE void NAME(differentiate_rows)(
    NAME(backward_scratch) *w, int64_t i, const int64_t seen[KU], const REAL *kept, int64_t width,
    REAL c) {
    const int64_t ld = SS_BACKWARD_KEYS, full = ss_up(ss_most(seen[0], seen[KU - 1]), KU * LANES);
    REAL *row = w->scores + i * ld, *grad = w->grad_scores + i * ld;
    for (int r = 0; r < KU; r++) {
        NAME(fill)(row + r * ld, seen[r], full, -INFINITY);
        NAME(fill)(grad + r * ld, seen[r], full, 0);
    }
#if KU == 2
    UNIT *weights = w->weights_t + i / 2 * ld, *grads = w->grads_t + i / 2 * ld;
    for (int64_t j = 0; j < full; j += 2 * LANES) {
        UVEC p[2], d[2], pairs[2];
        _Pragma("GCC unroll 2") for (int r = 0; r < 2; r++) {
            VEC x[2], y[2];
            _Pragma("GCC unroll 2") for (int l = 0; l < 2; l++) {
                const int64_t at = r * ld + j + l * LANES;
                NAME(differentiate)(row + at, grad + at, kept ? kept + at : 0, c, w->lse[i + r],
                                    w->delta[i + r], x + l, y + l);
            }
            p[r] = VUNITS(x);
            d[r] = VUNITS(y);
            memcpy((UNIT *)(grad + r * ld) + j / 2, d + r, sizeof *d);
        }
        ss_vpair_bf16(p[0], p[1], pairs);
        memcpy(weights + j, pairs, sizeof pairs);
        ss_vpair_bf16(d[0], d[1], pairs);
        memcpy(grads + j, pairs, sizeof pairs);
    }
    memset(weights + full, 0, (width - full) * sizeof *weights);
    memset(grads + full, 0, (width - full) * sizeof *grads);
    for (int r = 0; r < 2; r++)
        memset((UNIT *)(grad + r * ld) + full / 2, 0, (width - full) / 2 * sizeof(UNIT));
#else
    for (int64_t j = 0; j < full; j += LANES) {
        VEC p, d;
        NAME(differentiate)(row + j, grad + j, kept ? kept + j : 0, c, w->lse[i], w->delta[i], &p,
                            &d);
        NAME(store)(row + j, p);
        NAME(store)(grad + j, d);
    }
    for (int64_t j = full; j < width; j++) row[j] = 0, grad[j] = 0;
#endif
}

/* No gradient for scores that the mask replaced, nor behind the n-th, of row r of those at i. */
static void NAME(hide)(
    NAME(backward_scratch) *w, const uint8_t *shown, int64_t step, int64_t i, int r, int64_t n,
    int64_t width) {
    const int64_t ld = SS_BACKWARD_KEYS;
    REAL *grad = w->grad_scores + (i + r) * ld;
#if KU == 2
    uint16_t *halves = (uint16_t *)grad, *turned = (uint16_t *)(w->grads_t + i / 2 * ld) + r;
    for (int64_t j = 0; j < width; j++)
        if (j >= n || !shown[j * step]) halves[j] = turned[2 * j] = 0;
#else
    for (int64_t j = 0; j < n; j++) grad[j] = shown[j * step] ? grad[j] : 0;
    for (int64_t j = n; j < width; j++) grad[j] = 0;
#endif
}

/* c[n][width] += p^T rows, for p of m queries in pairs. Tile registers want rows of p^T in memory. */
static void NAME(gather)(
    NAME(backward_scratch) *w, int64_t n, int64_t m, int64_t width, const UNIT *p,
    const UNIT *rows, REAL *c, ss_clip clip) {
    const int64_t ld = SS_BACKWARD_KEYS, units = m / KU;
#if KU == 2 && SS_AMX
    if (ss_use_tiles) {
        for (int64_t u = 0; u < units; u += 16)
            for (int64_t i = 0; i < n; i += 16)
                turn_square(p + u * ld + i, ld, w->turned + i * units + u, units);
        NAME(product)(n, width, units, w->turned, units, 1, rows, width, SS_PANEL, c, width, 1,
                      clip);
        return;
    }
#endif
    NAME(product)(n, width, units, p, 1, ld, rows, width, SS_PANEL, c, width, 1, clip);
}

/* Queries t0.. of one head: dq is written, dk and dv are added to. */
static void NAME(backward_block)(
    const ss_attention *s, void *const *b, NAME(backward_scratch) *w, int64_t batch, int64_t head,
    int64_t t0) {
    const int has_mask = s->mask_kind >= 0;
    const int hides = s->mask_kind == SS_ELEM_BOOL && (!s->safe || s->fill > -INFINITY);
    const int64_t n = ss_least(SS_BACKWARD_QUERIES, s->queries - t0);
    const int64_t m = ss_up(n, KU == 2 && ss_use_tiles ? 32 : 4);
    const int64_t width = ss_up(s->depth, 16), units = width / KU, ld = SS_BACKWARD_KEYS;
    const int64_t high = ss_up(s->value_depth, 16), lines = high / KU;
    const int64_t end = s->causal ? ss_least(s->keys, t0 + n) : s->keys;
    const REAL c = has_mask ? 1 : (REAL)(s->scale * SS_LOG2E);
    NAME(pack)(b[0], batch * s->grad.b + head * s->grad.h + t0 * s->grad.t, s->grad, s->kind, n,
               s->value_depth, high, w->grad);
    NAME(pack)(b[1], batch * s->q.b + head * s->q.h + t0 * s->q.t, s->q, s->kind, n, s->depth,
               width, w->q);
    memset(w->grad + n * lines, 0, (m - n) * lines * sizeof(UNIT));
    memset(w->q + n * units, 0, (m - n) * units * sizeof(UNIT));
    if (KU == 2) {
        NAME(pair)(w->grad, m, high, w->grad_rows);
        NAME(pair)(w->q, m, width, w->q_rows);
    }
    const int64_t size = ss_element_size(s->kind);
    for (int64_t i = 0; i < n; i++) {
        const int64_t t = t0 + i;
        const int64_t ahead = batch * s->out.b + head * s->out.h + (t + SS_AHEAD) * s->out.t;
        ss_fetch((const char *)b[4] + ahead * size, s->value_depth * size);
        const REAL *lse = (const REAL *)b[5] + batch * s->lse.b + head * s->lse.h + t * s->lse.t;
        const REAL rest = s->lse.d ? lse[s->lse.d] : 0;
        w->from[i] = *lse == -INFINITY ? 0 : *lse;
        w->lse[i] = (has_mask ? rest : w->from[i] + rest) * (REAL)SS_LOG2E;
        w->delta[i] = NAME(dot)(b[0], batch * s->grad.b + head * s->grad.h + t * s->grad.t,
                                s->grad.d, b[4], batch * s->out.b + head * s->out.h + t * s->out.t,
                                s->out.d, s->kind, s->value_depth);
    }
    for (int64_t i = n; i < m; i++) w->lse[i] = w->delta[i] = 0;
    memset(w->dq, 0, m * width * sizeof(REAL));
    for (int64_t k0 = 0; k0 < end; k0 += ld) {
        const int64_t some = ss_least(ld, end - k0), wide = ss_up(some, SS_PANEL);
        const int64_t ahead = s->causal ? t0 - k0 : INT64_MAX / 4;
        const ss_clip upper = {ahead, INT64_MAX / 4, -INT64_MAX / 4};
        NAME(product)(m, wide, units, w->q, units, 1, w->keys + k0 * units, SS_PANEL,
                      units * SS_PANEL, w->scores, ld, 0, upper);
        NAME(product)(m, wide, lines, w->grad, lines, 1, w->values + k0 * lines, SS_PANEL,
                      lines * SS_PANEL, w->grad_scores, ld, 0, upper);
        const int64_t mask =
            batch * s->mask.b + head * s->mask.h + t0 * s->mask.t + k0 * s->mask.d;
        for (int64_t i = 0; i < m; i += KU) {
            int64_t seen[KU];
            REAL kept[KU * SS_BACKWARD_KEYS];
            for (int64_t r = 0, q = i; r < KU; r++, q++) {
                seen[r] = q < n ? NAME(seen)(s, t0 + q, k0, some) : 0;
                if (has_mask && seen[r])
                    NAME(add_mask)(s, b[6], mask + q * s->mask.t, seen[r], w->from[q],
                                   (REAL)SS_LOG2E, w->scores + q * ld);
            }
            if (s->drops) {
                const int64_t full = ss_up(ss_most(seen[0], seen[KU - 1]), KU * LANES);
                for (int r = 0; r < KU; r++)
                    NAME(draw)(s, b[6 + has_mask], batch, head, t0 + i + r, k0, full,
                               (REAL)(1 / s->keep), kept + r * ld);
                NAME(differentiate_rows)(w, i, seen, kept, wide, c);
            } else {
                NAME(differentiate_rows)(w, i, seen, 0, wide, c);
            }
            for (int r = 0; hides && r < KU; r++)
                NAME(hide)(w, (const uint8_t *)b[6] + mask + (i + r) * s->mask.t, s->mask.d, i, r,
                           seen[r], wide);
        }
        const int64_t rows = ss_up(some, 4);
        const ss_clip lower = {INT64_MAX / 4, INT64_MAX / 4, -ahead};
        NAME(gather)(w, rows, m, high, w->weights_t, w->grad_rows, w->dv + k0 * high, lower);
        NAME(gather)(w, rows, m, width, w->grads_t, w->q_rows, w->dk + k0 * width, lower);
        NAME(product)(m, width, wide / KU, w->grads, ld, 1, w->key_rows + k0 * units, width,
                      SS_PANEL, w->dq, width, 1, (ss_clip){INT64_MAX / 4, ahead, -INT64_MAX / 4});
    }
    void *dq = b[6 + has_mask + s->drops];
    for (int64_t i = 0; i < n; i++)
        NAME(unpack_row)(w->dq + i * width, (REAL)s->scale, dq,
                         batch * s->dq.b + head * s->dq.h + (t0 + i) * s->dq.t, s->dq.d, s->kind,
                         s->depth);
}

static void NAME(backward_head)(
    const ss_attention *s, void *const *b, NAME(backward_scratch) *w, int64_t batch, int64_t head) {
    const int64_t width = ss_up(s->depth, 16), units = width / KU;
    const int64_t high = ss_up(s->value_depth, 16), lines = high / KU;
    const int64_t group = s->heads / s->kv_heads, keys = ss_up(s->keys, SS_PANEL);
    UNIT *rows = (UNIT *)w->scores;
    for (int64_t k = 0; k < s->keys; k += SS_PANEL) {
        const int64_t n = ss_least(SS_PANEL, s->keys - k);
        NAME(pack)(b[3], batch * s->v.b + head * s->v.h + k * s->v.t, s->v, s->kind, n,
                   s->value_depth, high, rows);
        memset(rows + n * lines, 0, (SS_PANEL - n) * lines * sizeof(UNIT));
        NAME(turn)(rows, high, w->values + k * lines);
        NAME(pack)(b[2], batch * s->k.b + head * s->k.h + k * s->k.t, s->k, s->kind, n, s->depth,
                   width, rows);
        memset(rows + n * units, 0, (SS_PANEL - n) * units * sizeof(UNIT));
        NAME(turn)(rows, width, w->keys + k * units);
        NAME(pair)(rows, SS_PANEL, width, w->key_rows + k * units);
    }
    memset(w->dk, 0, keys * width * sizeof(REAL));
    memset(w->dv, 0, keys * high * sizeof(REAL));
    for (int64_t h = head * group; h < (head + 1) * group; h++)
        for (int64_t t = 0; t < s->queries; t += SS_BACKWARD_QUERIES)
            NAME(backward_block)(s, b, w, batch, h, t);
    const int first = 7 + (s->mask_kind >= 0) + s->drops;
    for (int64_t k = 0; k < s->keys; k++) {
        NAME(unpack_row)(w->dk + k * width, (REAL)s->scale, b[first],
                         batch * s->dk.b + head * s->dk.h + k * s->dk.t, s->dk.d, s->kind,
                         s->depth);
        NAME(unpack_row)(w->dv + k * high, 1, b[first + 1],
                         batch * s->dv.b + head * s->dv.h + k * s->dv.t, s->dv.d, s->kind,
                         s->value_depth);
    }
}

/* Thread `thread` of `threads`: whole heads of keys, whose gradients nobody else adds to. */
static void NAME(backward)(
    const ss_attention *s, void *const *b, void *scratch, int thread, int threads) {
    const int64_t width = ss_up(s->depth, 16), high = ss_up(s->value_depth, 16);
    const int64_t keys = ss_up(s->keys, SS_PANEL), panel = SS_PANEL * ss_most(width, high);
    const int64_t column = keys / KU * sizeof(UNIT), row = SS_BACKWARD_QUERIES / KU * sizeof(UNIT);
    const int64_t square = SS_BACKWARD_QUERIES * SS_BACKWARD_KEYS * sizeof(REAL);
    char *at = (char *)scratch + thread * s->scratch;
    NAME(backward_scratch) w;
    w.keys = ss_take(&at, width * column);
    w.values = ss_take(&at, high * column);
    w.key_rows = ss_take(&at, width * column);
    w.dk = ss_take(&at, keys * width * sizeof(REAL));
    w.dv = ss_take(&at, keys * high * sizeof(REAL));
    w.q = w.q_rows = ss_take(&at, width * row);
    w.grad = w.grad_rows = ss_take(&at, high * row);
    w.dq = ss_take(&at, SS_BACKWARD_QUERIES * width * sizeof(REAL));
    w.from = ss_take(&at, SS_BACKWARD_QUERIES * sizeof(REAL));
    w.lse = ss_take(&at, SS_BACKWARD_QUERIES * sizeof(REAL));
    w.delta = ss_take(&at, SS_BACKWARD_QUERIES * sizeof(REAL));
    w.scores = ss_take(&at, ss_most(square, panel * sizeof(REAL)));
    w.grad_scores = ss_take(&at, square);
    w.weights_t = (UNIT *)w.scores;
    w.grads = w.grads_t = (UNIT *)w.grad_scores;
    if (KU == 2) {
        w.q_rows = ss_take(&at, width * row);
        w.grad_rows = ss_take(&at, high * row);
        w.weights_t = ss_take(&at, square / 2);
        w.grads_t = ss_take(&at, square / 2);
        w.turned = ss_take(&at, square / 2);
    }
    const int64_t heads = s->batch * s->kv_heads;
    for (int64_t h = ss_share(heads, thread, threads); h < ss_share(heads, thread + 1, threads); h++)
        NAME(backward_head)(s, b, &w, h / s->kv_heads, h % s->kv_heads);
}

#undef NAME
#undef REAL
#undef LANES
#undef VEC
#undef UNIT
#undef KU
#undef VSET
#undef VFMA
#undef VSTEP
#undef VUNITS
#undef ONES
#undef UVEC
#undef VFILL
#undef VMAX
#undef VEXP2
#undef VSUM
#undef VLARGEST
#undef RLOG
#undef SS_TILE
