/* Exported: the instruction sets, products with packed weights, and packed weights as floats. */

/* Name of instruction set `index`, best first, or NULL past the last one; `lanes` is 0 if this machine lacks it. */
const char *lmpress_instruction_set(int index, int *lanes) {
    if (index < 0 || index >= INSTRUCTION_SET_COUNT) return NULL;
    *lanes = INSTRUCTION_SETS[index].supported() ? INSTRUCTION_SETS[index].lanes : 0;
    return INSTRUCTION_SETS[index].name;
}

enum { MAX_WEIGHTS = 3 }; /* of one input: those of queries, keys and values */

typedef struct {
    const InstructionSet *set;
    Product products[MAX_WEIGHTS]; /* the same but for their weights and outputs */
    int64_t panels[MAX_WEIGHTS];
    int count;
} LinearRun;

/* Outlier columns are multiplied separately: in `masked_x` they are zero, so that they widen no scale. */
static void split_outliers(Product *p) {
    const Weight *w = p->w;
    memcpy(p->masked_x, p->x, (size_t)(p->m * w->columns) * sizeof(float));
    for (int64_t r = 0; r < p->m; r++)
        for (int64_t j = 0; j < w->outlier_count; j++) {
            float *place = p->masked_x + r * w->columns + w->outlier_columns[j];
            p->outlier_x[r * w->outlier_count + j] = *place;
            *place = 0;
        }
}

static void pack_share(void *context, int64_t index) {
    LinearRun *run = context;
    RowBlock block = {0, 0};
    for (int64_t i = 0; i <= index; i++) block = next_row_block(run->products[0].m, run->set->max_rows, block);
    run->set->pack_inputs(&run->products[0], block);
}

static void multiply_share(void *context, int64_t panel) {
    const LinearRun *run = context;
    int64_t m = run->products[0].m;
    int max_rows = run->set->max_rows, i = 0;
    for (; panel >= run->panels[i]; i++) panel -= run->panels[i];
    for (RowBlock b = next_row_block(m, max_rows, (RowBlock){0, 0}); b.start < m; b = next_row_block(m, max_rows, b))
        run->set->multiply(&run->products[i], panel, b);
}

static void *arena_alloc(char **arena, int64_t bytes) {
    void *piece = *arena;
    *arena += ceil_div(bytes, 64) * 64;
    return piece;
}

/* Whether `a` and `b` take the same packed activations. */
static int packed_alike(const Weight *a, const Weight *b) {
    return a->columns == b->columns && a->group == b->group && a->bits == b->bits && has_offsets(a) == has_offsets(b) &&
           !a->outlier_count && !b->outlier_count;
}

/* y[i][m][rows] = x[m][columns] W[i]^T for up to MAX_WEIGHTS weights that take the same packed activations. Returns 0, or -1 if
 * out of memory. */
static int multiply_packed(const InstructionSet *set, const Weight *const *weights, int count, const Mode *mode, const float *x,
                           int64_t m, float *const *y) {
    const Weight *w = weights[0];
    int64_t groups = groups_of(w), padded = row_blocks(w) * block_columns(w->bits);
    int64_t rows = min64(m, CHUNK_ROWS), values = mode->activations == FLOATS ? 4 : 1;
    int64_t outlier_floats = w->outlier_count ? w->columns + w->outlier_count : 0;
    char *memory = malloc((size_t)(rows * (padded * values + (3 * groups + outlier_floats) * 4) + 6 * 64 + 64));
    if (!memory) return -1;
    char *arena = memory + (-(uintptr_t)memory & 63);
    Product p = {w, mode, x, NULL, 0, groups, padded, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    p.quads = arena_alloc(&arena, rows * padded * values);
    p.floats = (float *)p.quads;
    p.scales = arena_alloc(&arena, rows * groups * 4);
    p.code_sums = arena_alloc(&arena, rows * groups * 4);
    p.sums = arena_alloc(&arena, rows * groups * 4);
    if (outlier_floats) {
        p.masked_x = arena_alloc(&arena, rows * w->columns * 4);
        p.outlier_x = arena_alloc(&arena, rows * w->outlier_count * 4);
    }
    LinearRun run = {.set = set, .count = count};
    int64_t panels = 0, outputs = 0;
    for (int i = 0; i < count; i++) {
        outputs += weights[i]->rows;
        panels += run.panels[i] = ceil_div(weights[i]->rows, set->lanes);
    }
    /* A product of a few microseconds ends before a second thread is awake. */
    int threads = (double)outputs * (double)w->columns * (double)m < 1 << 18 ? 1 : mode->threads;
    for (int64_t done = 0; done < m; done += p.m, p.x += p.m * w->columns) {
        p.m = min64(CHUNK_ROWS, m - done);
        if (outlier_floats) split_outliers(&p);
        for (int i = 0; i < count; i++) {
            run.products[i] = p;
            run.products[i].w = weights[i];
            run.products[i].y = y[i] + done * weights[i]->rows;
        }
        int64_t blocks = 0;
        for (RowBlock b = next_row_block(p.m, set->max_rows, (RowBlock){0, 0}); b.start < p.m;
             b = next_row_block(p.m, set->max_rows, b))
            blocks++;
        parallel(threads, blocks, pack_share, &run);
        parallel(threads, panels, multiply_share, &run);
    }
    free(memory);
    return 0;
}

/* y[m][rows] = x[m][columns] W^T. Returns 0, or -1 if there is no memory for the packed activations. */
int lmpress_linear(int index, const Weight *w, const Mode *mode, const float *x, int64_t m, float *y) {
    return multiply_packed(&INSTRUCTION_SETS[index], &w, 1, mode, x, m, &y);
}

typedef struct {
    const InstructionSet *set;
    const Weight *w;
    int64_t first;
    float *out;
    int64_t stride;
} DequantizeRun;

static void dequantize_share(void *context, int64_t i) {
    const DequantizeRun *run = context;
    run->set->dequantize(run->w, run->first + i, run->out + i * run->set->lanes, run->stride);
}

/* The panels first .. first + count - 1 as floats, transposed: out[columns][stride], row r of these panels in column r. */
void lmpress_dequantize(int index, const Weight *w, int threads, int64_t first, int64_t count, float *out, int64_t stride) {
    DequantizeRun run = {&INSTRUCTION_SETS[index], w, first, out, stride};
    parallel(threads, count, dequantize_share, &run);
}
