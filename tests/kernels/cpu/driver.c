/* Runs every kernel on buffers of exactly the size that it may touch, for sanitizers and for emulators of other machines.
 * Exact products are compared with the dequantized weight, products of int8 activations with a tolerance of their own.
 */
#include "../../../kernels/cpu/lmpress_cpu.c"

#include <math.h>
#include <stdio.h>

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }
static float uniform(void) { return (float)(draw() >> 8) / (1 << 23) - 1; }

static float *floats(int64_t n) {
    float *values = malloc((size_t)n * sizeof *values);
    for (int64_t i = 0; i < n; i++) values[i] = uniform();
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

static const float SPECIAL[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-42f, -0.0f, 0};

enum { PLAIN, OFFSETS, TABLE, LEVELS, KEPT, HALVES };

static uint16_t any_half(void) { return (uint16_t)(0x3000 | (draw() >> 16 & 0x83ff)); }

static int check(int set, int lanes, int bits, int extra, int64_t m, int64_t rows, int64_t columns,
                 int64_t group, int threads) {
    int with_table = extra == TABLE;
    Weight w = {.rows = rows, .columns = columns, .group = group, .bits = bits, .center = with_table ? 0 : 1 << (bits - 1)};
    int64_t panels = ceil_div(rows, lanes), groups = groups_of(&w);
    int64_t bytes = panels * row_blocks(&w) * block_vectors(bits) * 4 * lanes;
    uint8_t *codes = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) codes[i] = (uint8_t)(draw() >> 16);
    float *scales = floats(panels * groups * lanes), *offsets = floats(panels * groups * lanes), *table = floats(16);
    int64_t tiles = ceil_div(rows, TILE_ROWS) * groups;
    uint8_t *levels = malloc((size_t)(tiles * TILE_ROWS));
    uint16_t *grids = malloc((size_t)tiles * 4 * sizeof *grids);
    for (int64_t i = 0; i < tiles * TILE_ROWS; i++) levels[i] = (uint8_t)(draw() >> 16);
    for (int64_t i = 0; i < tiles * 4; i++) grids[i] = any_half();
    w.codes = codes;
    uint16_t *halves = malloc((size_t)(panels * groups * lanes) * sizeof *halves);
    for (int64_t i = 0; i < panels * groups * lanes; i++) halves[i] = any_half();
    w.halves = extra == HALVES;
    w.scales = extra == LEVELS ? NULL : extra == HALVES ? (void *)halves : scales;
    w.offsets = extra == OFFSETS ? (void *)offsets : extra == HALVES ? halves : NULL;
    w.table = with_table ? table : NULL;
    int32_t kept[] = {0, (int32_t)columns / 2, (int32_t)columns - 1};
    uint16_t *apart = malloc((size_t)(panels * 3 * lanes) * sizeof *apart);
    for (int64_t i = 0; i < panels * 3 * lanes; i++) apart[i] = any_half();
    w.kept = kept;
    w.apart = apart;
    w.kept_count = extra != KEPT ? 0 : columns < 3 ? 1 : 3;
    w.levels = extra == LEVELS ? levels : NULL;
    w.grids = extra == LEVELS ? grids : NULL;
    float *x = floats(m * columns), *y = floats(m * rows), *expected = calloc((size_t)(m * rows), sizeof *expected);
    float *given = malloc((size_t)(m * columns) * sizeof *given);
    memcpy(given, x, (size_t)(m * columns) * sizeof *given);
    float *dense = floats(columns * rows);
    lmpress_dequantize(set, &w, threads, 0, panels, dense, rows);
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++) {
            double sum = 0;
            for (int64_t k = 0; k < columns; k++) sum += (double)x[i * columns + k] * dense[k * rows + n];
            expected[i * rows + n] = (float)sum;
        }
    int failed = 0;
    for (int activations = FLOATS; activations <= (with_table ? FLOATS : INT8_TOKENS); activations++) {
        Mode mode = {activations, threads, 127};
        lmpress_linear(set, &w, &mode, x, m, y);
        double error = distance(y, expected, m * rows);
        if (!(error <= (activations == FLOATS ? 1e-5 : 3e-2))) {
            printf("set %d bits %d m %d rows %d columns %d group %d mode %d: error %g\n", set, bits, (int)m, (int)rows,
                   (int)columns, (int)group, activations, error);
            failed = 1;
        }
        /* Numbers of any kind, whose sums are none: nothing may be read or written elsewhere for them. */
        for (int64_t i = 0; i < m * columns; i += 1 + draw() % 3) x[i] = SPECIAL[draw() >> 16 & 7];
        lmpress_linear(set, &w, &mode, x, m, y);
        for (int64_t i = 0; i < m * columns; i++) x[i] = given[i];
    }
    free(given), free(codes), free(scales), free(offsets), free(table), free(x), free(y), free(expected), free(dense);
    free(levels), free(grids), free(apart), free(halves);
    return failed;
}

static int check_sparse(int64_t m, int64_t rows, int64_t width, int wide) {
    int64_t *starts = calloc((size_t)rows + 1, sizeof *starts);
    for (int64_t r = 0; r < rows; r++) starts[r + 1] = starts[r] + draw() % 7;
    void *columns = malloc((size_t)(starts[rows] * (wide ? 4 : 2)));
    uint16_t *values = malloc((size_t)starts[rows] * sizeof *values);
    for (int64_t i = 0; i < starts[rows]; i++) {
        uint32_t column = draw() % (uint32_t)width;
        if (wide)
            ((uint32_t *)columns)[i] = column;
        else
            ((uint16_t *)columns)[i] = (uint16_t)column;
        values[i] = any_half();
    }
    float *x = floats(m * width), *y = floats(m * rows), *expected = floats(m * rows);
    for (int64_t i = 0; i < m * rows; i++) expected[i] = y[i];
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t e = starts[r]; e < starts[r + 1]; e++)
                expected[i * rows + r] +=
                    from_half(values[e]) *
                    x[i * width + (wide ? ((uint32_t *)columns)[e] : ((uint16_t *)columns)[e])];
    lmpress_add_sparse(2, starts, columns, wide, values, rows, width, x, m, y);
    int failed = !(distance(y, expected, m * rows) <= 1e-5);
    if (failed) printf("sparse rows %d width %d: wrong\n", (int)rows, (int)width);
    free(starts), free(columns), free(values), free(x), free(y), free(expected);
    return failed;
}

static int check_pruned(int set, int64_t m, int64_t rows, int64_t columns, int kind, uint32_t density) {
    int64_t bytes = ceil_div(columns, 8), *starts = calloc((size_t)rows + 1, sizeof *starts);
    uint8_t *mask = calloc((size_t)(rows * bytes), 1);
    for (int64_t r = 0; r < rows; r++) {
        starts[r + 1] = starts[r];
        for (int64_t k = 0; k < columns; k++)
            if (draw() >> 16 < density) mask[r * bytes + k / 8] |= (uint8_t)(1 << (k % 8)), starts[r + 1]++;
    }
    uint8_t *values = malloc((size_t)(starts[rows] * value_bytes(kind)));
    for (int64_t i = 0; i < starts[rows]; i++) {
        float value = uniform();
        uint16_t half = kind == FLOAT16 ? (uint16_t)(0x3c00 | (draw() >> 16 & 0x83ff)) : (uint16_t)(bits_of(value) >> 16);
        memcpy(values + i * value_bytes(kind), kind == FLOAT32 ? (void *)&value : (void *)&half, (size_t)value_bytes(kind));
    }
    Pruned w = {mask, values, starts, rows, columns, kind};
    float *x = floats(m * columns), *y = floats(m * rows), *expected = floats(m * rows), *dense = floats(rows * columns);
    lmpress_unfold(set, &w, 1, 0, rows, dense);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t k = 0; k < columns; k++) {
                int stored = mask[r * bytes + k / 8] >> (k % 8) & 1;
                sum += (double)x[i * columns + k] * (stored ? dense[r * columns + k] : 0);
            }
            expected[i * rows + r] = (float)sum;
        }
    lmpress_pruned_linear(set, &w, 2, x, m, y);
    int failed = !(distance(y, expected, m * rows) <= 1e-5);
    if (failed) printf("set %d pruned m %d rows %d columns %d kind %d: wrong\n", set, (int)m, (int)rows, (int)columns, kind);
    free(starts), free(mask), free(values), free(x), free(y), free(expected), free(dense);
    return failed;
}

static Weight any_weight(int lanes, int64_t rows, int64_t columns, int64_t group) {
    Weight w = {.rows = rows, .columns = columns, .group = group, .bits = 4, .center = 8};
    int64_t panels = ceil_div(rows, lanes), bytes = panels * row_blocks(&w) * 4 * lanes, scales = panels * groups_of(&w) * lanes;
    uint8_t *codes = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++) codes[i] = (uint8_t)(draw() >> 16);
    float *values = floats(scales);
    for (int64_t i = 0; i < scales; i++) values[i] /= 4 * sqrtf((float)columns);
    w.codes = codes;
    w.scales = values;
    return w;
}

static void reference_linear(int set, const Block *b, int which, const float *x, float *y) {
    const Weight *w = b->weights[which];
    float *dense = floats(w->columns * w->rows);
    lmpress_dequantize(set, w, 1, 0, ceil_div(w->rows, SETS[set].lanes), dense, w->rows);
    for (int64_t n = 0; n < w->rows; n++) {
        double sum = b->biases[which] ? b->biases[which][n] : 0;
        for (int64_t k = 0; k < w->columns; k++) sum += (double)x[k] * dense[k * w->rows + n];
        y[n] = (float)sum;
    }
    free(dense);
}

static void reference_norm(const float *x, const float *weight, float epsilon, int64_t n, float *y) {
    double squares = 0;
    for (int64_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    for (int64_t i = 0; i < n; i++) y[i] = (float)(weight[i] * x[i] / sqrt(squares / (double)n + epsilon));
}

/* One token by a block, whose past is random, against the same in doubles. */
static int check_block(int set, int lanes, int64_t hidden, int64_t heads, int64_t shared, int64_t size, int64_t width, int64_t length,
                       int group) {
    int64_t rows[] = {heads * size, shared * size, shared * size, hidden, width, width, hidden};
    int64_t columns[] = {hidden, hidden, hidden, heads * size, hidden, hidden, width}, attended = heads * size;
    Weight w[WEIGHTS];
    Block b = {.scaling = 0.4f, .heads = heads, .kv_heads = shared, .head_size = size};
    for (int i = 0; i < WEIGHTS; i++) {
        w[i] = any_weight(lanes, rows[i], columns[i], i == VALUE && group > 8 ? columns[i] : group); /* alike, or not */
        b.weights[i] = &w[i];
        if (i % 2) b.biases[i] = floats(rows[i]);
    }
    for (int i = 0; i < NORMS; i++) b.norms[i] = floats(i < NORM_QUERY ? hidden : size), b.epsilons[i] = 1e-5f;
    float *x = floats(hidden), *cosines = floats(size), *sines = floats(size), *queries = floats(attended);
    float *k = floats(shared * size), *v = floats(shared * size), *y = floats(hidden), *normed = floats(hidden);
    float *keys = floats(shared * length * size), *values = floats(shared * length * size), *inner = floats(width), *gates = floats(width);
    float *found[] = {queries, k, v}, *expected = floats(attended), *scores = floats(length), *change = floats(hidden), *out = floats(hidden);
    Mode mode = {FLOATS, 1, 127};
    int failed = lmpress_block_project(set, &b, &mode, x, cosines, sines, queries, k, v);
    reference_norm(x, b.norms[NORM_ATTENTION], 1e-5f, hidden, normed);
    for (int i = QUERY; i <= VALUE; i++) {
        reference_linear(set, &b, i, normed, expected);
        for (float *h = expected; i != VALUE && h < expected + rows[i]; h += size) {
            reference_norm(h, b.norms[i == QUERY ? NORM_QUERY : NORM_KEY], 1e-5f, size, h);
            for (int64_t j = 0; j < size / 2; j++) {
                float low = h[j], high = h[size / 2 + j];
                h[j] = low * cosines[j] - high * sines[j], h[size / 2 + j] = high * cosines[size / 2 + j] + low * sines[size / 2 + j];
            }
        }
        failed |= !(distance(found[i], expected, rows[i]) <= 1e-5);
    }
    failed |= lmpress_block_answer(set, &b, &mode, x, queries, keys, length * size, values, length * size, length, y);
    for (int64_t h = 0; h < heads; h++) {
        int64_t at = h / (heads / shared) * length * size;
        double total = 0;
        for (int64_t t = 0; t < length; t++) {
            double score = 0;
            for (int64_t j = 0; j < size; j++) score += (double)queries[h * size + j] * keys[at + t * size + j];
            total += scores[t] = (float)exp(0.4 * score);
        }
        for (int64_t j = 0; j < size; j++) {
            double sum = 0;
            for (int64_t t = 0; t < length; t++) sum += scores[t] / total * values[at + t * size + j];
            expected[h * size + j] = (float)sum;
        }
    }
    reference_linear(set, &b, OUT, expected, change);
    for (int64_t i = 0; i < hidden; i++) out[i] = x[i] + change[i];
    reference_norm(out, b.norms[NORM_MLP], 1e-5f, hidden, normed);
    reference_linear(set, &b, GATE, normed, gates);
    reference_linear(set, &b, UP, normed, inner);
    for (int64_t i = 0; i < width; i++) inner[i] *= gates[i] / (1 + expf(-gates[i]));
    reference_linear(set, &b, DOWN, inner, change);
    for (int64_t i = 0; i < hidden; i++) out[i] += change[i];
    failed |= !(distance(y, out, hidden) <= 1e-5);
    if (failed) printf("set %d block of %d heads of %d: wrong by %g\n", set, (int)heads, (int)size, distance(y, out, hidden));
    for (int i = 0; i < WEIGHTS; i++) free((void *)w[i].codes), free((void *)w[i].scales), free((void *)b.biases[i]);
    for (int i = 0; i < NORMS; i++) free((void *)b.norms[i]);
    free(x), free(cosines), free(sines), free(queries), free(k), free(v), free(y), free(normed), free(keys), free(values);
    free(inner), free(gates), free(expected), free(scores), free(change), free(out);
    return failed;
}

int main(void) {
    static const int64_t shapes[][3] = {{20, 24, 8}, {35, 172, 43}, {16, 256, 128}, {50, 344, 344}, {7, 100, 32}, {33, 600, 300}};
    static const int BITS[] = {2, 3, 4, 8};
    static const int64_t batches[] = {1, 13, 67};
    int failed = check_sparse(1, 130, 64, 0) | check_sparse(3, 5, 1000, 1) | check_sparse(17, 70, 33, 0), lanes;
    failed |= check_sparse(1, 40, 70000, 1);
    const char *name;
    for (int set = 0; (name = lmpress_set(set, &lanes)); set++) {
        if (!lanes) continue;
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            for (size_t b = 0; b < sizeof batches / sizeof *batches; b++)
                for (int bits = 2; bits <= 8; bits = bits < 4 ? bits + 1 : bits + 4)
                    for (int extra = PLAIN; extra <= HALVES; extra++)
                        if (bits == 4 || extra != TABLE) failed |= check(set, lanes, bits, extra, batches[b], shapes[s][0], shapes[s][1],
                                        shapes[s][2], 1);
        for (int kind = FLOAT32; kind <= BFLOAT16; kind++)
            for (size_t b = 0; b < sizeof batches / sizeof *batches; b++)
                failed |= check_pruned(set, batches[b], 33, 64, kind, 0x8000) | check_pruned(set, batches[b], 5, 203, kind, 0x10000) |
                          check_pruned(set, batches[b], 50, 7, kind, 0x2000);
        failed |= check_block(set, lanes, 32, 4, 2, 6, 50, 1, 8) | check_block(set, lanes, 48, 3, 3, 16, 33, 37, 16) |
                  check_block(set, lanes, 64, 8, 1, 20, 7, 100, 8);
        for (int i = 0; i < 300; i++) { /* any shape: one column, groups wider than the layer or of a single column */
            int bits = BITS[draw() >> 16 & 3], extra = (int)(draw() >> 16) % (HALVES + 1);
            int64_t m = 1 + (draw() >> 16) % 20, rows = 1 + (draw() >> 16) % 40, columns = 1 + (draw() >> 16) % 90;
            int64_t group = 1 + (draw() >> 16) % (i % 2 ? 8 : 120);
            failed |= check(set, lanes, extra == TABLE ? 4 : bits, extra, m, rows, columns, group, 2);
        }
        failed |= check(set, lanes, 4, OFFSETS, 13, 300, 1024, 128, 3); /* large enough to wake other threads */
        printf("%s: %s\n", name, failed ? "FAILED" : "ok");
    }
    return failed;
}
