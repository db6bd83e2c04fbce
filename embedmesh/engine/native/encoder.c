/* Vectors of post-norm encoders (BERT, RoBERTa, DistilBERT) in float32, for x86-64 with AVX2, FMA and F16C.

   States are rows of `hidden` floats, one a token, the texts one behind the other: nothing is padded. Each sum is taken
   in one order, so that a text's vector is the same to the bit in any batch and on any number of threads.

   Weights are packed into panels of 16 outputs, [outputs / 16][inputs][16], states for a product into panels of up to
   6 rows, [inputs][6]. A tile is 6 x 16 sums in 12 of the 16 registers: 8 loads for 12 multiplications of 8 floats.
   Attention takes keys x 16 queries, transposed, because a softmax over keys is then vertical.

   Nobody allocates here but for threads: the caller gives all memory and has checked all sizes and ids. */

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef EMBEDMESH_STAMP
const char *const embedmesh_stamp = EMBEDMESH_STAMP; /* the hash of the source that this was built from */
#endif

#ifndef TUNED
enum {
    DEPTH = 384,      /* inputs that a tile sums at once: 24 KB of a panel of weights stay in a first-level cache */
    BLOCK_ROWS = 96,  /* of a product that a task takes: packed they stay in a second-level cache */
    PIECES = 3,       /* tasks a thread of a product with few rows: its columns are cut, too */
};
#endif
enum {
    LANES = 8,        /* floats of a register */
    ROWS = 6,         /* of a tile */
    COLUMNS = 16,     /* of a tile, and of a panel of weights */
    NORM_ROWS = 8,    /* that a task normalises, in some microseconds */
    QUERIES = 256,    /* of a text and head that a task attends to; it packs the keys for itself */
    SPINS = 2000,     /* looks at the ticket before a thread sleeps: some 50 us, as long as a wake-up takes */
    THREADS_MAX = 64,
};

struct linear { const float *weight, *bias; };  /* packed; [outputs] */
struct norm { const float *scale, *shift; };    /* [hidden] */
struct layer { struct linear qkv, mixed, wide, narrow; struct norm mixed_norm, norm; };

/* `width`: of a head, with zeros up to a multiple of 16. `middle`: of a layer's wide middle. `word_bytes` is negative for
   bfloat16. The queries' weights hold a factor log2(e) / sqrt(head width), so that a softmax takes powers of 2. */
struct model {
    int32_t hidden, heads, width, middle, layers, word_bytes;
    double eps;
    const void *words;
    const float *positions;
    struct norm norm;
    const struct layer *layer;
};

struct run {
    const struct model *m;
    const int32_t *ids, *places, *offsets;      /* [tokens] rows of words and positions; [texts + 1] where texts begin */
    int texts, tokens, longest, first_only;
    int blocks, pieces;                         /* how products are cut into tasks, by rows and by columns */
    float *x, *y, *qkv, *context, *wide, *own;  /* qkv [3][heads][tokens][width]; `own` has a part for each thread */
    long own_floats;
    float *out;
};

/* `ticket` is what there is to do: stage << 48 | next task << 24 | tasks of the stage; 0 while there is no run. Who does
   a stage's last task opens the next stage, so that nobody waits for a thread that has no CPU, unless it has a task. */
struct pool {
    _Atomic uint64_t ticket;
    _Atomic int done, asleep, ended;
    int threads;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    struct helper { pthread_t id; struct pool *pool; int thread; } helpers[THREADS_MAX];
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
#define WITH_ROWS(n) case n: tile_of(n, depth, a, a_step, w, start, c, step); break;
    switch (rows) { WITH_ROWS(1) WITH_ROWS(2) WITH_ROWS(3) WITH_ROWS(4) WITH_ROWS(5) WITH_ROWS(6) }
}

/* states · weightᵀ + bias; `to`: rows `width` wide, and a plane for each `width` columns. */
struct product { const float *from; const struct linear *w; int inputs, outputs, gelu; float *to; long width, plane; };

/* Its panels first .. end, for rows row .. row + rows. */
static void multiply(const struct product *p, int row, int rows, int first, int end, float *packed)
{
    int runs = (p->inputs + DEPTH - 1) / DEPTH;
    pack_states(p->from + (long)row * p->inputs, p->inputs, rows, p->inputs, packed);
    for (int j = first; j < end; j++) {
        float *c = p->to + row * p->width + j * COLUMNS / p->width * p->plane + j * COLUMNS % p->width;
        for (int run = 0; run < runs; run++) {
            long k = (long)p->inputs * run / runs, depth = (long)p->inputs * (run + 1) / runs - k;
            const float *panel = p->w->weight + ((long)j * p->inputs + k) * COLUMNS;
            for (int i = 0; i < panels_of(rows); i++) {
                int at = panel_start(rows, i);
                tile(panel_start(rows, i + 1) - at, depth, packed + ((long)i * p->inputs + k) * ROWS, ROWS, panel,
                     run ? NULL : p->w->bias + j * COLUMNS, c + at * p->width, p->width);
            }
        }
        for (int i = 0; p->gelu && i < 2 * rows; i++) {
            float *at = c + i / 2 * p->width + i % 2 * LANES;
            _mm256_storeu_ps(at, gelu_8(_mm256_loadu_ps(at)));
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
    const char *from = (const char *)m->words + at * abs(m->word_bytes);
    if (m->word_bytes == 4)
        return _mm256_loadu_ps((const float *)from);
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    return m->word_bytes == 2 ? _mm256_cvtph_ps(half)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Words into x and positions into y, for tokens first .. end. */
static void embed(const struct run *r, int first, int end)
{
    const struct model *m = r->m;
    for (int at = first; at < end; at++)
        for (int i = 0; i < m->hidden; i += LANES) {
            _mm256_storeu_ps(r->x + (long)at * m->hidden + i, words_8(m, (long)r->ids[at] * m->hidden + i));
            const float *position = m->positions + (long)r->places[at] * m->hidden + i;
            _mm256_storeu_ps(r->y + (long)at * m->hidden + i, _mm256_loadu_ps(position));
        }
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
    int hidden = r->m->hidden, first = r->offsets[text], end = r->first_only ? first + 1 : r->offsets[text + 1];
    for (int i = 0; i < hidden; i += LANES) {
        __m256 sum = _mm256_setzero_ps();
        for (int at = first; at < end; at++)
            sum = _mm256_add_ps(sum, _mm256_loadu_ps(r->x + (long)at * hidden + i));
        _mm256_storeu_ps(r->out + (long)text * hidden + i, _mm256_div_ps(sum, ALL((float)(end - first))));
    }
}

/* ---- stages and tasks -------------------------------------------------------------------------------------------- */

enum stage { QKV, ATTEND, MIXED, MIXED_NORM, WIDE, NARROW, NORM, LAYER_STAGES };

/* The product of a layer's stage; without outputs where it is none. */
static struct product product_of(const struct run *r, const struct layer *l, int stage)
{
    const struct model *m = r->m;
    int hidden = m->hidden, inner = m->heads * m->width, middle = m->middle;
    switch (stage) {
    case QKV: return (struct product){r->x, &l->qkv, hidden, 3 * inner, 0, r->qkv, m->width, (long)r->tokens * m->width};
    case MIXED: return (struct product){r->context, &l->mixed, inner, hidden, 0, r->y, hidden, 0};
    case WIDE: return (struct product){r->x, &l->wide, hidden, middle, 1, r->wide, middle, 0};
    case NARROW: return (struct product){r->wide, &l->narrow, middle, hidden, 0, r->y, hidden, 0};
    default: return (struct product){0};
    }
}

/* Stage 0 embeds words, then come the layers' stages, at last the pooling. Returns a task's stage in its layer. */
static int stage_in(const struct run *r, int number, const struct layer **l)
{
    *l = r->m->layer + (number - 1) / LAYER_STAGES;
    return number < 1 || number > r->m->layers * LAYER_STAGES ? -1 : (number - 1) % LAYER_STAGES;
}

static int tasks_of(const struct run *r, int number)
{
    const struct layer *l;
    int stage = stage_in(r, number, &l);
    if (number > r->m->layers * LAYER_STAGES)
        return number == r->m->layers * LAYER_STAGES + 1 ? r->texts : 0;
    if (stage == ATTEND)
        return r->texts * r->m->heads * ((r->longest + QUERIES - 1) / QUERIES);
    return stage < 0 || stage == MIXED_NORM || stage == NORM ? (r->tokens + NORM_ROWS - 1) / NORM_ROWS
                                                                 : r->blocks * r->pieces;
}

static void do_task(const struct run *r, int number, int task, int thread)
{
    const struct layer *l;
    const struct model *m = r->m;
    int stage = stage_in(r, number, &l);
    float *own = r->own + thread * r->own_floats;
    if (stage == ATTEND) {
        int cuts = (r->longest + QUERIES - 1) / QUERIES, text = task / cuts / m->heads;
        int first = task % cuts * QUERIES, length = r->offsets[text + 1] - r->offsets[text];
        attend(r, text, task / cuts % m->heads, first, first + QUERIES < length ? first + QUERIES : length, own);
    } else if (number > m->layers * LAYER_STAGES) {
        pool_text(r, task);
    } else if (stage < 0 || stage == MIXED_NORM || stage == NORM) {
        int row = task * NORM_ROWS, rows = r->tokens - row < NORM_ROWS ? r->tokens - row : NORM_ROWS;
        if (stage < 0)
            embed(r, row, row + rows);
        add_and_norm(r->x + (long)row * m->hidden, r->y + (long)row * m->hidden, rows, m->hidden,
                     stage < 0 ? m->norm : stage == NORM ? l->norm : l->mixed_norm, m->eps);
    } else {
        struct product p = product_of(r, l, stage);
        int panels = p.outputs / COLUMNS, piece = task / r->blocks, block = task % r->blocks;
        int row = (int)((long)r->tokens * block / r->blocks), end = (int)((long)r->tokens * (block + 1) / r->blocks);
        multiply(&p, row, end - row, panels * piece / r->pieces, panels * (piece + 1) / r->pieces, own);
    }
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

#define STAGE(ticket) ((int)((ticket) >> 48))
#define NEXT(ticket) ((int)((ticket) >> 24 & 0xffffff))
#define TASKS(ticket) ((int)((ticket) & 0xffffff))

static void open_stage(struct pool *p, int number)
{
    uint64_t tasks = (uint64_t)tasks_of(&p->run, number);
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

static void *help(void *helper)
{
    struct helper *h = helper;
    work(h->pool, h->thread);
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
        struct helper *h = &p->helpers[p->threads];
        h->pool = p;
        h->thread = p->threads;
        if (pthread_create(&h->id, NULL, help, h))
            break;
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
        pthread_join(p->helpers[i].id, NULL);
    free(p);
}

/* Floats of a thread's own part, and of all the `space` that a run needs. */
static long own_floats(const struct model *m, int longest)
{
    long inner = (long)m->heads * m->width, most = inner > m->middle ? inner : m->middle;
    long block = (BLOCK_ROWS + ROWS) * (most > m->hidden ? most : m->hidden) + LANES;
    long head = m->width * (longest + ROWS + 2l * COLUMNS) + longest * (long)COLUMNS + LANES;
    return block > head ? block : head;
}

long embedmesh_floats(const struct pool *p, const struct model *m, int tokens, int longest)
{
    long inner = (long)m->heads * m->width, middle = m->middle > 4 * inner ? m->middle : 4 * inner;
    return tokens * (2 * m->hidden + middle) + own_floats(m, longest) * p->threads;
}

/* out [texts][hidden]: the mean of each text's states, or the first. One run at a time in a pool. */
void embedmesh_run(struct pool *p, const struct model *m, const int32_t *ids, const int32_t *places,
                   const int32_t *offsets, int texts, int longest, int first_only, float *space, float *out)
{
    long tokens = offsets[texts], inner = (long)m->heads * m->width, blocks = (tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
    struct run *r = &p->run;
    *r = (struct run){.m = m, .ids = ids, .places = places, .offsets = offsets, .texts = texts, .tokens = (int)tokens,
                      .longest = longest, .first_only = first_only, .out = out, .own_floats = own_floats(m, longest)};
    r->pieces = (int)((PIECES * p->threads + blocks - 1) / blocks);
    r->blocks = (int)blocks;
    if (r->pieces == 1) /* as many blocks for each thread */
        r->blocks = (int)((blocks + p->threads - 1) / p->threads * p->threads);
    r->x = space;
    r->y = r->x + tokens * m->hidden;
    r->wide = r->qkv = r->y + tokens * m->hidden; /* which are not used at one time */
    r->context = r->qkv + 3 * tokens * inner;
    r->own = r->qkv + tokens * (m->middle > 4 * inner ? m->middle : 4 * inner);
    open_stage(p, 0);
    work(p, 0);
}
