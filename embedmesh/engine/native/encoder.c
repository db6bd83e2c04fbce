/* Vectors of post-norm encoders (BERT, RoBERTa, DistilBERT) in float32, for x86-64 with AVX2, FMA and F16C.

   States are rows of `hidden` floats, one a token, the texts one behind the other: there is no padding, and a text's
   vector is the same to the bit in any batch, on any number of threads, because every sum is taken in one order.

   Weights are packed into panels of 16 outputs, [outputs / 16][inputs][16], and states for a product into panels of up
   to 6 rows, [inputs][6]. A tile is 6 x 16 sums in 12 of the 16 registers; it reads one panel of each, so that 96
   multiplications need 8 loads. Attention runs on keys x 16 queries, transposed: then a softmax over keys is vertical.

   A run is a line of stages, each of some tasks that any thread may take. Nobody allocates here: the caller gives all
   memory, has checked every size, and knows that ids are below the vocabulary. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 8,        /* floats of a register */
    ROWS = 6,         /* of a tile, and of a panel of states */
    COLUMNS = 16,     /* of a tile, and of a panel of weights */
#ifndef DEPTH
    DEPTH = 384,      /* inputs that a tile sums at once: 24 KB of a panel of weights stay in a first-level cache */
#endif
#ifndef BLOCK_ROWS
    BLOCK_ROWS = 96,  /* of states that a task takes through a layer: what they need stays in a second-level cache */
#endif
#ifndef GRID_ROWS
    GRID_ROWS = 48,   /* with fewer rows a thread, threads share products by columns, too */
#endif
    PIECES = 3,       /* tasks a thread of a product that is shared by columns */
    QUERIES = 256,    /* of a text that one task attends to; it packs the keys for itself */
    SPINS = 2000,     /* looks at the ticket before a thread sleeps: some 50 us, as long as a wake-up takes */
    THREADS_MAX = 64,
};

struct linear { const float *weight, *bias; };  /* packed; [outputs] */
struct norm { const float *scale, *shift; };    /* [hidden] */
struct layer { struct linear qkv, mixed, wide, narrow; struct norm mixed_norm, norm; };

enum words_type { WORDS_F32, WORDS_F16, WORDS_BF16 };
enum activation { NONE, GELU, GELU_TANH, RELU, SILU };
enum pooling { MEAN, CLS };

/* `width` is that of a head, with zeros up to a multiple of 16; `middle` that of a layer's wide middle, too. Weights and
   biases of queries hold a factor log2(e) / sqrt(width), so that a softmax takes powers of 2. `padding`: the token whose
   position is its own id, while others' count up from the next one; -1 where positions count from 0. */
struct model {
    int32_t hidden, heads, width, middle, layers, words_type, activation, unused;
    double eps;
    const void *words;
    const float *positions;
    struct norm norm;
    const struct layer *layer;
};

struct run {
    const struct model *m;
    const int32_t *ids, *places, *offsets;      /* [tokens] rows of the two tables; [texts + 1] where texts begin */
    int texts, tokens, longest, pooling, threads;
    int by_rows, block, blocks;                 /* whether a task takes rows through a whole layer; rows of a task */
    float *x, *qkv, *context, *y, *wide, *own;  /* qkv [3][heads][tokens][width]; `own` has a part for each thread */
    long own_floats;
    float *out;
};

/* `ticket` is what there is to do: stage << 48 | next task << 24 | tasks of the stage. Of a stage that is over, or of no
   run, the next task is the number of tasks. Whoever does a stage's last task opens the next stage. */
struct pool {
    _Atomic uint64_t ticket;
    _Atomic int done, asleep, ended;
    int threads;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    pthread_t helper[THREADS_MAX];
    struct run run;
};

/* ---- eight floats at a time -------------------------------------------------------------------------------------- */

#define ALL(value) _mm256_set1_ps(value)
#define UNROLL _Pragma("GCC unroll 8")

/* c[0] + c[1] x + ... + c[n - 1] x^(n - 1) */
static inline __m256 polynomial(const float *c, int n, __m256 x)
{
    __m256 sum = ALL(c[n - 1]);
    UNROLL for (int i = n - 2; i >= 0; i--)
        sum = _mm256_fmadd_ps(sum, x, ALL(c[i]));
    return sum;
}

/* 2^x for x up to 127, within 2 units in the last place; 0 below 2^-126. What is no number stays none. */
static inline __m256 exp2_8(__m256 x)
{
    static const float c[] = {1.0f, 6.931471825e-1f, 2.402264774e-1f, 5.550332367e-2f, 9.618436918e-3f,
                              1.339887502e-3f, 1.535336196e-4f}; /* minimax on [-1/2, 1/2] */
    __m256 zero = _mm256_cmp_ps(x, ALL(-126.0f), _CMP_LT_OQ);
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    __m256 part = polynomial(c, 7, _mm256_sub_ps(x, whole));
    return _mm256_andnot_ps(zero, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(part), power)));
}

/* x P(X < x) of a normal X, to float32: for a = |x| it is max(x, 0) - a 2^(-a^2 log2(e) / 2) w(a), and w a polynomial
   in 1 / (1 + 0.29 a), minimax of P(X > a) 2^(a^2 log2(e) / 2). */
static inline __m256 gelu_8(__m256 x)
{
    static const float c[] = {0.0f, 1.154244319e-1f, 1.197317243e-1f, 7.986715436e-2f, 1.808221489e-1f,
                              -1.466660053e-1f, 3.038829863e-1f, -1.924175620e-1f, 3.935512528e-2f};
    __m256 a = _mm256_andnot_ps(ALL(-0.0f), x);
    __m256 t = _mm256_div_ps(ALL(1.0f), _mm256_fmadd_ps(a, ALL(0.29f), ALL(1.0f)));
    __m256 tail = _mm256_mul_ps(polynomial(c, 9, t), exp2_8(_mm256_mul_ps(_mm256_mul_ps(a, a), ALL(-0.72134752f))));
    return _mm256_fnmadd_ps(a, tail, _mm256_max_ps(_mm256_setzero_ps(), x));
}

/* x / (1 + e^-(y)) */
static inline __m256 gated(__m256 x, __m256 y)
{
    __m256 power = exp2_8(_mm256_min_ps(ALL(126.0f), _mm256_mul_ps(y, ALL(-1.44269504f))));
    return _mm256_div_ps(x, _mm256_add_ps(ALL(1.0f), power));
}

static inline __m256 activate(__m256 x, enum activation kind)
{
    switch (kind) {
    case GELU: return gelu_8(x);
    case GELU_TANH: { /* 2 sqrt(2 / pi) (x + 0.044715 x^3) */
        __m256 square = _mm256_mul_ps(x, x);
        return gated(x, _mm256_mul_ps(x, _mm256_fmadd_ps(square, ALL(0.071354816f), ALL(1.5957691f))));
    }
    case RELU: return _mm256_max_ps(_mm256_setzero_ps(), x);
    case SILU: return gated(x, x);
    default: return x;
    }
}

static inline float sum_of(__m256 x)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline void transpose(__m256 r[LANES])
{
    __m256 a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* `rows` rows from `from` on, `step` floats apart, to columns of `to`, `width` floats apart: to[i * width + row]. For
   rows that are not there zeros are written; all eight columns are, the last of them first overwritten, then right. */
static void to_columns(const float *from, long step, int rows, int inputs, float *to, int width)
{
    for (int k = 0; k < inputs; k += LANES) {
        __m256 r[LANES];
        for (int i = 0; i < LANES; i++)
            r[i] = i < rows ? _mm256_loadu_ps(from + i * step + k) : _mm256_setzero_ps();
        transpose(r);
        UNROLL for (int i = 0; i < LANES; i++)
            _mm256_storeu_ps(to + (long)(k + i) * width, r[i]);
    }
}

/* Where panel number p of `rows` rows begins: panels are of like size, since a tile of one row costs as one of four. */
static inline int panels_of(int rows) { return (rows + ROWS - 1) / ROWS; }
static inline int panel_start(int rows, int p) { return (int)((long)rows * p / panels_of(rows)); }

static void pack_states(const float *from, long step, int rows, int inputs, float *to)
{
    for (int p = 0; p < panels_of(rows); p++) {
        int row = panel_start(rows, p);
        to_columns(from + row * step, step, panel_start(rows, p + 1) - row, inputs, to + (long)p * inputs * ROWS, ROWS);
    }
}

/* weight [outputs][inputs] to panels; both are multiples of 16. */
void embedmesh_pack(const float *weight, float *to, int outputs, int inputs)
{
    for (long row = 0; row < outputs; row += LANES)
        to_columns(weight + row * inputs, inputs, LANES, inputs, to + row / COLUMNS * COLUMNS * inputs + row % COLUMNS,
                   COLUMNS);
}

/* c[rows][16] = start (or c itself) + a w; a[k * a_step + row], w[k][16]. */
static inline __attribute__((always_inline)) void
tile_of(const int rows, int depth, const float *a, long a_step, const float *w, const float *start, float *c, long step)
{
    __m256 low[ROWS], high[ROWS];
    UNROLL for (int i = 0; i < rows; i++) {
        low[i] = _mm256_loadu_ps(start ? start : c + i * step);
        high[i] = _mm256_loadu_ps((start ? start : c + i * step) + LANES);
    }
    for (int k = 0; k < depth; k++, a += a_step, w += COLUMNS) {
        __m256 left = _mm256_loadu_ps(w), right = _mm256_loadu_ps(w + LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            __m256 one = _mm256_broadcast_ss(a + i);
            low[i] = _mm256_fmadd_ps(one, left, low[i]);
            high[i] = _mm256_fmadd_ps(one, right, high[i]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        _mm256_storeu_ps(c + i * step, low[i]);
        _mm256_storeu_ps(c + i * step + LANES, high[i]);
    }
}

static void tile(int rows, int depth, const float *a, long a_step, const float *w, const float *start, float *c, long step)
{
    switch (rows) {
    case 1: tile_of(1, depth, a, a_step, w, start, c, step); break;
    case 2: tile_of(2, depth, a, a_step, w, start, c, step); break;
    case 3: tile_of(3, depth, a, a_step, w, start, c, step); break;
    case 4: tile_of(4, depth, a, a_step, w, start, c, step); break;
    case 5: tile_of(5, depth, a, a_step, w, start, c, step); break;
    default: tile_of(6, depth, a, a_step, w, start, c, step); break;
    }
}

/* Where a product goes: rows `width` floats wide, and behind each `width` columns a plane. */
struct place { float *at; long width, plane; };

/* Panels first .. end of states · weightᵀ + bias, activated. */
static void multiply(const float *states, int rows, const struct linear *w, int inputs, int first, int end,
                     struct place to, enum activation kind)
{
    int runs = (inputs + DEPTH - 1) / DEPTH;
    for (int j = first; j < end; j++) {
        float *c = to.at + j * COLUMNS / to.width * to.plane + j * COLUMNS % to.width;
        for (int run = 0; run < runs; run++) {
            int k = (int)((long)inputs * run / runs), depth = (int)((long)inputs * (run + 1) / runs) - k;
            const float *panel = w->weight + ((long)j * inputs + k) * COLUMNS;
            for (int p = 0; p < panels_of(rows); p++) {
                int row = panel_start(rows, p);
                tile(panel_start(rows, p + 1) - row, depth, states + ((long)p * inputs + k) * ROWS, ROWS, panel,
                     run ? NULL : w->bias + j * COLUMNS, c + row * to.width, to.width);
            }
        }
        for (int row = 0; kind != NONE && row < rows; row++)
            for (int i = 0; i < COLUMNS; i += LANES) {
                float *at = c + row * to.width + i;
                _mm256_storeu_ps(at, activate(_mm256_loadu_ps(at), kind));
            }
    }
}

/* ---- the other parts of a layer ---------------------------------------------------------------------------------- */

/* x = norm(x + y), row by row. */
static void add_and_norm(float *x, const float *y, int rows, int hidden, struct norm n, double eps)
{
    for (int row = 0; row < rows; row++, x += hidden, y += hidden) {
        __m256 sum = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
        for (int i = 0; i < hidden; i += LANES) {
            __m256 both = _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i));
            _mm256_storeu_ps(x + i, both);
            sum = _mm256_add_ps(sum, both);
        }
        __m256 mean = ALL(sum_of(sum) / (float)hidden);
        for (int i = 0; i < hidden; i += LANES) {
            __m256 away = _mm256_sub_ps(_mm256_loadu_ps(x + i), mean);
            squares = _mm256_fmadd_ps(away, away, squares);
        }
        __m256 scale = ALL((float)(1.0 / sqrt((double)sum_of(squares) / hidden + eps)));
        for (int i = 0; i < hidden; i += LANES) {
            __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), scale);
            normal = _mm256_fmadd_ps(normal, _mm256_loadu_ps(n.scale + i), _mm256_loadu_ps(n.shift + i));
            _mm256_storeu_ps(x + i, normal);
        }
    }
}

/* Eight floats of the table of words, which is a file's and need not be aligned. */
static inline __m256 words_8(const struct model *m, long at)
{
    const char *from = (const char *)m->words + at * (m->words_type == WORDS_F32 ? 4 : 2);
    if (m->words_type == WORDS_F32)
        return _mm256_loadu_ps((const float *)from);
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if (m->words_type == WORDS_F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The states of tokens first .. end: words and positions, normed. */
static void embed(const struct run *r, int first, int end)
{
    const struct model *m = r->m;
    for (int at = first; at < end; at++)
        for (int i = 0; i < m->hidden; i += LANES) {
            _mm256_storeu_ps(r->x + (long)at * m->hidden + i, words_8(m, (long)r->ids[at] * m->hidden + i));
            const float *position = m->positions + (long)r->places[at] * m->hidden + i;
            _mm256_storeu_ps(r->y + (long)at * m->hidden + i, _mm256_loadu_ps(position));
        }
    long at = (long)first * m->hidden;
    add_and_norm(r->x + at, r->y + at, end - first, m->hidden, m->norm, m->eps);
}

/* scores [keys][16] to powers of 2; returns one over their sums in `over`. */
static void softmax(float *scores, int keys, __m256 over[2])
{
    __m256 most[2] = {_mm256_loadu_ps(scores), _mm256_loadu_ps(scores + LANES)};
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int k = 1; k < keys; k++)
        UNROLL for (int i = 0; i < 2; i++)
            most[i] = _mm256_max_ps(most[i], _mm256_loadu_ps(scores + k * COLUMNS + i * LANES));
    for (int k = 0; k < keys; k++)
        UNROLL for (int i = 0; i < 2; i++) {
            float *at = scores + k * COLUMNS + i * LANES;
            __m256 power = exp2_8(_mm256_sub_ps(_mm256_loadu_ps(at), most[i]));
            _mm256_storeu_ps(at, power);
            sum[i] = _mm256_add_ps(sum[i], power);
        }
    over[0] = _mm256_div_ps(ALL(1.0f), sum[0]);
    over[1] = _mm256_div_ps(ALL(1.0f), sum[1]);
}

/* What a head's queries first .. end of a text see of it, into the context. */
static void attend(const struct run *r, int text, int head, int first, int end, float *own)
{
    static const float zeros[COLUMNS];
    const struct model *m = r->m;
    int width = m->width, start = r->offsets[text], keys = r->offsets[text + 1] - start;
    const float *query = r->qkv + ((long)head * r->tokens + start) * width;
    const float *key = query + (long)m->heads * r->tokens * width, *value = key + (long)m->heads * r->tokens * width;
    float *packed = own, *queries = packed + (long)panels_of(keys) * ROWS * width + LANES;
    float *mixed = queries + COLUMNS * width, *scores = mixed + COLUMNS * width;
    pack_states(key, width, keys, width, packed);
    for (int at = first; at < end; at += COLUMNS) {
        int left = end - at;
        to_columns(query + (long)at * width, width, left, width, queries, COLUMNS);
        to_columns(query + (long)(at + LANES) * width, width, left - LANES, width, queries + LANES, COLUMNS);
        for (int p = 0; p < panels_of(keys); p++) {
            int row = panel_start(keys, p);
            tile(panel_start(keys, p + 1) - row, width, packed + (long)p * width * ROWS, ROWS, queries, zeros,
                 scores + (long)row * COLUMNS, COLUMNS);
        }
        __m256 over[2];
        softmax(scores, keys, over);
        for (int p = 0; p < panels_of(width); p++) {
            int row = panel_start(width, p);
            tile(panel_start(width, p + 1) - row, keys, value + row, width, scores, zeros, mixed + row * COLUMNS, COLUMNS);
        }
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < width; i += LANES) {
                __m256 columns[LANES];
                for (int k = 0; k < LANES; k++)
                    columns[k] = _mm256_mul_ps(_mm256_loadu_ps(mixed + (i + k) * COLUMNS + half * LANES), over[half]);
                transpose(columns);
                for (int k = 0; k < LANES && half * LANES + k < left; k++)
                    _mm256_storeu_ps(r->context + ((long)(start + at + half * LANES + k) * m->heads + head) * width + i,
                                     columns[k]);
            }
    }
}

static void pool_text(const struct run *r, int text)
{
    int hidden = r->m->hidden, first = r->offsets[text], end = r->pooling == CLS ? first + 1 : r->offsets[text + 1];
    for (int i = 0; i < hidden; i += LANES) {
        __m256 sum = _mm256_setzero_ps();
        for (int at = first; at < end; at++)
            sum = _mm256_add_ps(sum, _mm256_loadu_ps(r->x + (long)at * hidden + i));
        _mm256_storeu_ps(r->out + (long)text * hidden + i, _mm256_div_ps(sum, ALL((float)(end - first))));
    }
}

/* ---- stages and tasks -------------------------------------------------------------------------------------------- */

enum stage { EMBED, QKV, ATTEND, MIXED, MIXED_NORM, WIDE, NARROW, NORM, LAYER, POOL, END };

/* The layer's stages where products are shared by columns, and where a task takes its rows through all but attention. */
static const enum stage GRID_STAGES[] = {QKV, ATTEND, MIXED, MIXED_NORM, WIDE, NARROW, NORM};
static const enum stage ROW_STAGES[] = {ATTEND, LAYER};

static enum stage stage_of(const struct run *r, int number, int *layer)
{
    int each = r->by_rows ? 2 : 7;
    *layer = (number - 1) / each;
    if (number == 0)
        return EMBED;
    if (*layer < r->m->layers)
        return (r->by_rows ? ROW_STAGES : GRID_STAGES)[(number - 1) % each];
    return number == 1 + each * r->m->layers ? POOL : END;
}

/* Columns of a stage's product, in panels; 0 where it has none. */
static int panels_in(const struct model *m, enum stage stage)
{
    int columns = stage == QKV ? 3 * m->heads * m->width : stage == WIDE ? m->middle : m->hidden;
    return stage == QKV || stage == MIXED || stage == WIDE || stage == NARROW ? columns / COLUMNS : 0;
}

static int pieces_of(const struct run *r, enum stage stage)
{
    int panels = panels_in(r->m, stage), wanted = (PIECES * r->threads + r->blocks - 1) / r->blocks;
    return panels < wanted ? panels : wanted;
}

static int tasks_of(const struct run *r, enum stage stage)
{
    switch (stage) {
    case ATTEND: return r->texts * r->m->heads * ((r->longest + QUERIES - 1) / QUERIES);
    case POOL: return r->texts;
    case END: return 0;
    default: return panels_in(r->m, stage) ? r->blocks * pieces_of(r, stage) : r->blocks;
    }
}

static void project(const struct run *r, const struct layer *l, const float *states, int row, int rows, int first, int end)
{
    const struct model *m = r->m;
    struct place to = {r->qkv + (long)row * m->width, m->width, (long)r->tokens * m->width};
    multiply(states, rows, &l->qkv, m->hidden, first, end, to, NONE);
}

/* All that follows attention in a layer, and the next layer's queries, keys and values, for rows row .. row + rows. */
static void finish_layer(const struct run *r, int layer, int row, int rows, float *own)
{
    const struct model *m = r->m;
    const struct layer *l = m->layer + layer;
    int hidden = m->hidden, middle = m->middle, inner = m->heads * m->width;
    float *x = r->x + (long)row * hidden, *wide = own, *y = wide + (long)rows * middle, *packed = y + (long)rows * hidden;
    struct place to_y = {y, hidden, 0}, to_wide = {wide, middle, 0};
    pack_states(r->context + (long)row * inner, inner, rows, inner, packed);
    multiply(packed, rows, &l->mixed, inner, 0, hidden / COLUMNS, to_y, NONE);
    add_and_norm(x, y, rows, hidden, l->mixed_norm, m->eps);
    pack_states(x, hidden, rows, hidden, packed);
    multiply(packed, rows, &l->wide, hidden, 0, middle / COLUMNS, to_wide, m->activation);
    pack_states(wide, middle, rows, middle, packed);
    multiply(packed, rows, &l->narrow, middle, 0, hidden / COLUMNS, to_y, NONE);
    add_and_norm(x, y, rows, hidden, l->norm, m->eps);
    if (layer + 1 < m->layers) {
        pack_states(x, hidden, rows, hidden, packed);
        project(r, l + 1, packed, row, rows, 0, panels_in(m, QKV));
    }
}

/* One block of rows and some of the columns of a product. */
static void share(const struct run *r, enum stage stage, const struct layer *l, int number, float *own)
{
    const struct model *m = r->m;
    int pieces = pieces_of(r, stage), panels = panels_in(m, stage), piece = number % pieces;
    int row = number / pieces * r->block, rows = r->tokens - row < r->block ? r->tokens - row : r->block;
    int first = panels * piece / pieces, end = panels * (piece + 1) / pieces;
    int inputs = stage == MIXED ? m->heads * m->width : stage == NARROW ? m->middle : m->hidden;
    const float *from = stage == MIXED ? r->context : stage == NARROW ? r->wide : r->x;
    pack_states(from + (long)row * inputs, inputs, rows, inputs, own);
    if (stage == QKV) {
        project(r, l, own, row, rows, first, end);
        return;
    }
    long columns = stage == WIDE ? m->middle : m->hidden;
    struct place to = {(stage == WIDE ? r->wide : r->y) + row * columns, columns, 0};
    const struct linear *w = stage == MIXED ? &l->mixed : stage == WIDE ? &l->wide : &l->narrow;
    multiply(own, rows, w, inputs, first, end, to, stage == WIDE ? (enum activation)m->activation : NONE);
}

static void do_task(const struct run *r, int stage_number, int number, int thread)
{
    int layer, row = number * r->block, rows = r->tokens - row < r->block ? r->tokens - row : r->block;
    enum stage stage = stage_of(r, stage_number, &layer);
    const struct layer *l = r->m->layer + layer;
    float *own = r->own + thread * r->own_floats;
    long at = (long)row * r->m->hidden;
    switch (stage) {
    case EMBED:
        embed(r, row, row + rows);
        if (r->by_rows) {
            pack_states(r->x + at, r->m->hidden, rows, r->m->hidden, own);
            project(r, r->m->layer, own, row, rows, 0, panels_in(r->m, QKV));
        }
        break;
    case ATTEND: {
        int text = number % r->texts, head = number / r->texts % r->m->heads, length = r->offsets[text + 1] - r->offsets[text];
        int first = number / r->texts / r->m->heads * QUERIES, end = first + QUERIES < length ? first + QUERIES : length;
        if (first < end)
            attend(r, text, head, first, end, own);
        break;
    }
    case LAYER: finish_layer(r, layer, row, rows, own); break;
    case MIXED_NORM: add_and_norm(r->x + at, r->y + at, rows, r->m->hidden, l->mixed_norm, r->m->eps); break;
    case NORM: add_and_norm(r->x + at, r->y + at, rows, r->m->hidden, l->norm, r->m->eps); break;
    case POOL: pool_text(r, number); break;
    default: share(r, stage, l, number, own); break;
    }
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

#define STAGE(ticket) ((int)((ticket) >> 48))
#define NEXT(ticket) ((int)((ticket) >> 24 & 0xffffff))
#define TASKS(ticket) ((int)((ticket) & 0xffffff))

static void open_stage(struct pool *p, int number)
{
    int layer;
    uint64_t tasks = (uint64_t)tasks_of(&p->run, stage_of(&p->run, number, &layer));
    atomic_store(&p->done, 0);
    atomic_store(&p->ticket, tasks ? (uint64_t)number << 48 | tasks : 0);
    if (atomic_load(&p->asleep)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->moved);
        pthread_mutex_unlock(&p->lock);
    }
}

/* Wait until the ticket is another one, or the pool ends. */
static void wait_for_more(struct pool *p, uint64_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->ticket, memory_order_relaxed) != seen || atomic_load(&p->ended))
            return;
        _mm_pause();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->asleep, 1);
    while (atomic_load(&p->ticket) == seen && !atomic_load(&p->ended))
        pthread_cond_wait(&p->moved, &p->lock);
    atomic_fetch_sub(&p->asleep, 1);
    pthread_mutex_unlock(&p->lock);
}

/* Take tasks: a helper until the pool ends, the caller (thread 0) until its run does. */
static void work(struct pool *p, int thread)
{
    while (!atomic_load(&p->ended)) {
        uint64_t ticket = atomic_load(&p->ticket);
        if (thread == 0 && ticket == 0)
            return;
        if (NEXT(ticket) == TASKS(ticket))
            wait_for_more(p, ticket);
        else if (atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + (1 << 24))) {
            do_task(&p->run, STAGE(ticket), NEXT(ticket), thread);
            if (atomic_fetch_add(&p->done, 1) + 1 == TASKS(ticket))
                open_stage(p, STAGE(ticket) + 1);
        }
    }
}

struct helper { struct pool *pool; int thread; };

static void *help(void *given)
{
    struct helper h = *(struct helper *)given;
    free(given);
    work(h.pool, h.thread);
    return NULL;
}

/* A pool of `threads`, the caller's among them, or fewer if the system has no more; NULL without memory. */
struct pool *embedmesh_start(int threads)
{
    struct pool *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->moved, NULL);
    for (p->threads = 1; p->threads < threads && p->threads < THREADS_MAX; p->threads++) {
        struct helper *h = malloc(sizeof *h);
        if (!h)
            break;
        *h = (struct helper){p, p->threads};
        if (pthread_create(&p->helper[p->threads], NULL, help, h)) {
            free(h);
            break;
        }
    }
    return p;
}

void embedmesh_end(struct pool *p)
{
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->ended, 1);
    pthread_cond_broadcast(&p->moved);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++)
        pthread_join(p->helper[i], NULL);
    free(p);
}

/* Floats of `space` that a run needs. */
long embedmesh_floats(const struct pool *p, const struct model *m, int tokens, int longest)
{
    long inner = (long)m->heads * m->width, most = inner > m->middle ? inner : m->middle;
    most = most > m->hidden ? most : m->hidden;
    long layer = BLOCK_ROWS * (m->middle + m->hidden + most + ROWS) + 16;
    long head = (long)m->width * (longest + ROWS + 2 * COLUMNS) + (longest + 1) * COLUMNS + 16;
    return (layer > head ? layer : head) * p->threads + (long)tokens * (2 * m->hidden + 4 * inner + m->middle) + 64;
}

/* out [texts][hidden]: the pooled states of each text. One run at a time in a pool. */
void embedmesh_run(struct pool *p, const struct model *m, const int32_t *ids, const int32_t *places,
                   const int32_t *offsets, int texts, int longest, int pooling, float *space, float *out)
{
    int tokens = offsets[texts], by_rows = tokens >= p->threads * GRID_ROWS;
    long inner = (long)m->heads * m->width;
    struct run r = {.m = m, .ids = ids, .places = places, .offsets = offsets, .texts = texts, .tokens = tokens,
                    .longest = longest, .pooling = pooling, .threads = p->threads, .by_rows = by_rows, .out = out};
    r.blocks = (tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (by_rows)
        r.blocks = (r.blocks + p->threads - 1) / p->threads * p->threads;
    r.block = (tokens + r.blocks - 1) / r.blocks;
    r.blocks = (tokens + r.block - 1) / r.block;
    r.x = space;
    r.y = r.x + tokens * (long)m->hidden;
    r.qkv = r.y + tokens * (long)m->hidden;
    r.context = r.qkv + tokens * inner * 3;
    r.wide = r.context + tokens * inner;
    r.own = r.wide + tokens * (long)m->middle;
    r.own_floats = (embedmesh_floats(p, m, tokens, longest) - (r.own - space) - 64) / p->threads;
    p->run = r;
    open_stage(p, 0);
    work(p, 0);
}
