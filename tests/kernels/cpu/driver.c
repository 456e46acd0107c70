/*
 * Runs every kernel on buffers of exactly the size that it may access, for sanitizers and for emulators of other machines.
 * Exact products are compared with products in double with the dequantized weight, those of int8 activations with a wider
 * tolerance.
 */
#include "../../../kernels/cpu/lmpress_cpu.c"

#include <math.h>
#include <stdio.h>

/* --------------------------------------------------------------------------------------------- memory and random numbers */

static void *allocated[128];
static int allocations;

static void *allocate(int64_t count, size_t size) { return allocated[allocations++] = calloc((size_t)count, size); }

/* Frees what the last check has allocated. */
static void release(void) {
    while (allocations) free(allocated[--allocations]);
}

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(draw() >> 8) / (1 << 23) - 1; }
static uint16_t any_half(void) { return (uint16_t)(0x3000 | (draw() >> 16 & 0x83ff)); }

static float *floats(int64_t n) {
    float *values = allocate(n, sizeof *values);
    for (int64_t i = 0; i < n; i++) values[i] = uniform();
    return values;
}

static uint16_t *random_halves(int64_t n) {
    uint16_t *values = allocate(n, sizeof *values);
    for (int64_t i = 0; i < n; i++) values[i] = any_half();
    return values;
}

static uint8_t *random_bytes(int64_t n) {
    uint8_t *values = allocate(n, 1);
    for (int64_t i = 0; i < n; i++) values[i] = (uint8_t)(draw() >> 16);
    return values;
}

static double distance(const float *y, const float *expected, int64_t n) {
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += pow((double)y[i] - expected[i], 2);
        size += pow(expected[i], 2);
    }
    return sqrt(error / size);
}

/* y[m][rows] = x[m][columns] times dense[columns][rows], in double. */
static float *product(const float *x, const float *dense, int64_t m, int64_t rows, int64_t columns) {
    float *y = allocate(m * rows, sizeof *y);
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++) {
            double sum = 0;
            for (int64_t k = 0; k < columns; k++) sum += (double)x[i * columns + k] * dense[k * rows + n];
            y[i * rows + n] = (float)sum;
        }
    return y;
}

/* ----------------------------------------------------------------------------------------------------- quantized weights */

enum { PLAIN, OFFSETS, CODEBOOK, BILEVEL, OUTLIERS, HALF_SCALES, PARTS };

/* A product: the instruction set, the weight and what it has besides codes and scales, the number of rows of activations. */
typedef struct {
    int set, lanes, threads, bits, part;
    int64_t m, rows, columns, group;
} Case;

static Weight random_weight(const Case *c) {
    Weight w = {.rows = c->rows, .columns = c->columns, .group = c->group, .bits = c->bits};
    w.center = c->part == CODEBOOK ? 0 : 1 << (c->bits - 1);
    int64_t panels = ceil_div(w.rows, c->lanes), scales = panels * groups_of(&w) * c->lanes;
    int64_t tiles = ceil_div(w.rows, TILE_ROWS) * groups_of(&w);
    w.codes = random_bytes(panels * row_blocks(&w) * block_vectors(w.bits) * 4 * c->lanes);
    w.half_scales = c->part == HALF_SCALES;
    if (c->part == HALF_SCALES)
        w.scales = random_halves(scales), w.offsets = random_halves(scales);
    else if (c->part == BILEVEL)
        w.bilevel_codes = random_bytes(tiles * TILE_ROWS), w.bilevel_grids = random_halves(tiles * 4);
    else
        w.scales = floats(scales);
    if (c->part == OFFSETS) w.offsets = floats(scales);
    if (c->part == CODEBOOK) w.codebook = floats(16);
    if (c->part == OUTLIERS) {
        int32_t *columns = allocate(3, sizeof *columns);
        columns[1] = (int32_t)w.columns / 2, columns[2] = (int32_t)w.columns - 1;
        w.outlier_columns = columns;
        w.outlier_count = w.columns < 3 ? 1 : 3;
        w.outliers = random_halves(panels * w.outlier_count * c->lanes);
    }
    return w;
}

static const float SPECIAL[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-42f, -0.0f, 0};

/* The product with activations that enter by `activations`; then with special values, whose sums are not compared: nothing may
 * be read or written outside of the buffers because of them. */
static int check_activations(const Case *c, const Weight *w, int activations, const float *x, const float *expected) {
    Mode mode = {activations, c->threads, 127};
    float *y = floats(c->m * c->rows), *special = allocate(c->m * c->columns, sizeof *special);
    lmpress_linear(c->set, w, &mode, x, c->m, y);
    double error = distance(y, expected, c->m * c->rows);
    memcpy(special, x, (size_t)(c->m * c->columns) * sizeof *special);
    for (int64_t i = 0; i < c->m * c->columns; i += 1 + draw() % 3) special[i] = SPECIAL[draw() >> 16 & 7];
    lmpress_linear(c->set, w, &mode, special, c->m, y);
    if (error <= (activations == FLOATS ? 1e-5 : 3e-2)) return 0;
    printf("set %d bits %d part %d m %d rows %d columns %d group %d activations %d: error %g\n", c->set, c->bits, c->part,
           (int)c->m, (int)c->rows, (int)c->columns, (int)c->group, activations, error);
    return 1;
}

static int check(Case c) {
    Weight w = random_weight(&c);
    float *x = floats(c.m * c.columns), *dense = floats(c.columns * c.rows);
    lmpress_dequantize(c.set, &w, c.threads, 0, ceil_div(c.rows, c.lanes), dense, c.rows);
    float *expected = product(x, dense, c.m, c.rows, c.columns);
    int failed = 0;
    for (int activations = FLOATS; activations <= (w.codebook ? FLOATS : INT8_TOKENS); activations++)
        failed |= check_activations(&c, &w, activations, x, expected);
    release();
    return failed;
}

/* ---------------------------------------------------------------------------------------- sparse matrices, pruned weights */

static int check_sparse(int64_t m, int64_t rows, int64_t width, int wide) {
    int64_t *starts = allocate(rows + 1, sizeof *starts);
    for (int64_t r = 0; r < rows; r++) starts[r + 1] = starts[r] + draw() % 7;
    void *columns = allocate(starts[rows], wide ? 4 : 2);
    uint16_t *values = random_halves(starts[rows]);
    float *x = floats(m * width), *y = floats(m * rows), *expected = allocate(m * rows, sizeof *expected);
    memcpy(expected, y, (size_t)(m * rows) * sizeof *expected);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = starts[r]; e < starts[r + 1]; e++) {
            uint32_t column = draw() % (uint32_t)width;
            if (wide)
                ((uint32_t *)columns)[e] = column;
            else
                ((uint16_t *)columns)[e] = (uint16_t)column;
            for (int64_t i = 0; i < m; i++) expected[i * rows + r] += half_to_float(values[e]) * x[i * width + column];
        }
    int64_t entries = starts[rows];
    int failed = lmpress_add_sparse(2, starts, columns, wide, values, entries, rows, width, x, m, y) != 0;
    failed |= !(distance(y, expected, m * rows) <= 1e-5);
    for (int64_t e = 0; e < entries; e += entries - 1) { /* the first and the last column point behind the width */
        if (wide)
            ((uint32_t *)columns)[e] = UINT32_MAX;
        else
            ((uint16_t *)columns)[e] = UINT16_MAX;
        failed |= lmpress_add_sparse(2, starts, columns, wide, values, entries, rows, width, x, m, y) != -2;
    }
    starts[1] = entries + 1;
    failed |= lmpress_add_sparse(2, starts, columns, wide, values, entries, rows, width, x, m, y) != -2;
    if (failed) printf("sparse rows %d width %d: wrong\n", (int)rows, (int)width);
    release();
    return failed;
}

static Pruned random_pruned(int64_t rows, int64_t columns, int kind, uint32_t density) {
    int64_t bytes = ceil_div(columns, 8), *starts = allocate(rows + 1, sizeof *starts);
    uint8_t *mask = allocate(rows * bytes, 1);
    for (int64_t r = 0; r < rows; r++) {
        starts[r + 1] = starts[r];
        for (int64_t k = 0; k < columns; k++)
            if (draw() >> 16 < density) mask[r * bytes + k / 8] |= (uint8_t)(1 << (k % 8)), starts[r + 1]++;
    }
    uint8_t *values = allocate(starts[rows], (size_t)value_bytes(kind));
    for (int64_t i = 0; i < starts[rows]; i++) {
        float value = uniform();
        uint16_t half = kind == FLOAT16 ? (uint16_t)(0x3c00 | (draw() >> 16 & 0x83ff)) : (uint16_t)(float_to_bits(value) >> 16);
        memcpy(values + i * value_bytes(kind), kind == FLOAT32 ? (void *)&value : (void *)&half, (size_t)value_bytes(kind));
    }
    return (Pruned){mask, values, starts, rows, columns, kind};
}

static int check_pruned(int set, int64_t m, int64_t rows, int64_t columns, int kind, uint32_t density) {
    Pruned w = random_pruned(rows, columns, kind, density);
    float *x = floats(m * columns), *y = floats(m * rows);
    float *dense = floats(rows * columns), *transposed = floats(rows * columns);
    lmpress_pruned_to_dense(set, &w, 1, 0, rows, dense);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < columns; k++) {
            int stored = w.mask[r * ceil_div(columns, 8) + k / 8] >> (k % 8) & 1;
            transposed[k * rows + r] = stored ? dense[r * columns + k] : 0;
        }
    lmpress_pruned_linear(set, &w, 2, x, m, y);
    int failed = !(distance(y, product(x, transposed, m, rows, columns), m * rows) <= 1e-5);
    if (failed) printf("set %d pruned m %d rows %d columns %d kind %d: wrong\n", set, (int)m, (int)rows, (int)columns, kind);
    release();
    return failed;
}

/* --------------------------------------------------------------------------------------------------------- decoder blocks */

typedef struct {
    int64_t hidden, heads, kv_heads, size, width, length, group; /* width: of the MLP; length: past and new tokens */
} BlockShape;

/* Weights of 4 bits, whose values have a scale of their own unless groups are narrow: then all take the same packed inputs. */
static Block random_block(int set, const BlockShape *s, Weight *weights) {
    int64_t attended = s->heads * s->size, shared = s->kv_heads * s->size;
    int64_t rows[] = {attended, shared, shared, s->hidden, s->width, s->width, s->hidden};
    int64_t columns[] = {s->hidden, s->hidden, s->hidden, attended, s->hidden, s->hidden, s->width};
    Block b = {.scaling = 0.4f, .heads = s->heads, .kv_heads = s->kv_heads, .head_size = s->size};
    for (int i = 0; i < WEIGHTS; i++) {
        int64_t group = i == VALUE && s->group > 8 ? columns[i] : s->group;
        Case c = {.lanes = INSTRUCTION_SETS[set].lanes, .bits = 4, .rows = rows[i], .columns = columns[i], .group = group};
        weights[i] = random_weight(&c);
        float *scales = (float *)weights[i].scales;
        for (int64_t j = 0; j < ceil_div(rows[i], c.lanes) * groups_of(&weights[i]) * c.lanes; j++)
            scales[j] /= 4 * sqrtf((float)columns[i]);
        b.weights[i] = &weights[i];
        if (i % 2) b.biases[i] = floats(rows[i]);
    }
    for (int i = 0; i < NORMS; i++) b.norms[i] = floats(i < NORM_QUERY ? s->hidden : s->size), b.epsilons[i] = 1e-5f;
    return b;
}

static float *reference_linear(int set, const Block *b, int which, const float *x) {
    const Weight *w = b->weights[which];
    float *dense = floats(w->columns * w->rows);
    lmpress_dequantize(set, w, 1, 0, ceil_div(w->rows, INSTRUCTION_SETS[set].lanes), dense, w->rows);
    float *y = product(x, dense, 1, w->rows, w->columns);
    for (int64_t n = 0; n < w->rows && b->biases[which]; n++) y[n] += b->biases[which][n];
    return y;
}

static void reference_norm(const float *x, const float *weight, int64_t n, float *y) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    for (int64_t i = 0; i < n; i++) y[i] = (float)(weight[i] * x[i] / sqrt(squares / (double)n + 1e-5f));
}

static void reference_rotation(float *head, const float *cosines, const float *sines, int64_t size) {
    for (int64_t j = 0; j < size / 2; j++) {
        float low = head[j], high = head[size / 2 + j];
        head[j] = low * cosines[j] - high * sines[j];
        head[size / 2 + j] = high * cosines[size / 2 + j] + low * sines[size / 2 + j];
    }
}

static float *reference_attention(const BlockShape *s, const float *queries, const float *keys, const float *values) {
    float *y = floats(s->heads * s->size), *scores = floats(s->length);
    for (int64_t h = 0; h < s->heads; h++) {
        int64_t at = h / (s->heads / s->kv_heads) * s->length * s->size;
        double total = 0;
        for (int64_t t = 0; t < s->length; t++) {
            double score = 0;
            for (int64_t j = 0; j < s->size; j++) score += (double)queries[h * s->size + j] * keys[at + t * s->size + j];
            total += scores[t] = (float)exp(0.4 * score);
        }
        for (int64_t j = 0; j < s->size; j++) {
            double sum = 0;
            for (int64_t t = 0; t < s->length; t++) sum += scores[t] / total * values[at + t * s->size + j];
            y[h * s->size + j] = (float)sum;
        }
    }
    return y;
}

static int check_project(int set, const Block *b, const BlockShape *s, const float *x, float *queries) {
    float *cosines = floats(s->size), *sines = floats(s->size), *normed = floats(s->hidden);
    float *found[] = {queries, floats(s->kv_heads * s->size), floats(s->kv_heads * s->size)};
    Mode mode = {FLOATS, 1, 127};
    int failed = lmpress_decode_project(set, b, &mode, x, cosines, sines, found[0], found[1], found[2]);
    reference_norm(x, b->norms[NORM_ATTENTION], s->hidden, normed);
    for (int i = QUERY; i <= VALUE; i++) {
        float *expected = reference_linear(set, b, i, normed);
        for (float *head = expected; i != VALUE && head < expected + b->weights[i]->rows; head += s->size) {
            reference_norm(head, b->norms[i == QUERY ? NORM_QUERY : NORM_KEY], s->size, head);
            reference_rotation(head, cosines, sines, s->size);
        }
        failed |= !(distance(found[i], expected, b->weights[i]->rows) <= 1e-5);
    }
    return failed;
}

static int check_attend(int set, const Block *b, const BlockShape *s, const float *x, const float *queries) {
    int64_t stride = s->length * s->size;
    float *keys = floats(s->kv_heads * stride), *values = floats(s->kv_heads * stride), *y = floats(s->hidden);
    float *out = floats(s->hidden), *normed = floats(s->hidden);
    Mode mode = {FLOATS, 1, 127};
    int failed = lmpress_decode_attend(set, b, &mode, x, queries, keys, stride, values, stride, s->length, y);
    float *change = reference_linear(set, b, OUT, reference_attention(s, queries, keys, values));
    for (int64_t i = 0; i < s->hidden; i++) out[i] = x[i] + change[i];
    reference_norm(out, b->norms[NORM_MLP], s->hidden, normed);
    float *gates = reference_linear(set, b, GATE, normed), *inner = reference_linear(set, b, UP, normed);
    for (int64_t i = 0; i < s->width; i++) inner[i] *= gates[i] / (1 + expf(-gates[i]));
    change = reference_linear(set, b, DOWN, inner);
    for (int64_t i = 0; i < s->hidden; i++) out[i] += change[i];
    return failed | !(distance(y, out, s->hidden) <= 1e-5);
}

/* One token in a block whose past is random, compared with the same in double. */
static int check_block(int set, BlockShape s) {
    Weight weights[WEIGHTS];
    Block b = random_block(set, &s, weights);
    float *x = floats(s.hidden), *queries = floats(s.heads * s.size);
    int failed = check_project(set, &b, &s, x, queries) | check_attend(set, &b, &s, x, queries);
    if (failed) printf("set %d block of %d heads of %d: wrong\n", set, (int)s.heads, (int)s.size);
    release();
    return failed;
}

/* -------------------------------------------------------------------------------------------------------------- all cases */

static const int BITS[] = {2, 3, 4, 8};
static const int64_t BATCHES[] = {1, 13, 67};

static int check_weights(int set, int lanes) {
    /* rows, columns, group */
    static const int64_t shapes[][3] = {{20, 24, 8},    {35, 172, 43}, {16, 256, 128},
                                        {50, 344, 344}, {7, 100, 32},  {33, 600, 300}};
    int failed = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (size_t b = 0; b < sizeof BATCHES / sizeof *BATCHES; b++)
            for (size_t i = 0; i < sizeof BITS / sizeof *BITS; i++)
                for (int part = PLAIN; part < PARTS; part++)
                    if (BITS[i] == 4 || part != CODEBOOK)
                        failed |= check((Case){set, lanes, 1, BITS[i], part, BATCHES[b], shapes[s][0], shapes[s][1],
                                               shapes[s][2]});
    for (int i = 0; i < 300; i++) { /* any shape: one column, groups wider than the layer or of a single column */
        int part = (int)(draw() >> 16) % PARTS, bits = part == CODEBOOK ? 4 : BITS[draw() >> 16 & 3];
        int64_t m = 1 + (draw() >> 16) % 20, rows = 1 + (draw() >> 16) % 40, columns = 1 + (draw() >> 16) % 90;
        int64_t group = 1 + (draw() >> 16) % (i % 2 ? 8 : 120);
        failed |= check((Case){set, lanes, 2, bits, part, m, rows, columns, group});
    }
    return failed | check((Case){set, lanes, 3, 4, OFFSETS, 13, 300, 1024, 128}); /* large enough to wake other threads */
}

int main(void) {
    int failed = check_sparse(1, 130, 64, 0) | check_sparse(3, 5, 1000, 1) | check_sparse(17, 70, 33, 0), lanes;
    failed |= check_sparse(1, 40, 70000, 1);
    const char *name;
    for (int set = 0; (name = lmpress_instruction_set(set, &lanes)); set++) {
        if (!lanes) continue;
        failed |= check_weights(set, lanes);
        for (int kind = FLOAT32; kind <= BFLOAT16; kind++)
            for (size_t b = 0; b < sizeof BATCHES / sizeof *BATCHES; b++)
                failed |= check_pruned(set, BATCHES[b], 33, 64, kind, 0x8000) |
                          check_pruned(set, BATCHES[b], 5, 203, kind, 0x10000) |
                          check_pruned(set, BATCHES[b], 50, 7, kind, 0x2000);
        failed |= check_block(set, (BlockShape){32, 4, 2, 6, 50, 1, 8}) |
                  check_block(set, (BlockShape){48, 3, 3, 16, 33, 37, 16}) |
                  check_block(set, (BlockShape){64, 8, 1, 20, 7, 100, 8});
        printf("%s: %s\n", name, failed ? "FAILED" : "ok");
    }
    return failed;
}
