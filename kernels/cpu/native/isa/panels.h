/* One panel by a block of rows of activations, and one panel as floats: what the table of instruction sets points to. */

TARGET static void ISA(pack_inputs)(Product *p, RowBlock block) {
    for (int r = 0; r < block.rows; r++)
        if (p->mode->activations == FLOATS)
            ISA(pack_floats)(p, block, r);
        else
            ISA(pack_int8)(p, block, r);
}

/* Add the outlier columns to the sums of a panel. */
TARGET INLINE void ISA(add_outliers)(const Product *p, int64_t panel, int64_t start, int rows, Floats *y) {
    int64_t count = p->w->outlier_count;
    const uint16_t *outliers = p->w->outliers + panel * count * LANES;
    const float *x = p->outlier_x + start * count;
    for (int64_t j = 0; j < count; j++, outliers += LANES) {
        Floats weight = ISA(load_halves)(outliers);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) y[r] += weight * x[r * count + j];
    }
}

/* The codebook, or a uniform grid as one: on some machines a look-up is cheaper than a conversion. */
TARGET INLINE const float *ISA(codebook_or_uniform)(const Weight *w, float *uniform) {
    for (int code = 0; code < 16; code++) uniform[code] = (float)(code - w->center);
    return w->codebook ? w->codebook : uniform;
}

/* `bits` and `rows` are constants in all calls below, so that each is compiled by itself. */
TARGET INLINE void ISA(panel_rows)(const Product *p, int64_t panel, int64_t start, int bits, int rows) {
    Floats y[MAX_ROWS] = {{0}};
    float uniform[16];
    const float *table = ISA(codebook_or_uniform)(p->w, uniform);
    if (p->mode->activations != FLOATS)
        ISA(int8_panel)(p, panel, start, bits, rows, y);
    else if (bits < 8 && ISA(CHEAP_TABLE))
        ISA(float_panel)(p, panel, start, bits, rows, 1, table, y);
    else if (bits == 4 && p->w->codebook)
        ISA(float_panel)(p, panel, start, bits, rows, 1, table, y);
    else
        ISA(float_panel)(p, panel, start, bits, rows, 0, table, y);
    if (p->w->outlier_count) ISA(add_outliers)(p, panel, start, rows, y);
    size_t bytes = (size_t)min64(LANES, p->w->rows - panel * LANES) * sizeof(float);
    for (int r = 0; r < rows; r++) memcpy(p->y + (start + r) * p->w->rows + panel * LANES, &y[r], bytes);
}

TARGET INLINE void ISA(panel_bits)(const Product *p, int64_t panel, RowBlock block, int bits) {
    if (TILE == 1 || block.rows == 1)
        ISA(panel_rows)(p, panel, block.start, bits, 1);
    else if (block.rows == 4)
        ISA(panel_rows)(p, panel, block.start, bits, 4);
    else
        ISA(panel_rows)(p, panel, block.start, bits, 8);
}

TARGET static void ISA(multiply)(const Product *p, int64_t panel, RowBlock block) {
    switch (p->w->bits) {
    case 2:
        ISA(panel_bits)(p, panel, block, 2);
        break;
    case 3:
        ISA(panel_bits)(p, panel, block, 3);
        break;
    case 4:
        ISA(panel_bits)(p, panel, block, 4);
        break;
    default:
        ISA(panel_bits)(p, panel, block, 8);
    }
}

TARGET INLINE void ISA(dequantize_panel)(const Weight *w, int64_t panel, float *first, int64_t stride, int bits,
                                         const float *table) {
    int64_t groups = groups_of(w);
    float *out = first;
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_vectors(bits) * 4 * LANES;
    size_t bytes = (size_t)min64(LANES, w->rows - panel * LANES) * sizeof(float);
    for (int64_t g = 0; g < groups; g++) {
        Floats offset, scale = ISA(scale_and_offset)(w, panel, groups, g, &offset);
        int64_t left = min64(w->group, w->columns - g * w->group);
        for (; left > 0; left -= block_columns(bits), codes += block_vectors(bits) * 4 * LANES)
            for (int k = 0; k < min64(left, block_columns(bits)); k++, out += stride) {
                Floats value = ISA(decode)(codes, k / 4, k % 4, bits, bits < 8, table, (float)w->center);
                value = (value - offset) * scale;
                memcpy(out, &value, bytes);
            }
    }
    for (int64_t j = 0; j < w->outlier_count; j++) {
        Floats value = ISA(load_halves)(w->outliers + (panel * w->outlier_count + j) * LANES);
        memcpy(first + w->outlier_columns[j] * stride, &value, bytes);
    }
}

TARGET static void ISA(dequantize)(const Weight *w, int64_t panel, float *out, int64_t stride) {
    float uniform[16];
    const float *table = ISA(codebook_or_uniform)(w, uniform);
    switch (w->bits) {
    case 2:
        ISA(dequantize_panel)(w, panel, out, stride, 2, table);
        break;
    case 3:
        ISA(dequantize_panel)(w, panel, out, stride, 3, table);
        break;
    case 4:
        ISA(dequantize_panel)(w, panel, out, stride, 4, table);
        break;
    default:
        ISA(dequantize_panel)(w, panel, out, stride, 8, table);
    }
}
