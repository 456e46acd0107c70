/*
 * Matrix products with packed weights, y = x W^T, on CPUs.
 *
 * One file, a plain C ABI, no headers beyond the C library's. It is compiled on first use by whatever compiler the machine
 * has, without machine flags: every instruction set gets its own functions by target attributes, and the caller picks one by
 * number (see the table at the end), so the same library runs on any machine of its architecture.
 *
 * Layout of a weight. A *panel* is LANES output rows, one per 32-bit lane of a vector register; a panel's codes are one
 * contiguous stream along the input columns. Lane r of a vector holds 4 neighbouring columns of row r in its 4 bytes, a
 * *quad*, and several quads of few bits share a byte:
 *
 *     bits   columns per block   vectors per block   quad q of the block
 *       8           4                   1            v[0]
 *       4           8                   1            v[0] >> 4q
 *       2          16                   1            v[0] >> 2q
 *       3          32                   3            low two bits in v[q / 4] >> 2(q % 4), third bit in v[2] >> q
 *
 * So no sum ever crosses lanes, scales are vectors that lie in memory as they are used, and a group of any size is a run of
 * whole blocks: what a group lacks is padded with activations that are zero. Rows beyond the last are padded with zeros.
 *
 *     y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - center - offset[n, g]) * x[m, k])
 *
 * The offset (zero point minus center) leaves the inner sum: it multiplies the group's sum of activations.
 *
 * The kernels are written once, in the second half of this file, with the vector operators that gcc and clang share; the file
 * includes itself once per instruction set, which is as near as C comes to a template.
 */
#ifndef LANES

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

/* ------------------------------------------------------------------------------------------------ the interface's types */

typedef struct {
    const uint8_t *codes;  /* panels, as above */
    const void *scales;    /* [panels][groups][LANES], float or float16 */
    const void *offsets;   /* likewise, or NULL where every zero point is the center */
    const float *table;    /* 16 values that replace code - center (NF4), or NULL */
    const uint8_t *levels; /* in place of scales and offsets (SpQR): [tiles of 16 rows][groups][16], the code of a row's scale in
                              the low nibble, that of its zero in the high one; else NULL */
    const uint16_t *grids; /* [tiles][groups][4] float16: value = (code - zero) * scale; scale and zero of the scale codes, then
                              those of the zero codes */
    const int32_t *kept;   /* input columns whose codes do not count (LLM.int8) */
    const uint16_t *apart; /* [panels][kept_count][LANES] float16: their weights */
    int64_t kept_count;
    int64_t rows, columns; /* as the layer has them, without padding */
    int64_t group;         /* columns per scale; the last group of a row may be shorter */
    int32_t bits;          /* 2, 3, 4 or 8: how a code is stored */
    int32_t center;        /* the code that means zero when there is no offset */
    int32_t halves;        /* scales and offsets are float16 */
} Weight;

/* A weight of floats of which only some are stored. */
typedef struct {
    const uint8_t *mask;   /* [rows][ceil(columns / 8)]: bit j % 8 of byte j / 8 of a row: column j is stored */
    const uint8_t *values; /* those that are, row after row */
    const int64_t *starts; /* [rows + 1]: the first value of each row */
    int64_t rows, columns;
    int32_t kind; /* of the values */
} Pruned;

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

/* How activations enter the product. */
enum { FLOATS = 0, INT8_GROUPS = 1, INT8_TOKENS = 2 };

typedef struct {
    int32_t activations; /* FLOATS: exact; INT8_GROUPS: a scale per row and group; INT8_TOKENS: a scale per row */
    int32_t threads;
    float steps; /* an activation scale is absmax / steps */
} Mode;

enum { QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, WEIGHTS };
enum { NORM_ATTENTION, NORM_MLP, NORM_QUERY, NORM_KEY, NORMS };

/*
 * A decoder block: x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), with norms by the root of the
 * mean square, rotary positions, and queries in groups that share a head of keys and values.
 */
typedef struct {
    const Weight *weights[WEIGHTS];
    const float *biases[WEIGHTS]; /* NULL where there is none */
    const float *norms[NORMS];    /* weights; those of query and key heads may be NULL */
    float epsilons[NORMS];
    float scaling;                /* of scores */
    int64_t heads, kv_heads, head_size;
} Block;

/* ------------------------------------------------------------------------------------------------------------ geometry */

INLINE int block_columns(int bits) { return bits == 3 ? 32 : 32 / bits; }
INLINE int block_vectors(int bits) { return bits == 3 ? 3 : 1; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int has_offsets(const Weight *w) { return w->offsets || w->levels; }
static int64_t groups_of(const Weight *w) { return ceil_div(w->columns, w->group); }
static int64_t blocks_of(const Weight *w, int64_t g) {
    return ceil_div(smaller(w->group, w->columns - g * w->group), block_columns(w->bits));
}
static int64_t row_blocks(const Weight *w) {
    int64_t groups = groups_of(w);
    return (groups - 1) * blocks_of(w, 0) + blocks_of(w, groups - 1);
}

/* -------------------------------------------------------------------------------------------------------------- threads */

/*
 * The OpenMP runtime of torch where the process has one: its threads stay awake after a product of torch's, on the cores that
 * others would need. Elsewhere a pool that grows to the largest number of threads asked for. Its workers spin for a moment
 * before they sleep, because the next layer of a model follows within microseconds. Whoever has not joined by the time the
 * work is taken is not waited for: on a busy machine a worker may wake late. One product at a time owns the pool; a second
 * one that comes from another thread meanwhile does its work alone.
 */
typedef void (*Work)(void *context, int64_t index);

typedef struct {
    Work work;
    void *context;
    int64_t count, run; /* indices, and how many of them a thread takes at a time */
    _Atomic int64_t next;
} Job;

static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake;
    int workers, invited, forked;
    Job *job;
    _Atomic int busy;
    _Atomic unsigned round;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#if defined(__linux__)
extern void GOMP_parallel(void (*work)(void *), void *context, unsigned threads, unsigned flags) __attribute__((weak));
#endif

/* Runs of neighbours are memory that is read on and on; several of them for each thread, because one may wake late. */
enum { SPINS = 4000, RUNS = 4 };

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_shares(void *given) {
    Job *job = given;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next, job->run)) < job->count)
        for (int64_t i = first; i < smaller(first + job->run, job->count); i++) job->work(job->context, i);
}

static void *worker(void *number) {
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.round) == seen; spin++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.round);
        int joins = (intptr_t)number < pool.invited;
        Job *job = pool.job;
        if (joins) atomic_fetch_add(&pool.busy, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!joins) continue;
        take_shares(job);
        atomic_fetch_sub(&pool.busy, 1);
    }
    return NULL;
}

/* A forked child has the memory of the pool, and of OpenMP, but not their threads. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = pool.invited = 0;
    pool.forked = 1;
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.round, 0);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Start a worker that has seen every round so far; called with the pool at rest. */
static int add_worker(void) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, worker, (void *)(intptr_t)pool.workers);
    pthread_attr_destroy(&detached);
    if (!failed) pool.workers++;
    return !failed;
}

/* Whether OpenMP's threads have done the job. */
static int done_by_openmp(Job *job, int threads) {
#if defined(__linux__)
    if (GOMP_parallel && !pool.forked) {
        GOMP_parallel(take_shares, job, (unsigned)threads, 0);
        return 1;
    }
#endif
    (void)job, (void)threads;
    return 0;
}

/* Call work(context, 0 .. count - 1), each index once, on up to `threads` threads including this one. */
static void parallel(int threads, int64_t count, Work work, void *context) {
    if (threads > count) threads = (int)count;
    Job job = {.work = work, .context = context, .count = count, .run = threads > 1 ? ceil_div(count, threads * RUNS) : count};
    if (threads > 1 && done_by_openmp(&job, threads)) return;
    if (threads < 2 || pthread_mutex_trylock(&pool.owner)) {
        take_shares(&job);
        return;
    }
    while (pool.workers < threads - 1 && add_worker()) continue;
    pthread_mutex_lock(&pool.lock);
    pool.job = &job;
    pool.invited = threads - 1;
    atomic_fetch_add(&pool.round, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_shares(&job);
    pthread_mutex_lock(&pool.lock);
    pool.invited = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; atomic_load(&pool.busy); spin++)
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.owner);
}

/* --------------------------------------------------------------------------------------------------- activations at work */

enum { CHUNK = 64, MAX_ROWS = 8, STRETCH = 256, AHEAD = 4096 };

/*
 * Up to CHUNK rows of activations, arranged for the kernels in row blocks: within a block of `n` rows, element i of row r
 * lies at [i * n + r], so that a kernel reads one stream. `quads` holds 4 int8 each, or `floats` one float each.
 */
typedef struct {
    const Weight *w;
    const Mode *mode;
    const float *x; /* [m][columns] */
    float *y;       /* [m][rows] */
    int64_t m, groups, padded;
    int32_t *quads;
    float *floats, *scales; /* scales [m][groups] of int8 activations */
    int32_t *code_sums;     /* [m][groups]: sums of int8 codes */
    float *sums;            /* [m][groups]: sums of float activations, where there are offsets */
    float *rest, *kept;     /* [m][columns]: x without the kept columns, and [m][kept_count]: what it has there */
} Product;

typedef struct {
    int64_t start;
    int rows;
} RowBlock;

/* Rows are cut into blocks of 8, 4 and 1, but of no more than `most`: the sizes that the kernels are compiled for. */
static RowBlock next_block(int64_t m, int most, RowBlock after) {
    int64_t start = after.start + after.rows, left = smaller(m - start, most);
    return (RowBlock){start, left >= 8 ? 8 : left >= 4 ? 4 : 1};
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rows of activations that meet a pruned weight, each WORD columns after WORD columns with nothing missing at the end. */
typedef struct {
    const Pruned *w;
    const float *x; /* [m][stride], zero beyond the weight's columns */
    float *y;       /* [m][rows] */
    int64_t m, stride;
} PrunedProduct;

enum { WORD = 64 }; /* columns of a mask that are read at a time */

INLINE int value_bytes(int kind) { return kind == FLOAT32 ? 4 : 2; }

static uint64_t mask_word(const Pruned *w, int64_t row, int64_t column) {
    int64_t bytes = ceil_div(w->columns, 8), at = column / 8;
    uint64_t word = 0;
    if (bytes - at >= 8)
        memcpy(&word, w->mask + row * bytes + at, 8); /* in registers, once its size is a constant */
    else
        memcpy(&word, w->mask + row * bytes + at, (size_t)(bytes - at));
    return word;
}

/* One query and the past of its sequence. */
typedef struct {
    const Block *block;
    const float *queries;       /* [heads][head_size] */
    const float *keys, *values; /* [kv_heads][length][head_size], each head `stride` after the one before */
    int64_t length, key_stride, value_stride;
    float *scores; /* [heads][length] */
    float *y;      /* [heads][head_size] */
} Attention;

/* Codes are used once: computing on some while others are on their way takes asking for them in time. */
INLINE void fetch_ahead(const uint8_t *codes, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(codes + AHEAD + at);
}

enum { TILE_ROWS = 16 }; /* rows that share a grid of the second level */

/* What `place` points to is stored here and loaded later: the registers belong to the inner loop between. */
INLINE void keep_in_memory(void *place) { __asm__ volatile("" : : "r"(place) : "memory"); }

/* Subnormal numbers included: the product by 2^112 moves the exponent's zero. */
INLINE float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    uint32_t size = rest >= 0x0f800000u ? rest | 0x7f800000u : bits_of(float_of(rest) * 0x1p112f);
    return float_of(sign | size);
}

/* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits of the mantissa. */
INLINE int32_t rounded(float value) { return (int32_t)(bits_of(value + 12582912.0f) - 0x4B400000u); }

/* ------------------------------------------------------------------------------------------------------------ instances */

#define JOIN(name, suffix) name##_##suffix
#define EXPAND(name, suffix) JOIN(name, suffix)
#define ISA(name) EXPAND(name, SUFFIX)

#define SUFFIX portable
#define LANES 4
#define TILE 1
#define TARGET
#include "lmpress_cpu.c"

#if defined(__x86_64__)
#define SUFFIX avx2
#define LANES 8
#define TILE 8
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#include "lmpress_cpu.c"

#define SUFFIX avx512
#define LANES 16
#define TILE 8
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512vnni")))
#include "lmpress_cpu.c"
#endif

#if defined(__aarch64__)
#define SUFFIX neon
#define LANES 4
#define TILE 8
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define DOT_PRODUCTS
#include "lmpress_cpu.c"
#endif

/* ------------------------------------------------------------------------------------------------------- the instruction sets */

static int always(void) { return 1; }

#if defined(__x86_64__)
/* Every processor with AVX2 converts float16 and counts bits. */
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
static int has_dot_products(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every Apple processor that runs 64-bit macOS */
#endif
}
#endif

typedef struct {
    const char *name;
    int lanes, most;
    int (*supported)(void);
    void (*arrange)(Product *, RowBlock);
    void (*multiply)(const Product *, int64_t panel, RowBlock);
    void (*dequantize)(const Weight *, int64_t panel, float *out, int64_t stride);
    void (*multiply_pruned)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*multiply_whole)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*unfold)(const Pruned *, int64_t row, float *out);
    void (*norm)(const float *x, const float *weight, float epsilon, int64_t count, float *y);
    void (*attend)(const Attention *, int64_t head);
    void (*gate)(const float *gates, float *y, int64_t count);
} InstructionSet;

static const InstructionSet SETS[] = {
#if defined(__x86_64__)
    {"avx512-vnni", 16, 8, has_avx512, arrange_avx512, multiply_avx512, dequantize_avx512, multiply_pruned_avx512,
     multiply_whole_avx512, unfold_avx512, norm_avx512, attend_avx512, gate_avx512},
    {"avx2", 8, 8, has_avx2, arrange_avx2, multiply_avx2, dequantize_avx2, multiply_pruned_avx2,
     multiply_whole_avx2, unfold_avx2, norm_avx2, attend_avx2, gate_avx2},
#elif defined(__aarch64__)
    {"neon-dotprod", 4, 8, has_dot_products, arrange_neon, multiply_neon, dequantize_neon, multiply_pruned_neon,
     multiply_whole_neon, unfold_neon, norm_neon, attend_neon, gate_neon},
#endif
    {"portable", 4, 1, always, arrange_portable, multiply_portable, dequantize_portable, multiply_pruned_portable,
     multiply_whole_portable, unfold_portable, norm_portable, attend_portable, gate_portable},
};

enum { SET_COUNT = sizeof SETS / sizeof *SETS };

/* ----------------------------------------------------------------------------------------------------- the exported calls */

/* Name of instruction set `index`, best first, or NULL past the last one; `lanes` is 0 where this machine lacks it. */
const char *lmpress_set(int index, int *lanes) {
    if (index < 0 || index >= SET_COUNT) return NULL;
    *lanes = SETS[index].supported() ? SETS[index].lanes : 0;
    return SETS[index].name;
}

enum { MOST_WEIGHTS = 3 }; /* that one input meets: queries, keys and values */

typedef struct {
    const InstructionSet *set;
    Product products[MOST_WEIGHTS]; /* alike but for their weights and outputs */
    int64_t panels[MOST_WEIGHTS];
    int count;
} Running;

/* Kept columns go another way: in `rest` they are zero, so that they widen no scale. */
static void set_apart(Product *p) {
    const Weight *w = p->w;
    memcpy(p->rest, p->x, (size_t)(p->m * w->columns) * sizeof(float));
    for (int64_t r = 0; r < p->m; r++)
        for (int64_t j = 0; j < w->kept_count; j++) {
            float *place = p->rest + r * w->columns + w->kept[j];
            p->kept[r * w->kept_count + j] = *place;
            *place = 0;
        }
}

static void arrange_share(void *context, int64_t index) {
    Running *run = context;
    RowBlock block = {0, 0};
    for (int64_t i = 0; i <= index; i++) block = next_block(run->products[0].m, run->set->most, block);
    run->set->arrange(&run->products[0], block);
}

static void multiply_share(void *context, int64_t panel) {
    const Running *run = context;
    int64_t m = run->products[0].m;
    int most = run->set->most, i = 0;
    for (; panel >= run->panels[i]; i++) panel -= run->panels[i];
    for (RowBlock b = next_block(m, most, (RowBlock){0, 0}); b.start < m; b = next_block(m, most, b))
        run->set->multiply(&run->products[i], panel, b);
}

static void *cut(char **arena, int64_t bytes) {
    void *piece = *arena;
    *arena += ceil_div(bytes, 64) * 64;
    return piece;
}

/* Whether activations are arranged for `a` as for `b`. */
static int alike(const Weight *a, const Weight *b) {
    return a->columns == b->columns && a->group == b->group && a->bits == b->bits && has_offsets(a) == has_offsets(b) &&
           !a->kept_count && !b->kept_count;
}

/* y[i][m][rows] = x[m][columns] W[i]^T for up to MOST_WEIGHTS weights that are alike. Returns 0, or -1 without memory. */
static int multiply_alike(const InstructionSet *set, const Weight *const *weights, int count, const Mode *mode, const float *x,
                          int64_t m, float *const *y) {
    const Weight *w = weights[0];
    int64_t groups = groups_of(w), padded = row_blocks(w) * block_columns(w->bits);
    int64_t rows = smaller(m, CHUNK), values = mode->activations == FLOATS ? 4 : 1;
    int64_t apart = w->kept_count ? w->columns + w->kept_count : 0;
    char *memory = malloc((size_t)(rows * (padded * values + (3 * groups + apart) * 4) + 6 * 64 + 64));
    if (!memory) return -1;
    char *arena = memory + (-(uintptr_t)memory & 63);
    Product p = {w, mode, x, NULL, 0, groups, padded, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    p.quads = cut(&arena, rows * padded * values);
    p.floats = (float *)p.quads;
    p.scales = cut(&arena, rows * groups * 4);
    p.code_sums = cut(&arena, rows * groups * 4);
    p.sums = cut(&arena, rows * groups * 4);
    if (apart) {
        p.rest = cut(&arena, rows * w->columns * 4);
        p.kept = cut(&arena, rows * w->kept_count * 4);
    }
    Running run = {.set = set, .count = count};
    int64_t panels = 0, outputs = 0;
    for (int i = 0; i < count; i++) {
        outputs += weights[i]->rows;
        panels += run.panels[i] = ceil_div(weights[i]->rows, set->lanes);
    }
    /* A product of a few microseconds is over before a second thread has woken. */
    int threads = (double)outputs * (double)w->columns * (double)m < 1 << 18 ? 1 : mode->threads;
    for (int64_t done = 0; done < m; done += p.m, p.x += p.m * w->columns) {
        p.m = smaller(CHUNK, m - done);
        if (apart) set_apart(&p);
        for (int i = 0; i < count; i++) {
            run.products[i] = p;
            run.products[i].w = weights[i];
            run.products[i].y = y[i] + done * weights[i]->rows;
        }
        int64_t blocks = 0;
        for (RowBlock b = next_block(p.m, set->most, (RowBlock){0, 0}); b.start < p.m; b = next_block(p.m, set->most, b)) blocks++;
        parallel(threads, blocks, arrange_share, &run);
        parallel(threads, panels, multiply_share, &run);
    }
    free(memory);
    return 0;
}

/* y[m][rows] = x[m][columns] W^T. Returns 0, or -1 where there is no memory for the arranged activations. */
int lmpress_linear(int index, const Weight *w, const Mode *mode, const float *x, int64_t m, float *y) {
    return multiply_alike(&SETS[index], &w, 1, mode, x, m, &y);
}

typedef struct {
    const InstructionSet *set;
    const Weight *w;
    int64_t first;
    float *out;
    int64_t stride;
} Unpacking;

static void dequantize_share(void *context, int64_t i) {
    const Unpacking *u = context;
    u->set->dequantize(u->w, u->first + i, u->out + i * u->set->lanes, u->stride);
}

/* The panels first .. first + count - 1 as floats, transposed: out[columns][stride], row r of the slab in column r. */
void lmpress_dequantize(int index, const Weight *w, int threads, int64_t first, int64_t count, float *out, int64_t stride) {
    Unpacking unpacking = {&SETS[index], w, first, out, stride};
    parallel(threads, count, dequantize_share, &unpacking);
}

typedef struct {
    const InstructionSet *set;
    PrunedProduct product;
} RunningPruned;

enum { PRUNED_ROWS = 16 }; /* of the weight, that a thread takes at a time */

static void pruned_share(void *context, int64_t share) {
    const RunningPruned *run = context;
    const PrunedProduct *p = &run->product;
    int64_t first = share * PRUNED_ROWS, last = smaller(p->w->rows, first + PRUNED_ROWS);
    int most = run->set->most, whole = p->w->starts[last] - p->w->starts[first] == (last - first) * p->w->columns;
    for (RowBlock b = next_block(p->m, most, (RowBlock){0, 0}); b.start < p->m; b = next_block(p->m, most, b))
        (whole ? run->set->multiply_whole : run->set->multiply_pruned)(p, first, last, b);
}

/* y[m][rows] = x[m][columns] W^T for a pruned W. Returns 0, or -1 where there is no memory for padded rows of x. */
int lmpress_pruned_linear(int index, const Pruned *w, int threads, const float *x, int64_t m, float *y) {
    int64_t stride = ceil_div(w->columns, WORD) * WORD;
    float *padded = NULL;
    if (stride != w->columns) {
        padded = calloc((size_t)(m * stride), sizeof(float));
        if (!padded) return -1;
        for (int64_t r = 0; r < m; r++) memcpy(padded + r * stride, x + r * w->columns, (size_t)w->columns * sizeof(float));
    }
    RunningPruned run = {&SETS[index], {w, padded ? padded : x, y, m, stride}};
    int helpers = (double)w->starts[w->rows] * (double)m < 1 << 17 ? 1 : threads;
    parallel(helpers, ceil_div(w->rows, PRUNED_ROWS), pruned_share, &run);
    free(padded);
    return 0;
}

typedef struct {
    const InstructionSet *set;
    const Pruned *w;
    int64_t first;
    float *out;
} Unfolding;

static void unfold_share(void *context, int64_t i) {
    const Unfolding *u = context;
    u->set->unfold(u->w, u->first + i, u->out + i * u->w->columns);
}

/* The rows first .. first + count - 1 of a pruned weight as floats: out[count][columns]. */
void lmpress_unfold(int index, const Pruned *w, int threads, int64_t first, int64_t count, float *out) {
    Unfolding unfolding = {&SETS[index], w, first, out};
    parallel(threads, count, unfold_share, &unfolding);
}

/* y[i] = x W[first + i]^T + its bias for the row x: together where they are alike. */
static int block_linears(const InstructionSet *set, const Block *b, const Mode *mode, int first, int count, const float *x,
                         float *const *y) {
    const Weight *const *w = b->weights + first;
    int together = 1, failed = 0;
    for (int i = 1; i < count; i++) together &= alike(w[0], w[i]);
    if (together) failed = multiply_alike(set, w, count, mode, x, 1, y);
    for (int i = 0; i < count && !together && !failed; i++) failed = multiply_alike(set, w + i, 1, mode, x, 1, y + i);
    for (int i = 0; i < count && !failed; i++)
        for (int64_t n = 0; b->biases[first + i] && n < w[i]->rows; n++) y[i][n] += b->biases[first + i][n];
    return failed;
}

/* Heads, normed where they have a norm, at the position whose angles have these cosines and sines: pairs lie half a head apart. */
static void place_heads(const InstructionSet *set, const Block *b, int norm, const float *cosines, const float *sines, int64_t heads,
                        float *x) {
    int64_t half = b->head_size / 2;
    for (; heads > 0; heads--, x += b->head_size) {
        if (b->norms[norm]) set->norm(x, b->norms[norm], b->epsilons[norm], b->head_size, x);
        for (int64_t i = 0; i < half; i++) {
            float low = x[i], high = x[half + i];
            x[i] = low * cosines[i] - high * sines[i];
            x[half + i] = high * cosines[half + i] + low * sines[half + i];
        }
    }
}

/* The first half of a block for one token x[columns]: its queries, keys and values, [heads][head_size] each. 0, or -1. */
int lmpress_block_project(int index, const Block *b, const Mode *mode, const float *x, const float *cosines, const float *sines,
                          float *queries, float *keys, float *values) {
    const InstructionSet *set = &SETS[index];
    int64_t columns = b->weights[QUERY]->columns;
    float *normed = malloc((size_t)columns * sizeof(float));
    if (!normed) return -1;
    set->norm(x, b->norms[NORM_ATTENTION], b->epsilons[NORM_ATTENTION], columns, normed);
    int failed = block_linears(set, b, mode, QUERY, 3, normed, (float *[]){queries, keys, values});
    free(normed);
    place_heads(set, b, NORM_QUERY, cosines, sines, b->heads, queries);
    place_heads(set, b, NORM_KEY, cosines, sines, b->kv_heads, keys);
    return failed;
}

typedef struct {
    const InstructionSet *set;
    Attention attention;
} Attending;

static void attend_share(void *context, int64_t head) {
    const Attending *a = context;
    a->set->attend(&a->attention, head);
}

/*
 * The second half: y[columns] = the block's output for the token x, whose queries meet `length` keys and values: [kv_heads] of
 * them, a stride apart, each [length][head_size]. Returns 0, or -1.
 */
int lmpress_block_answer(int index, const Block *b, const Mode *mode, const float *x, const float *queries, const float *keys,
                         int64_t key_stride, const float *values, int64_t value_stride, int64_t length, float *y) {
    const InstructionSet *set = &SETS[index];
    int64_t columns = b->weights[QUERY]->columns, width = b->weights[GATE]->rows, attended = b->heads * b->head_size;
    float *memory = malloc((size_t)(2 * columns + 2 * width + attended + b->heads * length) * sizeof(float));
    if (!memory) return -1;
    float *normed = memory, *change = normed + columns, *gates = change + columns, *inner = gates + width, *heads = inner + width;
    Attending run = {set, {b, queries, keys, values, length, key_stride, value_stride, heads + attended, heads}};
    parallel((double)attended * (double)length < 1 << 16 ? 1 : mode->threads, b->heads, attend_share, &run);
    int failed = block_linears(set, b, mode, OUT, 1, heads, &change);
    for (int64_t i = 0; i < columns; i++) y[i] = x[i] + change[i];
    set->norm(y, b->norms[NORM_MLP], b->epsilons[NORM_MLP], columns, normed);
    failed = failed || block_linears(set, b, mode, GATE, 2, normed, (float *[]){gates, inner});
    set->gate(gates, inner, width);
    failed = failed || block_linears(set, b, mode, DOWN, 1, inner, &change);
    for (int64_t i = 0; i < columns; i++) y[i] += change[i];
    free(memory);
    return failed;
}

typedef float Four __attribute__((vector_size(16)));

typedef struct Sparse {
    const int64_t *starts;
    const void *columns;    /* uint16, or uint32 where they are `wide` */
    const uint16_t *values; /* float16 */
    const float *x;         /* [m][width], or [width][8] for up to 8 rows side by side */
    float *y;
    int64_t m, rows, width;
    int wide;
    float (*dot)(const struct Sparse *, int64_t start, int64_t end);
} Sparse;

enum { SPARSE_ROWS = 64, SPARSE_AHEAD = 256 };

INLINE int64_t sparse_column(const Sparse *s, int64_t i) {
    return s->wide ? ((const uint32_t *)s->columns)[i] : ((const uint16_t *)s->columns)[i];
}

/* Four sums at a time: their loads are independent, and waiting for loads is all that this loop does. */
static float sparse_dot(const Sparse *s, int64_t i, int64_t end) {
    float sum[4] = {0};
    for (; i + 4 <= end; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += from_half(s->values[i + j]) * s->x[sparse_column(s, i + j)];
    for (; i < end; i++) sum[0] += from_half(s->values[i]) * s->x[sparse_column(s, i)];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

#if defined(__x86_64__)
/* Eight entries at a time. */
__attribute__((target("avx2,fma,f16c"))) static float sparse_dot_avx2(const Sparse *s, int64_t i, int64_t end) {
    __m256 sum = _mm256_setzero_ps();
    for (; i + 8 <= end; i += 8) {
        __builtin_prefetch(s->values + i + SPARSE_AHEAD);
        __m256i columns;
        if (s->wide)
            columns = _mm256_loadu_si256((const __m256i *)((const uint32_t *)s->columns + i));
        else
            columns = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)s->columns + i)));
        __m256 values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s->values + i)));
        sum = _mm256_fmadd_ps(values, _mm256_i32gather_ps(s->x, columns, 4), sum);
    }
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) + sparse_dot(s, i, end);
}
#endif

/* The same for 8 rows side by side: entries with even and with odd numbers add up apart, for the same reason. */
INLINE void sparse_dots(const Sparse *s, int64_t i, int64_t end, float *sums) {
    Four sum[4] = {{0}};
    for (; i < end; i += 2)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (i + j / 2 >= end) break;
            Four x;
            memcpy(&x, s->x + 8 * sparse_column(s, i + j / 2) + 4 * (j % 2), sizeof x);
            sum[j] += from_half(s->values[i + j / 2]) * x;
        }
    sum[0] += sum[2];
    sum[1] += sum[3];
    memcpy(sums, sum, 2 * sizeof(Four));
}

static void sparse_share(void *context, int64_t share) {
    const Sparse *s = context;
    int64_t last = smaller(s->rows, (share + 1) * SPARSE_ROWS);
    for (int64_t row = share * SPARSE_ROWS; row < last; row++) {
        if (s->m == 1) {
            s->y[row] += s->dot(s, s->starts[row], s->starts[row + 1]);
            continue;
        }
        float sums[8];
        sparse_dots(s, s->starts[row], s->starts[row + 1], sums);
        for (int64_t r = 0; r < s->m; r++) s->y[r * s->rows + row] += sums[r];
    }
}

/* y[m][rows] += x[m][width] S^T for S in compressed rows: starts[rows + 1], columns (uint32 where they are `wide`, else uint16)
 * and float16 values of its entries. Returns 0, or -1 where there is no memory to put the rows of x side by side. */
int lmpress_add_sparse(int threads, const int64_t *starts, const void *columns, int wide, const uint16_t *values, int64_t rows,
                       int64_t width, const float *x, int64_t m, float *y) {
    float (*dot)(const Sparse *, int64_t, int64_t) = sparse_dot;
#if defined(__x86_64__)
    if (has_avx2()) dot = sparse_dot_avx2; /* it has F16C too */
#endif
    float *side_by_side = m > 1 ? malloc((size_t)width * 8 * sizeof(float)) : NULL;
    if (m > 1 && !side_by_side) return -1;
    for (int64_t done = 0; done < m; done += 8, x += 8 * width, y += 8 * rows) {
        Sparse sparse = {starts, columns, values, x, y, smaller(8, m - done), rows, width, wide, dot};
        if (sparse.m > 1) {
            sparse.x = side_by_side;
            for (int64_t k = 0; k < width; k++)
                for (int64_t r = 0; r < 8; r++) side_by_side[8 * k + r] = r < sparse.m ? x[r * width + k] : 0;
        }
        int helpers = (double)starts[rows] * (double)sparse.m < 1 << 16 ? 1 : threads;
        parallel(helpers, ceil_div(rows, SPARSE_ROWS), sparse_share, &sparse);
    }
    free(side_by_side);
    return 0;
}

#else /* ------------------------------------------------------------------------- one instruction set, LANES rows at a time */

typedef int32_t ISA(Ints) __attribute__((vector_size(4 * LANES)));
typedef uint32_t ISA(Words) __attribute__((vector_size(4 * LANES)));
typedef float ISA(Floats) __attribute__((vector_size(4 * LANES)));
#define Ints ISA(Ints)
#define Words ISA(Words)
#define Floats ISA(Floats)

/* What the vector operators cannot say: dot products of bytes, a table of 16 floats. */

#if defined(__x86_64__) && LANES == 16

enum { ISA(WHOLE_BYTES) = 1, ISA(CHEAP_TABLE) = 1 };

/* Four products of an unsigned and a signed byte per lane, added to the lane. */
TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return sum; }
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

#elif defined(__x86_64__) && LANES == 8

enum { ISA(WHOLE_BYTES) = 0, ISA(CHEAP_TABLE) = 0 };

/* Sums of 16 bits: the instruction saturates, but 8 steps of 2 * 15 * 128 = 3840 stay below 2^15. */
TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
    sum = (Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
    __asm__("" : "+x"(sum)); /* or compilers add up in a tree, whose leaves do not fit the registers */
    return sum;
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
/* Two tables of 8, chosen by the index's fourth bit in the sign. */
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}

#else

enum { ISA(WHOLE_BYTES) = 0, ISA(CHEAP_TABLE) = 0 };

TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
#ifdef DOT_PRODUCTS
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
#else
    for (int byte = 0; byte < 4; byte++) /* codes are at most 15, so that each product fits its 32-bit lane */
        sum += (Ints)((codes >> (8 * byte)) & 0xff) * ((Ints)(x << (24 - 8 * byte)) >> 24);
    return sum;
#endif
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return sum; }
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    return (Floats){table[index[0] & 15], table[index[1] & 15], table[index[2] & 15], table[index[3] & 15]};
}

#endif

/* A table of 16 floats as the kernels hold it, and the four columns of a quad (each byte below 16) by it. */
#if defined(__x86_64__) && LANES == 8

/* Bytes are looked up 32 at a time: one table for each byte of a float, whose results are joined again. */
typedef struct {
    __m256i bytes[4];
} ISA(Table);

TARGET INLINE ISA(Table) ISA(table_from)(const float *values) {
    uint8_t bytes[4][32];
    for (int at = 0; at < 64; at++)
        for (int half = 0; half < 32; half += 16) bytes[at % 4][half + at / 4] = (uint8_t)(bits_of(values[at / 4]) >> (8 * (at % 4)));
    ISA(Table) table;
    memcpy(table.bytes, bytes, sizeof bytes);
    return table;
}

TARGET INLINE void ISA(lookup_quad)(Floats *columns, const ISA(Table) * table, Words quad) {
    const __m256i rows_together = _mm256_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0, 15, 11, 7, 3, 14, 10, 6, 2,
                                                  13, 9, 5, 1, 12, 8, 4, 0);
    __m256i index = _mm256_shuffle_epi8((__m256i)quad, rows_together);
    __m256i first = _mm256_shuffle_epi8(table->bytes[0], index), second = _mm256_shuffle_epi8(table->bytes[1], index);
    __m256i third = _mm256_shuffle_epi8(table->bytes[2], index), fourth = _mm256_shuffle_epi8(table->bytes[3], index);
    __m256i low = _mm256_unpacklo_epi8(first, second), low_above = _mm256_unpacklo_epi8(third, fourth);
    __m256i high = _mm256_unpackhi_epi8(first, second), high_above = _mm256_unpackhi_epi8(third, fourth);
    columns[0] = (Floats)_mm256_unpacklo_epi16(low, low_above);
    columns[1] = (Floats)_mm256_unpackhi_epi16(low, low_above);
    columns[2] = (Floats)_mm256_unpacklo_epi16(high, high_above);
    columns[3] = (Floats)_mm256_unpackhi_epi16(high, high_above);
}

#else

typedef struct {
    const float *values;
} ISA(Table);

TARGET INLINE ISA(Table) ISA(table_from)(const float *values) { return (ISA(Table)){values}; }

TARGET INLINE void ISA(lookup_quad)(Floats *columns, const ISA(Table) * table, Words quad) {
    for (int j = 0; j < 4; j++) columns[j] = ISA(lookup)(table->values, quad >> (8 * j));
}

#endif

TARGET INLINE Words ISA(load_words)(const uint8_t *from) {
    Words words;
    memcpy(&words, from, sizeof words);
    return words;
}
TARGET INLINE Floats ISA(load_floats)(const float *from) {
    Floats floats;
    memcpy(&floats, from, sizeof floats);
    return floats;
}
TARGET INLINE Floats ISA(all)(float value) { return value - (Floats){0}; }

/* LANES bytes, each in a lane of its own, and four float16 as floats. */
#if defined(__x86_64__) && LANES >= 8
TARGET INLINE Words ISA(from_bytes)(const uint8_t *from) {
#if LANES == 16
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#endif
}
TARGET INLINE void ISA(from_halves)(const uint16_t *from, float *four) {
    _mm_storeu_ps(four, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)from)));
}
#else
TARGET INLINE Words ISA(from_bytes)(const uint8_t *from) { return (Words){from[0], from[1], from[2], from[3]}; }
TARGET INLINE void ISA(from_halves)(const uint16_t *from, float *four) {
    for (int i = 0; i < 4; i++) four[i] = from_half(from[i]);
}
#endif

/* LANES float16 as floats. */
TARGET INLINE Floats ISA(load_halves)(const uint16_t *from) {
#if defined(__x86_64__) && LANES == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__x86_64__) && LANES == 8
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(DOT_PRODUCTS)
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    Floats floats;
    for (int r = 0; r < LANES; r++) floats[r] = from_half(from[r]);
    return floats;
#endif
}

TARGET INLINE Floats ISA(load_either)(const void *from, int64_t at, int halves) {
    return halves ? ISA(load_halves)((const uint16_t *)from + at) : ISA(load_floats)((const float *)from + at);
}

/* The scales of a panel's rows in group `g`, and their offsets: zeros minus center. */
TARGET INLINE Floats ISA(scale_of)(const Weight *w, int64_t panel, int64_t groups, int64_t g, Floats *offset) {
    int64_t at = panel * groups + g;
    *offset = (Floats){0};
    if (!w->levels) {
        if (w->offsets) *offset = ISA(load_either)(w->offsets, at * LANES, w->halves);
        return ISA(load_either)(w->scales, at * LANES, w->halves);
    }
    int64_t tile = panel * LANES / TILE_ROWS * groups + g;
    Words levels = ISA(from_bytes)(w->levels + tile * TILE_ROWS + panel * LANES % TILE_ROWS);
    float grid[4];
    ISA(from_halves)(w->grids + 4 * tile, grid);
    *offset = (__builtin_convertvector((Ints)(levels >> 4), Floats) - grid[3]) * grid[2] - (float)w->center;
    return (__builtin_convertvector((Ints)(levels & 15), Floats) - grid[1]) * grid[0];
}

/* Quad `q` of a block: 4 codes in the 4 bytes of every lane. */
TARGET INLINE Words ISA(quad)(const uint8_t *block, int q, int bits) {
    switch (bits) {
    case 8:
        return ISA(load_words)(block);
    case 4:
        return (ISA(load_words)(block) >> (4 * q)) & 0x0f0f0f0f;
    case 2:
        return (ISA(load_words)(block) >> (2 * q)) & 0x03030303;
    default: {
        Words low = ISA(load_words)(block + q / 4 * 4 * LANES), high = ISA(load_words)(block + 8 * LANES);
        Words third = q < 2 ? high << (2 - q) : high >> (q - 2);
        return ((low >> (2 * (q % 4))) & 0x03030303) | (third & 0x04040404);
    }
    }
}

/* ------------------------------------------------------------------------------------------------ int8 activations */

/*
 * Integer sums of at most 8 quads, added to `sums`: the stretch that 16-bit sums survive. Where instructions cannot take
 * whole bytes, a byte is two nibbles, and its product is that of the low one plus 16 times that of the high one.
 */
TARGET INLINE void ISA(dot_blocks)(Ints *sums, const uint8_t *codes, const int32_t *x, int blocks, int bits, int rows) {
    int quads = block_columns(bits) / 4, block_bytes = block_vectors(bits) * 4 * LANES;
    int nibbles = bits == 8 && !ISA(WHOLE_BYTES);
    fetch_ahead(codes, blocks * block_bytes);
#pragma GCC unroll 2
    for (int part = 0; part <= nibbles; part++) {
        Ints run[MAX_ROWS] = {{0}};
#pragma GCC unroll 8
        for (int b = 0; b < blocks; b++)
#pragma GCC unroll 8
            for (int q = 0; q < quads; q++) {
                Words w = ISA(quad)(codes + b * block_bytes, q, bits);
                if (nibbles) w = (w >> (4 * part)) & 0x0f0f0f0f;
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    run[r] = ISA(dot)(run[r], w, (Words){0} + (uint32_t)x[(b * quads + q) * rows + r]);
            }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sums[r] += ISA(widen)(run[r]) * (1 << (4 * part));
        if (nibbles) keep_in_memory(sums);
    }
}

TARGET INLINE void ISA(int8_panel)(const Product *p, int64_t panel, int64_t start, int bits, int rows, Floats *y) {
    const Weight *w = p->w;
    int block_bytes = block_vectors(bits) * 4 * LANES, block_quads = block_columns(bits) / 4;
    int run = 8 / block_quads; /* blocks of 8 quads together */
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_bytes;
    const int32_t *x = p->quads + start * p->padded / 4;
    for (int64_t g = 0; g < p->groups; g++) {
        Ints sums[MAX_ROWS] = {{0}};
        int64_t blocks = blocks_of(w, g);
        for (; blocks >= run; blocks -= run, codes += run * block_bytes, x += run * block_quads * rows)
            ISA(dot_blocks)(sums, codes, x, run, bits, rows);
        for (; blocks > 0; blocks--, codes += block_bytes, x += block_quads * rows)
            ISA(dot_blocks)(sums, codes, x, 1, bits, rows);
        Floats offset, scale = ISA(scale_of)(w, panel, p->groups, g, &offset);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int64_t at = start * p->groups + g * rows + r;
            /* The center leaves in integers: in floats, what remains of two large sums would be their rounding. */
            Floats value = __builtin_convertvector(sums[r] - w->center * p->code_sums[at], Floats);
            if (has_offsets(w)) value -= offset * (float)p->code_sums[at];
            y[r] += value * (scale * p->scales[at]);
        }
        keep_in_memory(y);
    }
}

/* int8 codes of `count` activations under `scale`, as quads `stride` apart, zero beyond; returns the sum of the codes. */
TARGET static int32_t ISA(quantize)(const float *x, int64_t count, float scale, int32_t *quads, int stride) {
    int32_t sum = 0;
    for (int64_t start = 0; start < count; start += STRETCH) {
        int8_t codes[STRETCH] = {0};
        int n = (int)smaller(STRETCH, count - start);
        for (int k = 0; k < n; k++) {
            int32_t code = rounded(x[start + k] / scale);
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            codes[k] = (int8_t)code;
            sum += code;
        }
        for (int q = 0; q < (n + 3) / 4; q++) memcpy(quads + (start / 4 + q) * stride, codes + 4 * q, 4);
    }
    return sum;
}

/* Without their sign, floats are ordered as integers are; NaN is the largest, so that it is not lost. */
TARGET static float ISA(absmax)(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t size = (int32_t)(bits_of(x[k]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    return float_of((uint32_t)most);
}

TARGET static void ISA(arrange_int8)(Product *p, RowBlock block, int r) {
    const Weight *w = p->w;
    const float *x = (p->rest ? p->rest : p->x) + (block.start + r) * w->columns;
    int32_t *quads = p->quads + block.start * p->padded / 4 + r;
    int64_t block_quads = block_columns(w->bits) / 4;
    float largest = p->mode->activations == INT8_TOKENS ? ISA(absmax)(x, w->columns) : 0;
    for (int64_t g = 0; g < p->groups; g++, x += w->group) {
        int64_t count = smaller(w->group, w->columns - g * w->group), at = block.start * p->groups + g * block.rows + r;
        if (p->mode->activations == INT8_GROUPS) largest = ISA(absmax)(x, count);
        p->scales[at] = largest != 0 ? largest / p->mode->steps : 1;
        int64_t room = blocks_of(w, g) * block_quads;
        for (int64_t q = count / 4; q < room; q++) quads[q * block.rows] = 0;
        p->code_sums[at] = ISA(quantize)(x, count, p->scales[at], quads, block.rows);
        quads += room * block.rows;
    }
}

/* ----------------------------------------------------------------------------------------------- float activations */

/* Column `j` of quad `q` as numbers: what the table says, or code - center. */
TARGET INLINE Floats ISA(decode)(const uint8_t *block, int q, int j, int bits, int lookup, const float *table, float center) {
    if (lookup) {
        /* The lookup reads 4 bits of an index; what is above them need not be cleared. */
        Words quad = bits == 4 ? ISA(load_words)(block) >> (4 * q) : ISA(quad)(block, q, bits);
        return ISA(lookup)(table, quad >> (8 * j));
    }
    return __builtin_convertvector((Ints)((ISA(quad)(block, q, bits) >> (8 * j)) & 0xff), Floats) - center;
}

TARGET INLINE void ISA(float_block)(Floats *sums, const uint8_t *codes, const float *x, int bits, int rows, int lookup,
                                    const ISA(Table) * table, float center) {
    fetch_ahead(codes, block_vectors(bits) * 4 * LANES);
    int ways = rows == 1 ? 4 : 1; /* one row has but one sum per lane: four of them hide the latency of the additions */
#pragma GCC unroll 8
    for (int q = 0; q < block_columns(bits) / 4; q++) {
        Floats w[4];
        if (lookup) ISA(lookup_quad)(w, table, ISA(quad)(codes, q, bits));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (!lookup) w[j] = ISA(decode)(codes, q, j, bits, 0, NULL, center);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) sums[r + j % ways] += w[j] * x[(4 * q + j) * rows + r];
        }
    }
}

TARGET INLINE void ISA(float_panel)(const Product *p, int64_t panel, int64_t start, int bits, int rows, int lookup,
                                    const float *values, Floats *y) {
    const Weight *w = p->w;
    ISA(Table) table = ISA(table_from)(values);
    int block_bytes = block_vectors(bits) * 4 * LANES;
    float center = (float)w->center;
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_bytes;
    const float *x = p->floats + start * p->padded;
    for (int64_t g = 0; g < p->groups; g++) {
        Floats offset, scale = ISA(scale_of)(w, panel, p->groups, g, &offset);
        /* Long groups add up in stretches, so that the error of a sum does not grow with the width of the layer. */
        for (int64_t left = blocks_of(w, g); left > 0;) {
            int64_t blocks = smaller(left, STRETCH / block_columns(bits));
            Floats sums[MAX_ROWS] = {{0}};
            left -= blocks;
            for (; blocks > 0; blocks--, codes += block_bytes, x += block_columns(bits) * rows)
                ISA(float_block)(sums, codes, x, bits, rows, lookup, &table, center);
            if (rows == 1) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) y[r] += scale * sums[r];
            keep_in_memory(y);
        }
        if (has_offsets(w)) {
            Floats shift = scale * offset;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) y[r] -= shift * p->sums[start * p->groups + g * rows + r];
        }
    }
}

TARGET static void ISA(arrange_floats)(Product *p, RowBlock block, int r) {
    const Weight *w = p->w;
    const float *x = (p->rest ? p->rest : p->x) + (block.start + r) * w->columns;
    float *floats = p->floats + block.start * p->padded + r;
    for (int64_t g = 0; g < p->groups; g++, x += w->group) {
        int64_t count = smaller(w->group, w->columns - g * w->group), room = blocks_of(w, g) * block_columns(w->bits);
        for (int64_t k = 0; k < count; k++) floats[k * block.rows] = x[k];
        for (int64_t k = count; k < room; k++) floats[k * block.rows] = 0;
        floats += room * block.rows;
        if (has_offsets(w)) {
            double sum = 0;
            for (int64_t k = 0; k < count; k++) sum += x[k];
            p->sums[block.start * p->groups + g * block.rows + r] = (float)sum;
        }
    }
}

/* ------------------------------------------------------------------------------------------ what the outside calls */

TARGET static void ISA(arrange)(Product *p, RowBlock block) {
    for (int r = 0; r < block.rows; r++)
        if (p->mode->activations == FLOATS)
            ISA(arrange_floats)(p, block, r);
        else
            ISA(arrange_int8)(p, block, r);
}

/* What the kept columns add to a panel. */
TARGET INLINE void ISA(add_kept)(const Product *p, int64_t panel, int64_t start, int rows, Floats *y) {
    int64_t count = p->w->kept_count;
    const uint16_t *apart = p->w->apart + panel * count * LANES;
    const float *x = p->kept + start * count;
    for (int64_t j = 0; j < count; j++, apart += LANES) {
        Floats weight = ISA(load_halves)(apart);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) y[r] += weight * x[r * count + j];
    }
}

/* The table of a uniform grid, for machines where looking up is cheaper than converting. */
TARGET INLINE const float *ISA(table_of)(const Weight *w, float *uniform) {
    for (int code = 0; code < 16; code++) uniform[code] = (float)(code - w->center);
    return w->table ? w->table : uniform;
}

/* From here on `bits` and `rows` are constants: each call below becomes code of its own. */
TARGET INLINE void ISA(panel_of_rows)(const Product *p, int64_t panel, int64_t start, int bits, int rows) {
    Floats y[MAX_ROWS] = {{0}};
    float uniform[16];
    const float *table = ISA(table_of)(p->w, uniform);
    if (p->mode->activations != FLOATS)
        ISA(int8_panel)(p, panel, start, bits, rows, y);
    else if (bits < 8 && ISA(CHEAP_TABLE))
        ISA(float_panel)(p, panel, start, bits, rows, 1, table, y);
    else if (bits == 4 && p->w->table)
        ISA(float_panel)(p, panel, start, bits, rows, 1, table, y);
    else
        ISA(float_panel)(p, panel, start, bits, rows, 0, table, y);
    if (p->w->kept_count) ISA(add_kept)(p, panel, start, rows, y);
    size_t bytes = (size_t)smaller(LANES, p->w->rows - panel * LANES) * sizeof(float);
    for (int r = 0; r < rows; r++) memcpy(p->y + (start + r) * p->w->rows + panel * LANES, &y[r], bytes);
}

TARGET INLINE void ISA(panel_of_bits)(const Product *p, int64_t panel, RowBlock block, int bits) {
    if (TILE == 1 || block.rows == 1)
        ISA(panel_of_rows)(p, panel, block.start, bits, 1);
    else if (block.rows == 4)
        ISA(panel_of_rows)(p, panel, block.start, bits, 4);
    else
        ISA(panel_of_rows)(p, panel, block.start, bits, 8);
}

TARGET static void ISA(multiply)(const Product *p, int64_t panel, RowBlock block) {
    switch (p->w->bits) {
    case 2:
        ISA(panel_of_bits)(p, panel, block, 2);
        break;
    case 3:
        ISA(panel_of_bits)(p, panel, block, 3);
        break;
    case 4:
        ISA(panel_of_bits)(p, panel, block, 4);
        break;
    default:
        ISA(panel_of_bits)(p, panel, block, 8);
    }
}

TARGET INLINE void ISA(unpack)(const Weight *w, int64_t panel, float *first, int64_t stride, int bits, const float *table) {
    int64_t groups = groups_of(w);
    float *out = first;
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_vectors(bits) * 4 * LANES;
    size_t bytes = (size_t)smaller(LANES, w->rows - panel * LANES) * sizeof(float);
    for (int64_t g = 0; g < groups; g++) {
        Floats offset, scale = ISA(scale_of)(w, panel, groups, g, &offset);
        int64_t left = smaller(w->group, w->columns - g * w->group);
        for (; left > 0; left -= block_columns(bits), codes += block_vectors(bits) * 4 * LANES)
            for (int k = 0; k < smaller(left, block_columns(bits)); k++, out += stride) {
                Floats value = ISA(decode)(codes, k / 4, k % 4, bits, bits < 8, table, (float)w->center);
                value = (value - offset) * scale;
                memcpy(out, &value, bytes);
            }
    }
    for (int64_t j = 0; j < w->kept_count; j++) {
        Floats value = ISA(load_halves)(w->apart + (panel * w->kept_count + j) * LANES);
        memcpy(first + w->kept[j] * stride, &value, bytes);
    }
}

TARGET static void ISA(dequantize)(const Weight *w, int64_t panel, float *out, int64_t stride) {
    float uniform[16];
    const float *table = ISA(table_of)(w, uniform);
    switch (w->bits) {
    case 2:
        ISA(unpack)(w, panel, out, stride, 2, table);
        break;
    case 3:
        ISA(unpack)(w, panel, out, stride, 3, table);
        break;
    case 4:
        ISA(unpack)(w, panel, out, stride, 4, table);
        break;
    default:
        ISA(unpack)(w, panel, out, stride, 8, table);
    }
}

/* --------------------------------------------------------------------------------------------------- pruned weights */

/* The next LANES values, and the next LANES columns of a row: those values where `mask` has bits, zero elsewhere. */
#if defined(__x86_64__) && LANES == 16

TARGET INLINE Floats ISA(stored)(const uint8_t *values, int kind) {
    if (kind == FLOAT32) return (Floats)_mm512_loadu_ps(values);
    __m256i halves = _mm256_loadu_si256((const __m256i *)values);
    return (Floats)(kind == FLOAT16 ? _mm512_cvtph_ps(halves)
                                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    __m512 stored = (__m512)ISA(stored)(values, kind);
    __asm__("" : "+v"(stored)); /* or compilers expand from memory, which takes many times as long */
    return (Floats)_mm512_maskz_expand_ps((__mmask16)mask, stored);
}

#elif defined(__x86_64__) && LANES == 8

/* For every mask of 8 columns, which value each takes; -1 for none. */
static int8_t ISA(takes)[256][8];

__attribute__((constructor)) static void ISA(fill_takes)(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, next = 0; column < 8; column++) ISA(takes)[mask][column] = (int8_t)(mask >> column & 1 ? next++ : -1);
}

TARGET INLINE Floats ISA(stored)(const uint8_t *values, int kind) {
    if (kind == FLOAT32) return (Floats)_mm256_loadu_ps((const float *)values);
    __m128i halves = _mm_loadu_si128((const __m128i *)values);
    return (Floats)(kind == FLOAT16 ? _mm256_cvtph_ps(halves)
                                    : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    __m256i takes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)ISA(takes)[mask]));
    __m256 columns = _mm256_permutevar8x32_ps((__m256)ISA(stored)(values, kind), takes);
    return (Floats)_mm256_blendv_ps(columns, _mm256_setzero_ps(), (__m256)takes);
}

#else

TARGET INLINE float ISA(value)(const uint8_t *from, int kind) {
    float value;
    uint16_t half;
    memcpy(&value, from, kind == FLOAT32 ? sizeof value : 0);
    memcpy(&half, from, sizeof half);
    return kind == FLOAT32 ? value : kind == FLOAT16 ? from_half(half) : float_of((uint32_t)half << 16);
}
TARGET INLINE Floats ISA(stored)(const uint8_t *values, int kind) {
    Floats columns;
    for (int j = 0; j < LANES; j++) columns[j] = ISA(value)(values + j * value_bytes(kind), kind);
    return columns;
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    Floats columns = {0};
    for (int j = 0; j < LANES; j++) {
        if (!(mask >> j & 1)) continue;
        columns[j] = ISA(value)(values, kind);
        values += value_bytes(kind);
    }
    return columns;
}

#endif

/* Where the values of a row are at work. Near the end of all values they are copied, because whole vectors are read. */
typedef struct {
    const uint8_t *next, *end;
    uint8_t last[WORD * 4];
} ISA(Reader);

TARGET INLINE ISA(Reader) ISA(reader)(const Pruned *w, int64_t row, int kind) {
    const uint8_t *end = w->values + w->starts[w->rows] * value_bytes(kind);
    return (ISA(Reader)){w->values + w->starts[row] * value_bytes(kind), end, {0}};
}

TARGET INLINE const uint8_t *ISA(take)(ISA(Reader) * reader, uint64_t word, int kind) {
    const uint8_t *values = reader->next;
    if (reader->end - values < WORD * value_bytes(kind)) {
        memcpy(reader->last, values, (size_t)(reader->end - values));
        values = reader->last;
    }
    reader->next += __builtin_popcountll(word) * value_bytes(kind);
    fetch_ahead(reader->next, WORD * value_bytes(kind) / 2);
    return values;
}

/* The sum of all lanes, upper half on lower half until one is left. */
TARGET INLINE float ISA(across)(Floats sums) {
    float lanes[LANES];
    memcpy(lanes, &sums, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The same without a way through memory: several times as fast alone, but it makes `pruned_rows` slower by a quarter. */
TARGET INLINE float ISA(across_registers)(Floats sums) {
#if defined(__x86_64__) && LANES >= 8
#if LANES == 16
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)sums),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)sums), 1)));
#else
    __m256 eight = (__m256)sums;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return ISA(across)(sums);
#endif
}

/* `many` rows of the weight from `row` on, by `rows` of activations from `start` on: what is loaded of x serves all of them. */
TARGET INLINE void ISA(pruned_rows)(const PrunedProduct *p, int64_t row, int many, int64_t start, int rows, int kind) {
    const Pruned *w = p->w;
    ISA(Reader) readers[2];
    Floats sums[2][MAX_ROWS] = {{{0}}};
#pragma GCC unroll 2
    for (int i = 0; i < many; i++) readers[i] = ISA(reader)(w, row + i, kind);
    const float *x = p->x + start * p->stride;
    int ways = rows == 1 ? 4 : 1;
    for (int64_t k = 0; k < w->columns; k += WORD, x += WORD) {
        uint64_t words[2];
        const uint8_t *values[2];
#pragma GCC unroll 2
        for (int i = 0; i < many; i++) {
            words[i] = mask_word(w, row + i, k);
            values[i] = ISA(take)(&readers[i], words[i], kind);
        }
#pragma GCC unroll 16
        for (int part = 0; part < WORD / LANES; part++) {
            Floats weight[2];
#pragma GCC unroll 2
            for (int i = 0; i < many; i++) {
                uint32_t mask = (uint32_t)(words[i] >> (part * LANES)) & ((1u << LANES) - 1);
                weight[i] = ISA(expand)(values[i], mask, kind);
                values[i] += __builtin_popcount(mask) * value_bytes(kind);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                Floats columns = ISA(load_floats)(x + r * p->stride + part * LANES);
#pragma GCC unroll 2
                for (int i = 0; i < many; i++) sums[i][r + part % ways] += weight[i] * columns;
            }
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < many; i++) {
        if (rows == 1) sums[i][0] = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
#pragma GCC unroll 8 /* or the sums live in memory */
        for (int r = 0; r < rows; r++) p->y[(start + r) * w->rows + row + i] = ISA(across)(sums[i][r]);
    }
}

/* As many rows of the weight at a time as there are registers for. */
TARGET INLINE void ISA(pruned_block)(const PrunedProduct *p, int64_t row, int64_t last, int64_t start, int rows, int kind) {
    if (LANES == 16 && rows > 1)
        for (; row + 2 <= last; row += 2) ISA(pruned_rows)(p, row, 2, start, rows, kind);
    for (; row < last; row++) ISA(pruned_rows)(p, row, 1, start, rows, kind);
}

TARGET INLINE void ISA(pruned_of_kind)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block, int kind) {
    if (TILE == 1 || block.rows == 1)
        ISA(pruned_block)(p, row, last, block.start, 1, kind);
    else if (block.rows == 4)
        ISA(pruned_block)(p, row, last, block.start, 4, kind);
    else
        ISA(pruned_block)(p, row, last, block.start, 8, kind);
}

/* The same for rows of which nothing is pruned. */
TARGET INLINE void ISA(whole_rows)(const PrunedProduct *p, int64_t row, int64_t last, int64_t start, int rows, int kind) {
    const Pruned *w = p->w;
    int ways = rows == 1 ? 4 : 1;
    for (; row < last; row++) {
        const uint8_t *values = w->values + w->starts[row] * value_bytes(kind);
        const float *x = p->x + start * p->stride;
        Floats sums[MAX_ROWS] = {{0}};
        int64_t left = w->columns;
        for (; left >= 4 * LANES; left -= 4 * LANES, x += 4 * LANES, values += 4 * LANES * value_bytes(kind)) {
            fetch_ahead(values, 4 * LANES * value_bytes(kind));
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                Floats weight = ISA(stored)(values + part * LANES * value_bytes(kind), kind);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) sums[r + part % ways] += weight * ISA(load_floats)(x + r * p->stride + part * LANES);
            }
        }
        for (; left > 0; left -= LANES, x += LANES, values += LANES * value_bytes(kind)) {
            uint8_t last_values[4 * LANES] = {0};
            memcpy(last_values, values, (size_t)(smaller(left, LANES) * value_bytes(kind)));
            Floats weight = ISA(stored)(last_values, kind);
            for (int r = 0; r < rows; r++) sums[r] += weight * ISA(load_floats)(x + r * p->stride);
        }
        if (rows == 1) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) p->y[(start + r) * w->rows + row] = ISA(across_registers)(sums[r]);
    }
}

TARGET INLINE void ISA(whole_of_kind)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block, int kind) {
    if (TILE == 1 || block.rows == 1)
        ISA(whole_rows)(p, row, last, block.start, 1, kind);
    else if (block.rows == 4)
        ISA(whole_rows)(p, row, last, block.start, 4, kind);
    else
        ISA(whole_rows)(p, row, last, block.start, 8, kind);
}

TARGET static void ISA(multiply_whole)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block) {
    switch (p->w->kind) {
    case FLOAT32:
        ISA(whole_of_kind)(p, row, last, block, FLOAT32);
        break;
    case FLOAT16:
        ISA(whole_of_kind)(p, row, last, block, FLOAT16);
        break;
    default:
        ISA(whole_of_kind)(p, row, last, block, BFLOAT16);
    }
}

TARGET static void ISA(multiply_pruned)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block) {
    switch (p->w->kind) {
    case FLOAT32:
        ISA(pruned_of_kind)(p, row, last, block, FLOAT32);
        break;
    case FLOAT16:
        ISA(pruned_of_kind)(p, row, last, block, FLOAT16);
        break;
    default:
        ISA(pruned_of_kind)(p, row, last, block, BFLOAT16);
    }
}

TARGET static void ISA(unfold)(const Pruned *w, int64_t row, float *out) {
    int size = value_bytes(w->kind);
    ISA(Reader) reader = ISA(reader)(w, row, w->kind);
    for (int64_t k = 0; k < w->columns; k += WORD) {
        uint64_t word = mask_word(w, row, k);
        const uint8_t *values = ISA(take)(&reader, word, w->kind);
        for (int64_t column = k; column < smaller(k + WORD, w->columns); column += LANES) {
            uint32_t mask = (uint32_t)(word >> (column - k)) & ((1u << LANES) - 1);
            Floats weight = ISA(expand)(values, mask, w->kind);
            memcpy(out + column, &weight, (size_t)smaller(LANES, w->columns - column) * sizeof(float));
            values += __builtin_popcount(mask) * size;
        }
    }
}

/* ------------------------------------------------------------------------------------------- a block's other arithmetic */

/* The lanes of `a` where `mask` is -1, those of `b` where it is 0. */
TARGET INLINE Floats ISA(choose)(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

/* e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series. */
TARGET INLINE Floats ISA(exponential)(Floats x) {
    x = ISA(choose)(x < -87.0f, ISA(all)(-87.0f), x); /* what is not a number stays none */
    x = ISA(choose)(x > 88.0f, ISA(all)(88.0f), x);
    Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats sum = ISA(all)(1.0f / 5040);
    const float inverse[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
    for (int i = 0; i < 7; i++) sum = sum * r + inverse[i];
    return sum * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

TARGET INLINE float ISA(dot_floats)(const float *a, const float *b, int64_t count) {
    Floats sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int way = 0; way < 4; way++)
            sums[way] += ISA(load_floats)(a + i + way * LANES) * ISA(load_floats)(b + i + way * LANES);
    for (; i + LANES <= count; i += LANES) sums[0] += ISA(load_floats)(a + i) * ISA(load_floats)(b + i);
    float sum = ISA(across_registers)((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* y = weight * x / sqrt(mean(x^2) + epsilon); y may be x. */
TARGET static void ISA(norm)(const float *x, const float *weight, float epsilon, int64_t count, float *y) {
    float scale = 1 / __builtin_sqrtf(ISA(dot_floats)(x, x, count) / (float)count + epsilon);
    for (int64_t i = 0; i < count; i++) y[i] = weight[i] * (x[i] * scale);
}

/* y *= silu(gates), where silu(g) = g / (1 + e^-g). */
TARGET static void ISA(gate)(const float *gates, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        size_t bytes = (size_t)smaller(LANES, count - i) * sizeof(float);
        Floats g = {0}, value = {0};
        memcpy(&g, gates + i, bytes);
        memcpy(&value, y + i, bytes);
        value *= g / (1.0f + ISA(exponential)(-g));
        memcpy(y + i, &value, bytes);
    }
}

/* What one head of queries takes from the values: their mean under softmax(scaling * q k). */
TARGET static void ISA(attend)(const Attention *a, int64_t head) {
    const Block *b = a->block;
    int64_t size = b->head_size, shared = head / (b->heads / b->kv_heads);
    const float *query = a->queries + head * size, *keys = a->keys + shared * a->key_stride;
    const float *values = a->values + shared * a->value_stride;
    float *weights = a->scores + head * a->length, *y = a->y + head * size, most = -__builtin_inff();
    for (int64_t t = 0; t < a->length; t++) {
        weights[t] = b->scaling * ISA(dot_floats)(query, keys + t * size, size);
        most = weights[t] > most ? weights[t] : most;
    }
    Floats total = {0};
    for (int64_t t = 0; t < a->length; t += LANES) {
        size_t bytes = (size_t)smaller(LANES, a->length - t) * sizeof(float);
        Floats scores = ISA(all)(-__builtin_inff());
        memcpy(&scores, weights + t, bytes);
        Floats shares = ISA(exponential)(scores - most);
        memcpy(weights + t, &shares, bytes);
        total += shares;
    }
    float sum = ISA(across_registers)(total);
    memset(y, 0, (size_t)size * sizeof(float));
    for (int64_t t = 0; t < a->length; t++)
        for (int64_t i = 0; i < size; i++) y[i] += weights[t] * values[t * size + i];
    for (int64_t i = 0; i < size; i++) y[i] /= sum;
}

#undef Ints
#undef Words
#undef Floats
#undef SUFFIX
#undef LANES
#undef TILE
#undef TARGET
#undef DOT_PRODUCTS
#endif
