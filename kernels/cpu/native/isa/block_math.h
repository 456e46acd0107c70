/* The arithmetic of a decoder block besides its linears: norms, gates, attention. */

/* Per lane: `a` if `mask` is -1, `b` if it is 0. */
TARGET INLINE Floats ISA(select)(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

/* e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor series. */
TARGET INLINE Floats ISA(exp)(Floats x) {
    x = ISA(select)(x < -87.0f, ISA(broadcast)(-87.0f), x); /* NaN stays NaN */
    x = ISA(select)(x > 88.0f, ISA(broadcast)(88.0f), x);
    Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f, r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats sum = ISA(broadcast)(1.0f / 5040);
    const float inverse[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 7
    for (int i = 0; i < 7; i++) sum = sum * r + inverse[i];
    return sum * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

TARGET INLINE float ISA(dot_floats)(const float *a, const float *b, int64_t count) {
    Floats sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
#pragma GCC unroll 4
        for (int way = 0; way < 4; way++)
            sums[way] += ISA(load_floats)(a + i + way * LANES) * ISA(load_floats)(b + i + way * LANES);
    for (; i + LANES <= count; i += LANES) sums[0] += ISA(load_floats)(a + i) * ISA(load_floats)(b + i);
    float sum = ISA(sum_lanes_in_registers)((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* y = weight * x / sqrt(mean(x^2) + epsilon); y may be x. */
TARGET static void ISA(norm)(const float *x, const float *weight, float epsilon, int64_t count, float *y) {
    float scale = 1 / __builtin_sqrtf(ISA(dot_floats)(x, x, count) / (float)count + epsilon);
    for (int64_t i = 0; i < count; i++) y[i] = weight[i] * (x[i] * scale);
}

/* y *= silu(gates), where silu(g) = g / (1 + e^-g). */
TARGET static void ISA(gate)(const float *gates, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        size_t bytes = (size_t)min64(LANES, count - i) * sizeof(float);
        Floats g = {0}, value = {0};
        memcpy(&g, gates + i, bytes);
        memcpy(&value, y + i, bytes);
        value *= g / (1.0f + ISA(exp)(-g));
        memcpy(y + i, &value, bytes);
    }
}

/* The attention of one query head: the mean of the values, weighted by softmax(scaling * q k). */
TARGET static void ISA(attend)(const Attention *a, int64_t head) {
    const Block *b = a->block;
    int64_t size = b->head_size, shared = head / (b->heads / b->kv_heads);
    const float *query = a->queries + head * size, *keys = a->keys + shared * a->key_stride;
    const float *values = a->values + shared * a->value_stride;
    float *weights = a->scores + head * a->length, *y = a->y + head * size, most = -__builtin_inff();
    for (int64_t t = 0; t < a->length; t++) {
        weights[t] = b->scaling * ISA(dot_floats)(query, keys + t * size, size);
        most = weights[t] > most ? weights[t] : most;
    }
    Floats total = {0};
    for (int64_t t = 0; t < a->length; t += LANES) {
        size_t bytes = (size_t)min64(LANES, a->length - t) * sizeof(float);
        Floats scores = ISA(broadcast)(-__builtin_inff());
        memcpy(&scores, weights + t, bytes);
        Floats shares = ISA(exp)(scores - most);
        memcpy(weights + t, &shares, bytes);
        total += shares;
    }
    float sum = ISA(sum_lanes_in_registers)(total);
    memset(y, 0, (size_t)size * sizeof(float));
    for (int64_t t = 0; t < a->length; t++)
        for (int64_t i = 0; i < size; i++) y[i] += weights[t] * values[t * size + i];
    for (int64_t i = 0; i < size; i++) y[i] /= sum;
}
