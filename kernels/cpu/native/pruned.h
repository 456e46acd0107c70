/* Exported: products with pruned weights, and pruned weights as dense floats. */

typedef struct {
    const InstructionSet *set;
    PrunedProduct product;
} PrunedRun;

enum { PRUNED_ROWS = 16 }; /* rows of the weight per share of a thread */

static void pruned_share(void *context, int64_t share) {
    const PrunedRun *run = context;
    const PrunedProduct *p = &run->product;
    int64_t first = share * PRUNED_ROWS, last = min64(p->w->rows, first + PRUNED_ROWS);
    int max_rows = run->set->max_rows, dense = p->w->starts[last] - p->w->starts[first] == (last - first) * p->w->columns;
    for (RowBlock b = next_row_block(p->m, max_rows, (RowBlock){0, 0}); b.start < p->m; b = next_row_block(p->m, max_rows, b))
        (dense ? run->set->multiply_dense : run->set->multiply_pruned)(p, first, last, b);
}

/* y[m][rows] = x[m][columns] W^T for a pruned W. Returns 0, or -1 if there is no memory for padded rows of x. */
int lmpress_pruned_linear(int index, const Pruned *w, int threads, const float *x, int64_t m, float *y) {
    int64_t stride = ceil_div(w->columns, MASK_COLUMNS) * MASK_COLUMNS;
    float *padded = NULL;
    if (stride != w->columns) {
        padded = calloc((size_t)(m * stride), sizeof(float));
        if (!padded) return -1;
        for (int64_t r = 0; r < m; r++) memcpy(padded + r * stride, x + r * w->columns, (size_t)w->columns * sizeof(float));
    }
    PrunedRun run = {&INSTRUCTION_SETS[index], {w, padded ? padded : x, y, m, stride}};
    if ((double)w->starts[w->rows] * (double)m < 1 << 17) threads = 1;
    parallel(threads, ceil_div(w->rows, PRUNED_ROWS), pruned_share, &run);
    free(padded);
    return 0;
}

typedef struct {
    const InstructionSet *set;
    const Pruned *w;
    int64_t first;
    float *out;
} ToDenseRun;

static void to_dense_share(void *context, int64_t i) {
    const ToDenseRun *run = context;
    run->set->to_dense(run->w, run->first + i, run->out + i * run->w->columns);
}

/* The rows first .. first + count - 1 of a pruned weight as floats: out[count][columns]. */
void lmpress_pruned_to_dense(int index, const Pruned *w, int threads, int64_t first, int64_t count, float *out) {
    ToDenseRun run = {&INSTRUCTION_SETS[index], w, first, out};
    parallel(threads, count, to_dense_share, &run);
}
