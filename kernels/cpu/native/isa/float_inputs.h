/* Products with float activations. */

/* Column `j` of quad `q` as numbers: entries of the table, or code - center. */
TARGET INLINE Floats ISA(decode)(const uint8_t *block, int q, int j, int bits, int lookup, const float *table, float center) {
    if (lookup) {
        /* The look-up reads 4 bits of an index; the bits above need not be cleared. */
        Words quad = bits == 4 ? ISA(load_words)(block) >> (4 * q) : ISA(quad)(block, q, bits);
        return ISA(lookup)(table, quad >> (8 * j));
    }
    return __builtin_convertvector((Ints)((ISA(quad)(block, q, bits) >> (8 * j)) & 0xff), Floats) - center;
}

TARGET INLINE void ISA(float_block)(Floats *sums, const uint8_t *codes, const float *x, int bits, int rows, int lookup,
                                    const ISA(Table) * table, float center) {
    prefetch(codes, block_vectors(bits) * 4 * LANES);
    int accumulators = rows == 1 ? 4 : 1; /* a single row needs four sums per lane to hide the latency of additions */
#pragma GCC unroll 8
    for (int q = 0; q < block_columns(bits) / 4; q++) {
        Floats w[4];
        if (lookup) ISA(lookup_quad)(w, table, ISA(quad)(codes, q, bits));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (!lookup) w[j] = ISA(decode)(codes, q, j, bits, 0, NULL, center);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) sums[r + j % accumulators] += w[j] * x[(4 * q + j) * rows + r];
        }
    }
}

TARGET INLINE void ISA(float_panel)(const Product *p, int64_t panel, int64_t start, int bits, int rows, int lookup,
                                    const float *values, Floats *y) {
    const Weight *w = p->w;
    ISA(Table) table = ISA(table_from)(values);
    int block_bytes = block_vectors(bits) * 4 * LANES;
    float center = (float)w->center;
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_bytes;
    const float *x = p->floats + start * p->padded;
    for (int64_t g = 0; g < p->groups; g++) {
        Floats offset, scale = ISA(scale_and_offset)(w, panel, p->groups, g, &offset);
        /* Long groups are added up in segments, so that the error of a sum does not grow with the width of the layer. */
        for (int64_t left = blocks_of(w, g); left > 0;) {
            int64_t blocks = min64(left, SEGMENT / block_columns(bits));
            Floats sums[MAX_ROWS] = {{0}};
            left -= blocks;
            for (; blocks > 0; blocks--, codes += block_bytes, x += block_columns(bits) * rows)
                ISA(float_block)(sums, codes, x, bits, rows, lookup, &table, center);
            if (rows == 1) sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) y[r] += scale * sums[r];
            keep_in_memory(y);
        }
        if (has_offsets(w)) {
            Floats shift = scale * offset;
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) y[r] -= shift * p->sums[start * p->groups + g * rows + r];
        }
    }
}

TARGET static void ISA(pack_floats)(Product *p, RowBlock block, int r) {
    const Weight *w = p->w;
    const float *x = (p->masked_x ? p->masked_x : p->x) + (block.start + r) * w->columns;
    float *floats = p->floats + block.start * p->padded + r;
    for (int64_t g = 0; g < p->groups; g++, x += w->group) {
        int64_t count = min64(w->group, w->columns - g * w->group), room = blocks_of(w, g) * block_columns(w->bits);
        for (int64_t k = 0; k < count; k++) floats[k * block.rows] = x[k];
        for (int64_t k = count; k < room; k++) floats[k * block.rows] = 0;
        floats += room * block.rows;
        if (has_offsets(w)) {
            double sum = 0;
            for (int64_t k = 0; k < count; k++) sum += x[k];
            p->sums[block.start * p->groups + g * block.rows + r] = (float)sum;
        }
    }
}
