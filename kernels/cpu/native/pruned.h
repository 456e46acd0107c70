/* Exported: products with pruned weights. */
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
