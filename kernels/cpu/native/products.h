/* What the kernels of every instruction set are given, and their arithmetic on single numbers. */

/* ----------------------------------------------------------------------------------------------------------- single numbers */

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Subnormal numbers included: the product by 2^112 moves the zero of the exponent. */
INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    uint32_t size = rest >= 0x0f800000u ? rest | 0x7f800000u : float_to_bits(float_from_bits(rest) * 0x1p112f);
    return float_from_bits(sign | size);
}

/* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits of the mantissa. */
INLINE int32_t round_to_int(float value) { return (int32_t)(float_to_bits(value + 12582912.0f) - 0x4B400000u); }

/* ------------------------------------------------------------------------------------------------------- packed activations */

enum {
    CHUNK_ROWS = 64,       /* rows of activations that are packed at a time */
    MAX_ROWS = 8,          /* rows of the largest row block */
    SEGMENT = 256,         /* columns whose products are added up in one partial sum */
    PREFETCH_BYTES = 4096, /* bytes of codes between a load and its prefetch */
    TILE_ROWS = 16,        /* rows of a weight that share a grid of the second level */
};

/*
 * Up to CHUNK_ROWS rows of activations, packed for the kernels in row blocks: within a block of `n` rows, element i of row r
 * lies at [i * n + r], so that a kernel reads one stream. An element of `quads` holds 4 int8, one of `floats` a float.
 */
typedef struct {
    const Weight *w;
    const Mode *mode;
    const float *x; /* [m][columns] */
    float *y;       /* [m][rows] */
    int64_t m, groups, padded;
    int32_t *quads;
    float *floats, *scales;      /* scales [m][groups] of int8 activations */
    int32_t *code_sums;          /* [m][groups]: sums of int8 codes */
    float *sums;                 /* [m][groups]: sums of float activations, if the weight has offsets */
    float *masked_x, *outlier_x; /* [m][columns]: x, zero in the outlier columns; [m][outlier_count]: x in these columns */
} Product;

typedef struct {
    int64_t start;
    int rows;
} RowBlock;

/* Rows are cut into blocks of 8, 4 and 1, but of at most `max_rows`: the sizes that the kernels are compiled for. */
static RowBlock next_row_block(int64_t m, int max_rows, RowBlock after) {
    int64_t start = after.start + after.rows, left = min64(m - start, max_rows);
    return (RowBlock){start, left >= 8 ? 8 : left >= 4 ? 4 : 1};
}

/* Codes are used once: to compute on some while others are being loaded, these must be requested in time. */
INLINE void prefetch(const uint8_t *codes, int bytes) {
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(codes + PREFETCH_BYTES + at);
}

/* What `place` points to is stored here and loaded later, so that the inner loop between has the registers. */
INLINE void keep_in_memory(void *place) { __asm__ volatile("" : : "r"(place) : "memory"); }

/* ----------------------------------------------------------------------------------------------------------- pruned weights */

enum { MASK_COLUMNS = 64 }; /* columns of a mask that are read at a time */

/* Rows of activations for a pruned weight, padded to whole words of MASK_COLUMNS columns. */
typedef struct {
    const Pruned *w;
    const float *x; /* [m][stride], zero beyond the weight's columns */
    float *y;       /* [m][rows] */
    int64_t m, stride;
} PrunedProduct;

INLINE int value_bytes(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* The mask of the MASK_COLUMNS columns from `column` on; bits beyond the last column are zero. */
static uint64_t mask_word(const Pruned *w, int64_t row, int64_t column) {
    int64_t bytes = ceil_div(w->columns, 8), at = column / 8;
    uint64_t word = 0;
    if (bytes - at >= 8)
        memcpy(&word, w->mask + row * bytes + at, 8); /* a constant size stays in registers */
    else
        memcpy(&word, w->mask + row * bytes + at, (size_t)(bytes - at));
    return word;
}

/* ---------------------------------------------------------------------------------------------------------------- attention */

/* One query and the past keys and values of its sequence. */
typedef struct {
    const Block *block;
    const float *queries;       /* [heads][head_size] */
    const float *keys, *values; /* [kv_heads][length][head_size]; a head lies a stride behind the previous one */
    int64_t length, key_stride, value_stride;
    float *scores; /* [heads][length] */
    float *y;      /* [heads][head_size] */
} Attention;
