/* Token states of post-norm encoders (BERT, RoBERTa, DistilBERT) in float32, for x86-64 with AVX2 and FMA.

   States are rows of `hidden` floats, one a token, the texts one behind the other: nothing is padded. Each sum is taken
   in one order, so that a text's states are the same to the bit in any batch and on any number of threads.

   Weights are packed into panels of 16 outputs, [outputs / 16][inputs][16]. A tile is 6 x 16 sums in 12 of the 16
   registers: 8 loads for 12 multiplications of 8 floats. States need no packing: six rows are six lines of a cache.
   Attention takes keys x 16 queries, transposed, because a softmax over keys is then vertical.

   The caller gives all memory but the pool's, and has checked all sizes. */
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

const char *const embedmesh_stamp = EMBEDMESH_STAMP; /* the hash of the source that a library was built from */

enum {
    LANES = 8,        /* floats of a register */
    ROWS = 6,         /* of a tile */
    COLUMNS = 16,     /* of a tile, and of a panel of weights */
    DEPTH = 384,      /* inputs that a tile sums at once: 24 KB of a panel of weights stay in a first-level cache */
    BLOCK_ROWS = 96,  /* of a product that a task takes: they stay in a second-level cache */
    PIECES = 2,       /* tasks a thread of a product with few rows: its columns are cut, too */
    NORM_ROWS = 8,    /* that a task normalises, in some microseconds */
    QUERIES = 256,    /* of a text and head that a task attends to */
    SPINS = 2000,     /* looks at the ticket before a thread sleeps: some 50 us, as long as a wake-up takes */
    THREADS_MAX = 64,
};

struct linear { const float *weight, *bias; };  /* packed; [outputs] */
struct norm { const float *scale, *shift; };    /* [hidden] */
struct layer { struct linear qkv, mixed, wide, narrow; struct norm mixed_norm, norm; };

/* `width`: of a head, with zeros up to a multiple of 16. `middle`: of a layer's wide middle. Weights of queries hold a
   factor log2(e) / sqrt(head width), so that a softmax takes powers of 2. */
struct model {
    int32_t hidden, heads, width, middle, layers;
    float eps;
    struct norm norm;
    const struct layer *layer;
};

struct run {
    const struct model *m;
    const int32_t *offsets;                   /* [texts + 1]: where each text begins */
    int texts, tokens, longest;
    int blocks, pieces;                       /* how products are cut into tasks, by rows and by columns */
    float *x, *y, *qkv, *context, *wide, *own; /* [tokens][hidden], twice; qkv [3][heads][tokens][width] */
    long own_floats;
};

/* `ticket`: stage << 48 | next task << 24 | tasks of the stage; 0 while there is no run. The thread that does a stage's
   last task opens the next one, so that none waits for another that has no CPU, unless that has a task. */
struct pool {
    _Atomic uint64_t ticket;
    _Atomic int done, asleep, ended;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int threads;
    struct worker { pthread_t id; struct pool *pool; int number; } workers[THREADS_MAX]; /* the first is the caller */
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

/* 2^x for x up to 127, within 2 units in the last place; 2^-126 below that. What is no number stays none. */
static inline __m256 exp2_8(__m256 x)
{
    static const float c[] = {1.0f, 6.931470037e-1f, 2.402224243e-1f, 5.550733581e-2f, 9.671512991e-3f,
                              1.326472731e-3f}; /* minimax on [-1/2, 1/2] */
    x = _mm256_max_ps(ALL(-126.0f), x);
    __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    __m256 part = polynomial(c, 6, _mm256_sub_ps(x, whole));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(part), power));
}

/* x P(X < x) of a normal X, as near as float32 is: for a = |x| it is max(x, 0) - a 2^(-a^2 log2(e) / 2) w(a), where w
   is a polynomial in t = 1 / (1 + a / 4), minimax of P(X > a) 2^(a^2 log2(e) / 2). */
static inline __m256 gelu_8(__m256 x)
{
    static const float c[] = {9.850360453e-2f, 1.147456840e-1f, 1.658803783e-2f, 2.946571112e-1f, -2.788530290e-1f,
                              3.468563259e-1f, -9.249763936e-2f};
    __m256 a = _mm256_andnot_ps(ALL(-0.0f), x);
    __m256 t = _mm256_div_ps(ALL(1.0f), _mm256_fmadd_ps(a, ALL(0.25f), ALL(1.0f)));
    __m256 tail = _mm256_mul_ps(polynomial(c, 7, t), exp2_8(_mm256_mul_ps(_mm256_mul_ps(a, a), ALL(-0.72134752f))));
    return _mm256_fnmadd_ps(_mm256_mul_ps(a, t), tail, _mm256_max_ps(_mm256_setzero_ps(), x));
}

static inline float sum_of(__m256 x)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* Panel p of `rows` rows begins here: panels are of like size, since a tile of one row costs as much as one of four. */
static inline int panels_of(int rows) { return (rows + ROWS - 1) / ROWS; }
static inline int panel_start(int rows, int p) { return (int)((long)rows * p / panels_of(rows)); }

/* c[rows][16] = start, or c itself, + the sum over k of a[row * a_row + k * a_step] w[k * w_step .. + 15]. */
struct tile { const float *a, *w, *start; float *c; long depth, a_row, a_step, w_step, c_row; };

static inline __attribute__((always_inline)) void tile_of(const int rows, const struct tile *t)
{
    __m256 low[ROWS], high[ROWS];
    const float *a = t->a, *w = t->w;
    UNROLL for (int i = 0; i < rows; i++) {
        const float *from = t->start ? t->start : t->c + i * t->c_row;
        low[i] = _mm256_loadu_ps(from);
        high[i] = _mm256_loadu_ps(from + LANES);
    }
    for (long k = t->depth; k > 0; k--, a += t->a_step, w += t->w_step) {
        __m256 left = _mm256_loadu_ps(w), right = _mm256_loadu_ps(w + LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            __m256 one = _mm256_broadcast_ss(a + i * t->a_row);
            low[i] = _mm256_fmadd_ps(one, left, low[i]);
            high[i] = _mm256_fmadd_ps(one, right, high[i]);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        _mm256_storeu_ps(t->c + i * t->c_row, low[i]);
        _mm256_storeu_ps(t->c + i * t->c_row + LANES, high[i]);
    }
}

static void sum_tile(int rows, struct tile t)
{
#define OF(n) case n: tile_of(n, &t); break;
    switch (rows) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) }
}

/* states · weightᵀ + bias; `to`: rows `width` wide, and a plane for each `width` columns. */
struct product { const float *from; struct linear w; int inputs, outputs, gelu; float *to; long width, plane; };

/* Its panels first .. end, for rows row .. row + rows. */
static void multiply(const struct product *p, int row, int rows, int first, int end)
{
    int runs = (p->inputs + DEPTH - 1) / DEPTH, panels = panels_of(rows);
    for (int j = first; j < end; j++) {
        float *c = p->to + row * p->width + j * COLUMNS / p->width * p->plane + j * COLUMNS % p->width;
        for (int run = 0; run < runs; run++) {
            long k = (long)p->inputs * run / runs, depth = (long)p->inputs * (run + 1) / runs - k;
            const float *w = p->w.weight + ((long)j * p->inputs + k) * COLUMNS;
            for (int i = 0; i < panels; i++) {
                int at = panel_start(rows, i);
                const float *a = p->from + (long)(row + at) * p->inputs + k, *bias = p->w.bias + j * COLUMNS;
                sum_tile(panel_start(rows, i + 1) - at, (struct tile){a, w, run ? NULL : bias, c + at * p->width, depth,
                                                                      p->inputs, 1, COLUMNS, p->width});
            }
        }
        for (int i = 0; p->gelu && i < 2 * rows; i++) {
            float *at = c + i / 2 * p->width + i % 2 * LANES;
            _mm256_storeu_ps(at, gelu_8(_mm256_loadu_ps(at)));
        }
    }
}

/* ---- the other parts of a layer ---------------------------------------------------------------------------------- */

/* x = norm(x + y), for rows row .. end. */
static void add_and_norm(const struct run *r, int row, int end, struct norm n)
{
    for (int hidden = r->m->hidden; row < end; row++) {
        float *x = r->x + (long)row * hidden, *y = r->y + (long)row * hidden;
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
        __m256 scale = ALL(1.0f / sqrtf(sum_of(squares) / (float)hidden + r->m->eps));
        for (int i = 0; i < hidden; i += LANES) {
            __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), scale);
            normal = _mm256_fmadd_ps(normal, _mm256_loadu_ps(n.scale + i), _mm256_loadu_ps(n.shift + i));
            _mm256_storeu_ps(x + i, normal);
        }
    }
}

/* scores [keys][16] to powers of 2, and one over their sums to over[16]. */
static void softmax(float *scores, int keys, float *over)
{
    for (int half = 0; half < COLUMNS; half += LANES) {
        __m256 most = _mm256_loadu_ps(scores + half), sum = _mm256_setzero_ps();
        for (long k = 1; k < keys; k++)
            most = _mm256_max_ps(most, _mm256_loadu_ps(scores + k * COLUMNS + half));
        for (long k = 0; k < keys; k++) {
            __m256 power = exp2_8(_mm256_sub_ps(_mm256_loadu_ps(scores + k * COLUMNS + half), most));
            _mm256_storeu_ps(scores + k * COLUMNS + half, power);
            sum = _mm256_add_ps(sum, power);
        }
        _mm256_storeu_ps(over + half, _mm256_div_ps(ALL(1.0f), sum));
    }
}

/* What a head's queries first .. end of a text see of it, into the context. */
static void attend(const struct run *r, int text, int head, int first, int end, float *own)
{
    static const float zeros[COLUMNS];
    int width = r->m->width, inner = r->m->heads * width, start = r->offsets[text], keys = r->offsets[text + 1] - start;
    long plane = (long)inner * r->tokens, panels = panels_of(keys);
    const float *query = r->qkv + ((long)head * r->tokens + start) * width, *key = query + plane, *value = key + plane;
    float *queries = own, *scores = queries + COLUMNS * width, over[COLUMNS];
    for (int at = first; at < end; at += COLUMNS) {
        int rows = end - at < COLUMNS ? end - at : COLUMNS;
        for (int i = 0; i < COLUMNS; i++)
            for (int k = 0; k < width; k++)
                queries[k * COLUMNS + i] = i < rows ? query[(long)(at + i) * width + k] : 0.0f;
        for (int p = 0; p < panels; p++) {
            long row = panel_start(keys, p);
            sum_tile(panel_start(keys, p + 1) - (int)row, (struct tile){key + row * width, queries, zeros,
                     scores + row * COLUMNS, width, width, 1, COLUMNS, COLUMNS});
        }
        softmax(scores, keys, over);
        float *context = r->context + (long)(start + at) * inner + head * width;
        for (int j = 0; j < width; j += COLUMNS)
            for (int p = 0; p < panels_of(rows); p++) {
                int row = panel_start(rows, p);
                sum_tile(panel_start(rows, p + 1) - row, (struct tile){scores + row, value + j, zeros,
                         context + (long)row * inner + j, keys, 1, COLUMNS, width, inner});
            }
        for (int i = 0; i < rows * width; i += LANES) {
            float *to = context + (long)(i / width) * inner + i % width;
            _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_loadu_ps(to), ALL(over[i / width])));
        }
    }
}

/* ---- stages and tasks -------------------------------------------------------------------------------------------- */

/* Of a layer; a run begins with the words' norm, as if with another layer's end. */
enum stage { QKV, ATTEND, MIXED, MIXED_NORM, WIDE, NARROW, NORM, STAGES };

static int tasks_of(const struct run *r, int stage)
{
    switch (stage % STAGES) {
    case ATTEND: return r->texts * r->m->heads * ((r->longest + QUERIES - 1) / QUERIES);
    case MIXED_NORM: case NORM: return r->pieces == 1 && stage >= STAGES ? 0 : (r->tokens + NORM_ROWS - 1) / NORM_ROWS;
    default: return r->blocks * r->pieces;
    }
}

static struct product product_of(const struct run *r, const struct layer *l, int stage)
{
    const struct model *m = r->m;
    int hidden = m->hidden, inner = m->heads * m->width, middle = m->middle;
    long plane = (long)r->tokens * m->width;
    switch (stage) {
    case QKV: return (struct product){r->x, l->qkv, hidden, 3 * inner, 0, r->qkv, m->width, plane};
    case MIXED: return (struct product){r->context, l->mixed, inner, hidden, 0, r->y, hidden, 0};
    case WIDE: return (struct product){r->x, l->wide, hidden, middle, 1, r->wide, middle, 0};
    default: return (struct product){r->wide, l->narrow, middle, hidden, 0, r->y, hidden, 0};
    }
}

static void do_task(const struct run *r, int stage, int task, int thread)
{
    const struct layer *l = r->m->layer + stage / STAGES - 1;
    float *own = r->own + thread * r->own_floats;
    struct norm norm = stage < STAGES ? r->m->norm : stage % STAGES <= MIXED_NORM ? l->mixed_norm : l->norm;
    int cuts = (r->longest + QUERIES - 1) / QUERIES, text = task / cuts / r->m->heads, row = task * NORM_ROWS;
    stage = stage < STAGES ? NORM : stage % STAGES;
    if (stage == ATTEND) {
        int first = task % cuts * QUERIES, length = r->offsets[text + 1] - r->offsets[text];
        attend(r, text, task / cuts % r->m->heads, first, first + QUERIES < length ? first + QUERIES : length, own);
    } else if (stage == MIXED_NORM || stage == NORM) {
        add_and_norm(r, row, row + NORM_ROWS < r->tokens ? row + NORM_ROWS : r->tokens, norm);
    } else {
        struct product p = product_of(r, l, stage);
        int panels = p.outputs / COLUMNS, piece = task / r->blocks, block = task % r->blocks;
        int end = (int)((long)r->tokens * (block + 1) / r->blocks);
        row = (int)((long)r->tokens * block / r->blocks);
        multiply(&p, row, end - row, panels * piece / r->pieces, panels * (piece + 1) / r->pieces);
        if (r->pieces == 1 && (stage == MIXED || stage == NARROW))
            add_and_norm(r, row, end, norm);
    }
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

static void open_stage(struct pool *p, int stage)
{
    uint64_t tasks = 0;
    for (; stage < (p->run.m->layers + 1) * STAGES && !(tasks = (uint64_t)tasks_of(&p->run, stage)); stage++) {}
    atomic_store(&p->done, 0);
    atomic_store(&p->ticket, tasks ? (uint64_t)stage << 48 | tasks : 0);
    if (atomic_load(&p->asleep)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->moved);
        pthread_mutex_unlock(&p->lock);
    }
}

/* Wait until the ticket is another one, or the pool ends: first by looking, then asleep. */
static void wait_for_more(struct pool *p, uint64_t seen)
{
    for (int i = 0; i < SPINS; i++, _mm_pause())
        if (atomic_load(&p->ticket) != seen || atomic_load(&p->ended))
            return;
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->asleep, 1);
    while (atomic_load(&p->ticket) == seen && !atomic_load(&p->ended))
        pthread_cond_wait(&p->moved, &p->lock);
    atomic_fetch_sub(&p->asleep, 1);
    pthread_mutex_unlock(&p->lock);
}

/* Take tasks: a helper until the pool ends, the caller until its run does. */
static void *work(void *worker)
{
    struct pool *p = ((struct worker *)worker)->pool;
    int number = ((struct worker *)worker)->number;
    for (uint64_t ticket; ticket = atomic_load(&p->ticket), !atomic_load(&p->ended);) {
        int stage = (int)(ticket >> 48), task = (int)(ticket >> 24 & 0xffffff), tasks = (int)(ticket & 0xffffff);
        if (number == 0 && ticket == 0)
            return NULL;
        if (task == tasks)
            wait_for_more(p, ticket);
        else if (atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + (1 << 24))) {
            do_task(&p->run, stage, task, number);
            if (atomic_fetch_add(&p->done, 1) + 1 == tasks)
                open_stage(p, stage + 1);
        }
    }
    return NULL;
}

/* A pool of `threads`, the caller's among them, or fewer if the system has no more; NULL without memory. */
struct pool *embedmesh_start(int threads)
{
    struct pool *p = calloc(1, sizeof *p);
    if (!p || pthread_mutex_init(&p->lock, NULL) || pthread_cond_init(&p->moved, NULL))
        return NULL;
    for (int i = 0; i < threads && i < THREADS_MAX; i++, p->threads++) {
        p->workers[i] = (struct worker){.pool = p, .number = i};
        if (i && pthread_create(&p->workers[i].id, NULL, work, &p->workers[i]))
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
        pthread_join(p->workers[i].id, NULL);
    free(p);
}

static inline long most(long a, long b) { return a > b ? a : b; }

/* Floats of a thread's own part, for attention, and of all the space that a run needs. */
static long own_floats(const struct model *m, int longest) { return (long)COLUMNS * (m->width + longest); }

long embedmesh_floats(const struct pool *p, const struct model *m, int tokens, int longest)
{
    return tokens * (2 * m->hidden + most(m->middle, 4l * m->heads * m->width)) + own_floats(m, longest) * p->threads;
}

/* `space` begins with what words and positions give, x and y [tokens][hidden]; afterwards with the states instead of x.
   A pool has one run at a time. */
void embedmesh_run(struct pool *p, const struct model *m, const int32_t *offsets, int texts, int longest, float *space)
{
    long tokens = offsets[texts], inner = (long)m->heads * m->width, blocks = (tokens + BLOCK_ROWS - 1) / BLOCK_ROWS;
    long pieces = (PIECES * p->threads + blocks - 1) / blocks;
    if (pieces == 1) /* as many blocks for each thread */
        blocks = (blocks + p->threads - 1) / p->threads * p->threads;
    float *y = space + tokens * m->hidden, *qkv = y + tokens * m->hidden;
    p->run = (struct run){m, offsets, texts, (int)tokens, longest, (int)blocks, (int)pieces, space, y, qkv,
                          qkv + 3 * tokens * inner, qkv, /* no use of the one while the other is used */
                          qkv + tokens * most(m->middle, 4 * inner), own_floats(m, longest)};
    open_stage(p, NORM);
    work(p->workers);
}
