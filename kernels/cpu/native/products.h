/* What the kernels of every instruction set are given, and arithmetic on single numbers. */
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
