/* The interface's types, which library.py repeats, and the geometry of a weight. */
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
