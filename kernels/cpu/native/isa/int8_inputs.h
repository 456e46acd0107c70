/* Products with int8 activations. */

/*
 * Integer sums of at most 8 quads, added to `sums`: 16-bit sums do not overflow before that. If the instructions cannot
 * multiply whole bytes, a byte is split into nibbles: its product is that of the low one plus 16 times that of the high one.
 */
TARGET INLINE void ISA(dot_blocks)(Ints *sums, const uint8_t *codes, const int32_t *x, int blocks, int bits, int rows) {
    int quads = block_columns(bits) / 4, block_bytes = block_vectors(bits) * 4 * LANES;
    int nibbles = bits == 8 && !ISA(WHOLE_BYTES);
    prefetch(codes, blocks * block_bytes);
#pragma GCC unroll 2
    for (int part = 0; part <= nibbles; part++) {
        Ints run[MAX_ROWS] = {{0}};
#pragma GCC unroll 8
        for (int b = 0; b < blocks; b++)
#pragma GCC unroll 8
            for (int q = 0; q < quads; q++) {
                Words w = ISA(quad)(codes + b * block_bytes, q, bits);
                if (nibbles) w = (w >> (4 * part)) & 0x0f0f0f0f;
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    run[r] = ISA(dot)(run[r], w, (Words){0} + (uint32_t)x[(b * quads + q) * rows + r]);
            }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sums[r] += ISA(widen)(run[r]) * (1 << (4 * part));
        if (nibbles) keep_in_memory(sums);
    }
}

TARGET INLINE void ISA(int8_panel)(const Product *p, int64_t panel, int64_t start, int bits, int rows, Floats *y) {
    const Weight *w = p->w;
    int block_bytes = block_vectors(bits) * 4 * LANES, block_quads = block_columns(bits) / 4;
    int run = 8 / block_quads; /* blocks of 8 quads together */
    const uint8_t *codes = w->codes + panel * row_blocks(w) * block_bytes;
    const int32_t *x = p->quads + start * p->padded / 4;
    for (int64_t g = 0; g < p->groups; g++) {
        Ints sums[MAX_ROWS] = {{0}};
        int64_t blocks = blocks_of(w, g);
        for (; blocks >= run; blocks -= run, codes += run * block_bytes, x += run * block_quads * rows)
            ISA(dot_blocks)(sums, codes, x, run, bits, rows);
        for (; blocks > 0; blocks--, codes += block_bytes, x += block_quads * rows)
            ISA(dot_blocks)(sums, codes, x, 1, bits, rows);
        Floats offset, scale = ISA(scale_and_offset)(w, panel, p->groups, g, &offset);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int64_t at = start * p->groups + g * rows + r;
            /* The center is subtracted in integers: a difference of two large floats would be mostly rounding error. */
            Floats value = __builtin_convertvector(sums[r] - w->center * p->code_sums[at], Floats);
            if (has_offsets(w)) value -= offset * (float)p->code_sums[at];
            y[r] += value * (scale * p->scales[at]);
        }
        keep_in_memory(y);
    }
}

/* int8 codes of `count` activations with `scale`, as quads `stride` apart, padded with zeros; returns the sum of the codes. */
TARGET static int32_t ISA(quantize)(const float *x, int64_t count, float scale, int32_t *quads, int stride) {
    int32_t sum = 0;
    for (int64_t start = 0; start < count; start += SEGMENT) {
        int8_t codes[SEGMENT] = {0};
        int n = (int)min64(SEGMENT, count - start);
        for (int k = 0; k < n; k++) {
            int32_t code = round_to_int(x[start + k] / scale);
            code = code > 127 ? 127 : code < -128 ? -128 : code;
            codes[k] = (int8_t)code;
            sum += code;
        }
        for (int q = 0; q < (n + 3) / 4; q++) memcpy(quads + (start / 4 + q) * stride, codes + 4 * q, 4);
    }
    return sum;
}

/* Without their sign, floats are ordered as integers are; NaN is the largest, so that it propagates. */
TARGET static float ISA(absmax)(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t k = 0; k < count; k++) {
        int32_t size = (int32_t)(float_to_bits(x[k]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    return float_from_bits((uint32_t)most);
}

TARGET static void ISA(pack_int8)(Product *p, RowBlock block, int r) {
    const Weight *w = p->w;
    const float *x = (p->masked_x ? p->masked_x : p->x) + (block.start + r) * w->columns;
    int32_t *quads = p->quads + block.start * p->padded / 4 + r;
    int64_t block_quads = block_columns(w->bits) / 4;
    float largest = p->mode->activations == INT8_TOKENS ? ISA(absmax)(x, w->columns) : 0;
    for (int64_t g = 0; g < p->groups; g++, x += w->group) {
        int64_t count = min64(w->group, w->columns - g * w->group), at = block.start * p->groups + g * block.rows + r;
        if (p->mode->activations == INT8_GROUPS) largest = ISA(absmax)(x, count);
        p->scales[at] = largest != 0 ? largest / p->mode->steps : 1;
        int64_t room = blocks_of(w, g) * block_quads;
        for (int64_t q = count / 4; q < room; q++) quads[q * block.rows] = 0;
        p->code_sums[at] = ISA(quantize)(x, count, p->scales[at], quads, block.rows);
        quads += room * block.rows;
    }
}
