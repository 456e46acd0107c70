/* The structures of the interface, which library.py repeats field by field, and the geometry of a packed weight. */
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

/* A quantized weight in panels (drawn in lmpress_cpu.c). */
typedef struct {
    const uint8_t *codes;          /* the panels */
    const void *scales;            /* [panels][groups][LANES], float or float16 */
    const void *offsets;           /* the same for zero point minus center; NULL if every zero point is the center */
    const float *codebook;         /* 16 values that replace code - center (NF4), or NULL */
    const uint8_t *bilevel_codes;  /* instead of scales and offsets (SpQR), or NULL: [tiles of 16 rows][groups][16], the code
                                      of a row's scale in the low nibble, that of its zero point in the high nibble */
    const uint16_t *bilevel_grids; /* [tiles][groups][4] float16: value = (code - zero) * scale; scale and zero of the scale
                                      codes, then those of the zero codes */
    const int32_t *outlier_columns; /* input columns whose codes do not count (LLM.int8), or NULL */
    const uint16_t *outliers;       /* [panels][outlier_count][LANES] float16: the weights of these columns */
    int64_t outlier_count;
    int64_t rows, columns; /* of the layer, without padding */
    int64_t group;         /* columns per scale; the last group of a row may be shorter */
    int32_t bits;          /* 2, 3, 4 or 8: how a code is stored */
    int32_t center;        /* the code of zero if there is no offset */
    int32_t half_scales;   /* scales and offsets are float16 */
} Weight;

/* A weight of floats of which only some are stored; the others are zero. */
typedef struct {
    const uint8_t *mask;   /* [rows][ceil(columns / 8)]: column j is stored if bit j % 8 of byte j / 8 of its row is set */
    const uint8_t *values; /* the stored ones, row after row */
    const int64_t *starts; /* [rows + 1]: the index of the first value of each row */
    int64_t rows, columns;
    int32_t kind; /* the dtype of the values: FLOAT32, FLOAT16 or BFLOAT16 */
} Pruned;

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

/* How activations enter the product: as floats (exact), or as int8 codes with a scale per row and group or per row. */
enum { FLOATS = 0, INT8_GROUPS = 1, INT8_TOKENS = 2 };

typedef struct {
    int32_t activations; /* FLOATS, INT8_GROUPS or INT8_TOKENS */
    int32_t threads;
    float steps; /* a scale of activations is absmax / steps */
} Mode;

/* The linears of a decoder block and its norms: before attention, before the MLP, of query heads, of key heads. */
enum { QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, WEIGHTS };
enum { NORM_ATTENTION, NORM_MLP, NORM_QUERY, NORM_KEY, NORMS };

/*
 * A decoder block: x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), with root-mean-square norms
 * (RMSNorm), rotary positions (RoPE), and groups of query heads that share one head of keys and values (GQA).
 */
typedef struct {
    const Weight *weights[WEIGHTS];
    const float *biases[WEIGHTS]; /* NULL if there is none */
    const float *norms[NORMS];    /* weights; NULL if query or key heads have none */
    float epsilons[NORMS];
    float scaling;                /* of attention scores */
    int64_t heads, kv_heads, head_size;
} Block;

/* A block is the shortest run of columns that fills whole vectors. */
INLINE int block_columns(int bits) { return bits == 3 ? 32 : 32 / bits; }
INLINE int block_vectors(int bits) { return bits == 3 ? 3 : 1; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static int has_offsets(const Weight *w) { return w->offsets || w->bilevel_codes; }
static int64_t groups_of(const Weight *w) { return ceil_div(w->columns, w->group); }
static int64_t blocks_of(const Weight *w, int64_t g) {
    return ceil_div(min64(w->group, w->columns - g * w->group), block_columns(w->bits));
}
static int64_t row_blocks(const Weight *w) {
    int64_t groups = groups_of(w);
    return (groups - 1) * blocks_of(w, 0) + blocks_of(w, groups - 1);
}
