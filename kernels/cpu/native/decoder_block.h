/* Exported: a decoder block for one token, in two calls: the caller appends keys and values to its cache between them. */

/* y[i] = x W[first + i]^T + its bias for the row x: in one product if the weights take the same packed activations. */
static int project(const InstructionSet *set, const Block *b, const Mode *mode, int first, int count, const float *x,
                   float *const *y) {
    const Weight *const *w = b->weights + first;
    int together = 1, failed = 0;
    for (int i = 1; i < count; i++) together &= packed_alike(w[0], w[i]);
    if (together) failed = multiply_packed(set, w, count, mode, x, 1, y);
    for (int i = 0; i < count && !together && !failed; i++) failed = multiply_packed(set, w + i, 1, mode, x, 1, y + i);
    for (int i = 0; i < count && !failed; i++)
        for (int64_t n = 0; b->biases[first + i] && n < w[i]->rows; n++) y[i][n] += b->biases[first + i][n];
    return failed;
}

/* Normalize `heads` heads if they have a norm, then rotate them to the position whose angles have these cosines and sines
 * (RoPE); the two numbers of a pair lie half a head apart. */
static void rotate_heads(const InstructionSet *set, const Block *b, int norm, const float *cosines, const float *sines,
                         int64_t heads, float *x) {
    int64_t half = b->head_size / 2;
    for (; heads > 0; heads--, x += b->head_size) {
        if (b->norms[norm]) set->norm(x, b->norms[norm], b->epsilons[norm], b->head_size, x);
        for (int64_t i = 0; i < half; i++) {
            float low = x[i], high = x[half + i];
            x[i] = low * cosines[i] - high * sines[i];
            x[half + i] = high * cosines[half + i] + low * sines[half + i];
        }
    }
}

/* The first half for one token x[columns]: its queries, keys and values, [heads][head_size] each. Returns 0, or -1 if out of
 * memory. */
int lmpress_decode_project(int index, const Block *b, const Mode *mode, const float *x, const float *cosines,
                           const float *sines, float *queries, float *keys, float *values) {
    const InstructionSet *set = &INSTRUCTION_SETS[index];
    int64_t columns = b->weights[QUERY]->columns;
    float *normed = malloc((size_t)columns * sizeof(float));
    if (!normed) return -1;
    set->norm(x, b->norms[NORM_ATTENTION], b->epsilons[NORM_ATTENTION], columns, normed);
    int failed = project(set, b, mode, QUERY, 3, normed, (float *[]){queries, keys, values});
    free(normed);
    rotate_heads(set, b, NORM_QUERY, cosines, sines, b->heads, queries);
    rotate_heads(set, b, NORM_KEY, cosines, sines, b->kv_heads, keys);
    return failed;
}

typedef struct {
    const InstructionSet *set;
    Attention attention;
} AttentionRun;

static void attend_share(void *context, int64_t head) {
    const AttentionRun *a = context;
    a->set->attend(&a->attention, head);
}

/*
 * The second half: y[columns] = the block's output for the token x, whose queries attend to `length` keys and values:
 * [kv_heads][length][head_size], each head a stride behind the previous one. Returns 0, or -1 if out of memory.
 */
int lmpress_decode_attend(int index, const Block *b, const Mode *mode, const float *x, const float *queries, const float *keys,
                         int64_t key_stride, const float *values, int64_t value_stride, int64_t length, float *y) {
    const InstructionSet *set = &INSTRUCTION_SETS[index];
    int64_t columns = b->weights[QUERY]->columns, width = b->weights[GATE]->rows, attended = b->heads * b->head_size;
    float *memory = malloc((size_t)(2 * columns + 2 * width + attended + b->heads * length) * sizeof(float));
    if (!memory) return -1;
    float *normed = memory, *change = normed + columns, *gates = change + columns;
    float *inner = gates + width, *heads = inner + width;
    AttentionRun run = {set, {b, queries, keys, values, length, key_stride, value_stride, heads + attended, heads}};
    parallel((double)attended * (double)length < 1 << 16 ? 1 : mode->threads, b->heads, attend_share, &run);
    int failed = project(set, b, mode, OUT, 1, heads, &change);
    for (int64_t i = 0; i < columns; i++) y[i] = x[i] + change[i];
    set->norm(y, b->norms[NORM_MLP], b->epsilons[NORM_MLP], columns, normed);
    failed = failed || project(set, b, mode, GATE, 2, normed, (float *[]){gates, inner});
    set->gate(gates, inner, width);
    failed = failed || project(set, b, mode, DOWN, 1, inner, &change);
    for (int64_t i = 0; i < columns; i++) y[i] += change[i];
    free(memory);
    return failed;
}
