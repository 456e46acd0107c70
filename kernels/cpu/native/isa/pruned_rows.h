/* Products with pruned weights. */

/* The next LANES stored values, and the next LANES columns of a row: stored values if the bit of `mask` is set, else zero. */
#if defined(__x86_64__) && LANES == 16

TARGET INLINE Floats ISA(load_values)(const uint8_t *values, int kind) {
    if (kind == FLOAT32) return (Floats)_mm512_loadu_ps(values);
    __m256i halves = _mm256_loadu_si256((const __m256i *)values);
    return (Floats)(kind == FLOAT16 ? _mm512_cvtph_ps(halves)
                                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    __m512 stored = (__m512)ISA(load_values)(values, kind);
    __asm__("" : "+v"(stored)); /* else compilers expand from memory, which takes many times as long */
    return (Floats)_mm512_maskz_expand_ps((__mmask16)mask, stored);
}

#elif defined(__x86_64__) && LANES == 8

/* For every mask of 8 columns, the index of each column's value; -1 if it is not stored. */
static int8_t ISA(expand_index)[256][8];

__attribute__((constructor)) static void ISA(fill_expand_index)(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, next = 0; column < 8; column++)
            ISA(expand_index)[mask][column] = (int8_t)(mask >> column & 1 ? next++ : -1);
}

TARGET INLINE Floats ISA(load_values)(const uint8_t *values, int kind) {
    if (kind == FLOAT32) return (Floats)_mm256_loadu_ps((const float *)values);
    __m128i halves = _mm_loadu_si128((const __m128i *)values);
    return (Floats)(kind == FLOAT16 ? _mm256_cvtph_ps(halves)
                                    : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)ISA(expand_index)[mask]));
    __m256 columns = _mm256_permutevar8x32_ps((__m256)ISA(load_values)(values, kind), index);
    return (Floats)_mm256_blendv_ps(columns, _mm256_setzero_ps(), (__m256)index);
}

#else

TARGET INLINE float ISA(value)(const uint8_t *from, int kind) {
    float value;
    uint16_t half;
    memcpy(&value, from, kind == FLOAT32 ? sizeof value : 0);
    memcpy(&half, from, sizeof half);
    return kind == FLOAT32 ? value : kind == FLOAT16 ? half_to_float(half) : float_from_bits((uint32_t)half << 16);
}
TARGET INLINE Floats ISA(load_values)(const uint8_t *values, int kind) {
    Floats columns;
    for (int j = 0; j < LANES; j++) columns[j] = ISA(value)(values + j * value_bytes(kind), kind);
    return columns;
}
TARGET INLINE Floats ISA(expand)(const uint8_t *values, uint32_t mask, int kind) {
    Floats columns = {0};
    for (int j = 0; j < LANES; j++) {
        if (!(mask >> j & 1)) continue;
        columns[j] = ISA(value)(values, kind);
        values += value_bytes(kind);
    }
    return columns;
}

#endif

/* The position in the stored values of a row. Near the end of all values they are copied, because whole vectors are read. */
typedef struct {
    const uint8_t *next, *end;
    uint8_t last[MASK_COLUMNS * 4];
} ISA(Reader);

TARGET INLINE ISA(Reader) ISA(reader)(const Pruned *w, int64_t row, int kind) {
    const uint8_t *end = w->values + w->starts[w->rows] * value_bytes(kind);
    return (ISA(Reader)){w->values + w->starts[row] * value_bytes(kind), end, {0}};
}

TARGET INLINE const uint8_t *ISA(next_values)(ISA(Reader) * reader, uint64_t word, int kind) {
    const uint8_t *values = reader->next;
    if (reader->end - values < MASK_COLUMNS * value_bytes(kind)) {
        memcpy(reader->last, values, (size_t)(reader->end - values));
        values = reader->last;
    }
    reader->next += __builtin_popcountll(word) * value_bytes(kind);
    prefetch(reader->next, MASK_COLUMNS * value_bytes(kind) / 2);
    return values;
}

/* The sum of all lanes: the upper half is added to the lower half until one lane is left. */
TARGET INLINE float ISA(sum_lanes)(Floats sums) {
    float lanes[LANES];
    memcpy(lanes, &sums, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The same in registers: several times as fast by itself, but it makes `pruned_rows` slower by a quarter. */
TARGET INLINE float ISA(sum_lanes_in_registers)(Floats sums) {
#if defined(__x86_64__) && LANES >= 8
#if LANES == 16
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)sums),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)sums), 1)));
#else
    __m256 eight = (__m256)sums;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    return ISA(sum_lanes)(sums);
#endif
}

/* `weight_rows` rows of the weight from `row` on by `rows` rows of activations from `start` on, loaded once for all of them. */
TARGET INLINE void ISA(pruned_rows)(const PrunedProduct *p, int64_t row, int weight_rows, int64_t start, int rows, int kind) {
    const Pruned *w = p->w;
    ISA(Reader) readers[2];
    Floats sums[2][MAX_ROWS] = {{{0}}};
#pragma GCC unroll 2
    for (int i = 0; i < weight_rows; i++) readers[i] = ISA(reader)(w, row + i, kind);
    const float *x = p->x + start * p->stride;
    int accumulators = rows == 1 ? 4 : 1;
    for (int64_t k = 0; k < w->columns; k += MASK_COLUMNS, x += MASK_COLUMNS) {
        uint64_t words[2];
        const uint8_t *values[2];
#pragma GCC unroll 2
        for (int i = 0; i < weight_rows; i++) {
            words[i] = mask_word(w, row + i, k);
            values[i] = ISA(next_values)(&readers[i], words[i], kind);
        }
#pragma GCC unroll 16
        for (int part = 0; part < MASK_COLUMNS / LANES; part++) {
            Floats weight[2];
#pragma GCC unroll 2
            for (int i = 0; i < weight_rows; i++) {
                uint32_t mask = (uint32_t)(words[i] >> (part * LANES)) & ((1u << LANES) - 1);
                weight[i] = ISA(expand)(values[i], mask, kind);
                values[i] += __builtin_popcount(mask) * value_bytes(kind);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                Floats columns = ISA(load_floats)(x + r * p->stride + part * LANES);
#pragma GCC unroll 2
                for (int i = 0; i < weight_rows; i++) sums[i][r + part % accumulators] += weight[i] * columns;
            }
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < weight_rows; i++) {
        if (rows == 1) sums[i][0] = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
#pragma GCC unroll 8 /* else the sums live in memory */
        for (int r = 0; r < rows; r++) p->y[(start + r) * w->rows + row + i] = ISA(sum_lanes)(sums[i][r]);
    }
}

/* As many rows of the weight at a time as fit the registers. */
TARGET INLINE void ISA(pruned_block)(const PrunedProduct *p, int64_t row, int64_t last, int64_t start, int rows, int kind) {
    if (LANES == 16 && rows > 1)
        for (; row + 2 <= last; row += 2) ISA(pruned_rows)(p, row, 2, start, rows, kind);
    for (; row < last; row++) ISA(pruned_rows)(p, row, 1, start, rows, kind);
}

TARGET INLINE void ISA(pruned_of_kind)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block, int kind) {
    if (TILE == 1 || block.rows == 1)
        ISA(pruned_block)(p, row, last, block.start, 1, kind);
    else if (block.rows == 4)
        ISA(pruned_block)(p, row, last, block.start, 4, kind);
    else
        ISA(pruned_block)(p, row, last, block.start, 8, kind);
}

/* The same for rows of which all values are stored. */
TARGET INLINE void ISA(dense_rows)(const PrunedProduct *p, int64_t row, int64_t last, int64_t start, int rows, int kind) {
    const Pruned *w = p->w;
    int accumulators = rows == 1 ? 4 : 1;
    for (; row < last; row++) {
        const uint8_t *values = w->values + w->starts[row] * value_bytes(kind);
        const float *x = p->x + start * p->stride;
        Floats sums[MAX_ROWS] = {{0}};
        int64_t left = w->columns;
        for (; left >= 4 * LANES; left -= 4 * LANES, x += 4 * LANES, values += 4 * LANES * value_bytes(kind)) {
            prefetch(values, 4 * LANES * value_bytes(kind));
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                Floats weight = ISA(load_values)(values + part * LANES * value_bytes(kind), kind);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    sums[r + part % accumulators] += weight * ISA(load_floats)(x + r * p->stride + part * LANES);
            }
        }
        for (; left > 0; left -= LANES, x += LANES, values += LANES * value_bytes(kind)) {
            uint8_t last_values[4 * LANES] = {0};
            memcpy(last_values, values, (size_t)(min64(left, LANES) * value_bytes(kind)));
            Floats weight = ISA(load_values)(last_values, kind);
            for (int r = 0; r < rows; r++) sums[r] += weight * ISA(load_floats)(x + r * p->stride);
        }
        if (rows == 1) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) p->y[(start + r) * w->rows + row] = ISA(sum_lanes_in_registers)(sums[r]);
    }
}

TARGET INLINE void ISA(dense_of_kind)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block, int kind) {
    if (TILE == 1 || block.rows == 1)
        ISA(dense_rows)(p, row, last, block.start, 1, kind);
    else if (block.rows == 4)
        ISA(dense_rows)(p, row, last, block.start, 4, kind);
    else
        ISA(dense_rows)(p, row, last, block.start, 8, kind);
}

TARGET static void ISA(multiply_dense)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block) {
    switch (p->w->kind) {
    case FLOAT32:
        ISA(dense_of_kind)(p, row, last, block, FLOAT32);
        break;
    case FLOAT16:
        ISA(dense_of_kind)(p, row, last, block, FLOAT16);
        break;
    default:
        ISA(dense_of_kind)(p, row, last, block, BFLOAT16);
    }
}

TARGET static void ISA(multiply_pruned)(const PrunedProduct *p, int64_t row, int64_t last, RowBlock block) {
    switch (p->w->kind) {
    case FLOAT32:
        ISA(pruned_of_kind)(p, row, last, block, FLOAT32);
        break;
    case FLOAT16:
        ISA(pruned_of_kind)(p, row, last, block, FLOAT16);
        break;
    default:
        ISA(pruned_of_kind)(p, row, last, block, BFLOAT16);
    }
}

TARGET static void ISA(to_dense)(const Pruned *w, int64_t row, float *out) {
    int size = value_bytes(w->kind);
    ISA(Reader) reader = ISA(reader)(w, row, w->kind);
    for (int64_t k = 0; k < w->columns; k += MASK_COLUMNS) {
        uint64_t word = mask_word(w, row, k);
        const uint8_t *values = ISA(next_values)(&reader, word, w->kind);
        for (int64_t column = k; column < min64(k + MASK_COLUMNS, w->columns); column += LANES) {
            uint32_t mask = (uint32_t)(word >> (column - k)) & ((1u << LANES) - 1);
            Floats weight = ISA(expand)(values, mask, w->kind);
            memcpy(out + column, &weight, (size_t)min64(LANES, w->columns - column) * sizeof(float));
            values += __builtin_popcount(mask) * size;
        }
    }
}
