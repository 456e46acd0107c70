/* Exported: products with packed weights. */
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
